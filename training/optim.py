"""AdamW and Muon: the parameters that each updates in each process, and the state of both."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.config import OptimConfig
from training.distributed import World
from training.fsdp import RowMuon, RowNorm
from training.gradient_norm import GradientNorm
from training.muon import Muon, WithoutCompiler
from training.sharding import Divided, Part, deal_out, rows, slices

# torch's default.
ADAM_EPSILON = 1e-8


class AdamW(WithoutCompiler, torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) by torch's fused kernels.

    Its state is created at once: the sizes of checkpoints need it.
    """

    STATE = ("step", "exp_avg", "exp_avg_sq")
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float],
                 epsilon: float = ADAM_EPSILON) -> None:
        super().__init__(params, lr, betas, epsilon, fused=True)
        for group in self.param_groups:
            for weights in group["params"]:
                state = {name: torch.zeros_like(weights) for name in self.STATE}
                state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
                self.state[weights] = state


class Optimizers:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    `roles` are the parameters by role and name (`GPT.parameters_by_role`). Muon gets the roles
    "attention" and "mlp". Weight decay applies to all but the role "vector". Of several processes,
    each updates its part of the parameters, and has the optimizer state of that part. `sharded`
    are the parameters of a model that training/fsdp.py has divided by rows. `rates` are factors of
    the learning rates by name (`GPT.rate_scales`), by default 1.
    """

    def __init__(self, roles: dict[str, dict[str, Tensor]], config: OptimConfig,
                 world: World | None = None, sharded: bool = False,
                 rates: Mapping[str, float] | None = None) -> None:
        self.world = world or World({})
        self.sharded = sharded
        # The parameters by their treatment: matrices of the blocks, others with and without decay.
        self.names = {weights: name for role in roles.values() for name, weights in role.items()}
        self.parameters = list(self.names)
        self.rates = dict.fromkeys(self.names.values(), 1.0) | dict(rates or {})
        # Gradients become smaller as rates do, and stay larger than epsilon: arXiv:2505.01618.
        epsilon = ADAM_EPSILON * min(self.rates.values())
        # AdamW's updates of a rare n-gram are as large as those of a frequent one. A smaller rate
        # keeps the table from memorizing single occurrences.
        for name in self.rates:
            if name.startswith("ngram"):
                self.rates[name] *= config.ngram_lr_ratio
        matrices = [*roles["attention"].values(), *roles["mlp"].values()]
        decayed = [*roles["embedding"].values(), *roles["head"].values()]
        vectors = list(roles["vector"].values())

        # Two optimizers with Muon, one without.
        self.all: list[torch.optim.Optimizer] = []
        # The parts that each rank updates, and the names of each parameter's state.
        self.parts: list[list[Part]] = [[] for _ in range(self.world.size)]
        self.own_parts = self.parts[self.world.rank]
        self.keys: dict[Tensor, tuple[str, ...]] = {}

        # Muon updates the matrices of the blocks; AdamW all else, or everything.
        if config.optimizer == "muon":
            self.keys |= dict.fromkeys(matrices, Muon.STATE)
            own = self.assign(matrices, whole=True)
            groups = self.groups(own, config.muon_lr, config.weight_decay)
            if sharded:
                muon = RowMuon(groups, config.muon_lr, config.momentum, config.normalize_rows,
                               self.own_parts, self.world)
            else:
                muon = Muon(groups, config.muon_lr, config.momentum, config.normalize_rows)
            self.all.append(muon)
        else:
            decayed = matrices + decayed
        self.keys |= dict.fromkeys(decayed + vectors, AdamW.STATE)
        groups = self.groups(self.assign(decayed), config.lr, config.weight_decay)
        groups += self.groups(self.assign(vectors), config.lr, 0.0)
        self.all.append(AdamW(groups, config.lr, (config.beta1, config.beta2), epsilon))
        # `set_scale` sets each rate to a fraction of this one.
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]

        # How the norm of all gradients is measured.
        if sharded:
            self.norm = RowNorm(self.world, self.own_parts)
        else:
            self.norm = GradientNorm(self.world, list(self.keys), self.parts)

    def groups(self, own: list[Part], lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The own parts by learning rate. The product of rate and decay is the same for all."""
        by_scale: dict[float, list[Tensor]] = {1.0: []}
        for part in own:
            scale = self.rates[self.names[part.weights]]
            by_scale.setdefault(scale, []).append(part.tensor)
        return [{"params": tensors, "lr": lr * scale, "weight_decay": weight_decay / scale}
                for scale, tensors in by_scale.items()]

    def assign(self, parameters: list[Tensor], whole: bool = False) -> list[Part]:
        """Divide parameters, or deal them out `whole`, to the ranks; return this one's parts."""
        if self.sharded:
            parts = rows(parameters, self.world.rank, self.world.size)
        elif whole:
            parts = deal_out(parameters, self.world.size)
        else:
            parts = slices(parameters, self.world.size)
        for rank, some in enumerate(parts):
            self.parts[rank] += some
        return parts[self.world.rank]

    def set_scale(self, scale: float) -> None:
        """Set each learning rate to this fraction of its full value."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale

    def gradient_norm(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Unscale the gradients of the own parts, and return the norm of all processes' gradients.

        Does not wait for the device.
        """
        for optimizer in self.all:
            scaler.unscale_(optimizer)
        norm = self.norm.measure()
        # The scaler has only seen this process's gradients: tell it whether any overflowed.
        if scaler.is_enabled() and self.world.size > 1:
            for optimizer in self.all:
                for found_inf in scaler._found_inf_per_device(optimizer).values():
                    found_inf.fill_(~norm.isfinite())
        return norm

    def step(self, scaler: torch.amp.GradScaler, norm: Tensor, grad_clip: float,
             overflowed: bool | None = None) -> None:
        """Clip the gradients, whose norm is `norm`, update the weights, and drop the gradients.

        With an enabled scaler, a gradient that overflowed skips the step of all optimizers.
        `overflowed` tells it where the caller has read the norm; otherwise this waits for it.
        """
        if overflowed is None:
            overflowed = scaler.is_enabled() and not norm.isfinite()
        if overflowed:
            self.zero_grad(scaler)
            return
        # Clip by the norm of all processes' gradients, so that all scale them equally.
        if grad_clip:
            own = [part.tensor for part in self.own_parts]
            torch.nn.utils.clip_grads_with_norm_(own, grad_clip, norm)
        # The scaler's own check would fail in a process that has no matrix for Muon to update.
        for optimizer in self.all:
            optimizer.step()
        # Each process sends the others the parts that it has updated.
        if not self.sharded:
            self.world.share([[part.tensor for part in parts] for parts in self.parts])
        self.zero_grad(scaler)

    def zero_grad(self, scaler: torch.amp.GradScaler) -> None:
        """Drop the gradients, and let the scaler adapt its scale to them."""
        scaler.update()
        for optimizer in self.all:
            optimizer.zero_grad()
        for weights in self.parameters:
            weights.grad = None


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
