"""The state of a run's optimizers by name, as checkpoints save and load it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.optim import Optimizers
from training.sharding import Divided, Part


def state_shapes(optimizers: Optimizers) -> dict[str, Tensor]:
    """The state of all processes, without its values: tensors on the meta device."""
    shapes = {}
    for weights, keys in optimizers.keys.items():
        for key in keys:
            shape = () if key == "step" else weights.shape
            name = f"{optimizers.names[weights]}.{key}"
            shapes[name] = torch.empty(shape, dtype=torch.float32, device="meta")
    return shapes


def state_tensors(optimizers: Optimizers) -> dict[str, Tensor | Divided]:
    """The state, by names such as "h.0.attn.c_attn.weight.exp_avg".

    Learning rates are left out: the schedule gives them.
    """
    # One process has the whole state.
    states = own_states(optimizers)
    if optimizers.world.size == 1:
        return {name: states[name][1] for name in state_shapes(optimizers)}

    # The rank, start and end of each part of a parameter.
    ranges: dict[Tensor, list[tuple[int, int, int]]] = {}
    for rank, parts in enumerate(optimizers.parts):
        for part in parts:
            ranges.setdefault(part.weights, []).append((rank, part.start, part.end))

    # The state of a parameter is divided as the parameter is; this process may have no part of it.
    nothing = torch.empty(0, device=optimizers.parameters[0].device)
    tensors = {}
    for weights, keys in optimizers.keys.items():
        for key in keys:
            name = f"{optimizers.names[weights]}.{key}"
            _, own = states.get(name, (None, nothing))
            if key == "step":
                # All processes have the same number.
                tensors[name] = Divided(torch.Size(()), own, [(ranges[weights][0][0], 0, 1)])
            else:
                tensors[name] = Divided(weights.shape, own, ranges[weights])
    return tensors


def load_state(optimizers: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Copy the state from `tensors`, which has the names and shapes of `state_shapes`."""
    for name, (part, state) in own_states(optimizers).items():
        state.copy_(part.of(tensors[name]).view(state.shape))


def own_states(optimizers: Optimizers) -> dict[str, tuple[Part, Tensor]]:
    """The state of this process's parts, by name."""
    found = {}
    by_tensor = {part.tensor: part for part in optimizers.own_parts}
    for optimizer in optimizers.all:
        for tensor, state in optimizer.state.items():
            part = by_tensor[tensor]
            for key, value in state.items():
                found[f"{optimizers.names[part.weights]}.{key}"] = part, value
    return found
