"""How long training will take: a few sequences and updates, timed before the first step.

Nothing is trained: gradients are dropped, and updates are those of other tensors of the same shapes. Knows no model
and no text: it is handed what to time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from training.config import OptimConfig
from training.device import Device
from training.optim import Optimizers

FAST_SECONDS = 0.02  # a part of a micro-step that takes less is timed as a whole
SLOW_SECONDS = 2  # a part that takes more is not timed with more sequences
SAMPLE_NUMBERS = 2**20  # of each role and shape, so that the tensors to time fit beside a large model
FORWARD_SHARE = 1 / 3  # of a forward and backward pass


def seconds_of(call: Callable[[], object], device: Device) -> float:
    """The time that `call` takes."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start


def micro_step_seconds(
    trial: Callable[[int], None], batch_size: int, device: Device, compiled: bool
) -> float:
    """The time of a micro-step; `trial` is called with a number of sequences and does its work.

    Half of the sequences are enough where all of them would be a wait. A compiled model is
    timed with all: another number would compile it again.
    """
    if compiled:
        return seconds_of(lambda: trial(batch_size), device)
    few = max(1, batch_size // 8)
    first = seconds_of(lambda: trial(few), device)
    rows = batch_size if first < FAST_SECONDS else max(1, batch_size // 2)
    if first > SLOW_SECONDS:
        rows = few
    second = seconds_of(lambda: trial(rows), device)
    # The first pass also sets the device up, and noise only makes a time longer: the faster one is right.
    return batch_size * min(first / few, second / rows)


def update_seconds(roles: dict[str, list[Tensor]], config: OptimConfig, device: Device) -> float:
    """The time of an optimizer step for parameters by their roles (`GPT.parameters_by_role`).

    Timed with new tensors of the same shapes, in a smaller number: an update takes a time in
    proportion to it. Of what only AdamW updates a part of the rows is enough.
    """
    shapes = Counter((role, weights.shape) for role, of in roles.items() for weights in of)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds = 0.0
    for (role, shape), count in shapes.items():
        whole = shape.numel() * count
        number = max(1, min(count, SAMPLE_NUMBERS // shape.numel()))
        if shape.numel() > SAMPLE_NUMBERS and role not in ("attention", "mlp"):
            shape = torch.Size((max(1, SAMPLE_NUMBERS // shape[1:].numel()), *shape[1:]))
        tensors = [torch.zeros(shape, device=device.torch, requires_grad=True) for _ in range(number)]
        optimizers = Optimizers({name: [] for name in roles} | {role: tensors}, config)

        def update(optimizers: Optimizers = optimizers, tensors: list[Tensor] = tensors) -> None:
            for weights in tensors:
                weights.grad = torch.zeros_like(weights)
            optimizers.step(scaler, optimizers.gradient_norm(scaler), config.grad_clip)

        fastest = min(seconds_of(update, device) for _ in range(2))
        seconds += fastest * whole / (shape.numel() * number)
    return seconds
