"""How long training will take: a few micro-steps, updates and evaluations, timed before the first step.

Nothing is trained: gradients are dropped, and updates are those of other tensors of the same shapes. Knows no model
and no text: it is handed what to time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from terminal import counted, readable_time
from training.config import OptimConfig, TrainingConfig
from training.device import Device
from training.optim import Optimizers

# Whole micro-steps are timed where that takes at most so long, in a run of at least so many of them.
MOST_SECONDS = 3.0
LEAST_MICRO_STEPS = 20
FAST_SECONDS = 0.1  # a micro-step that takes less is timed more often
SAMPLE_NUMBERS = 2**20  # of each role and shape, so that the tensors to time fit beside a large model


@dataclass(frozen=True)
class Pace:
    """The seconds that a step and an evaluation take."""

    step: float
    evaluation: float

    def work_left(self, limits: TrainingConfig, step: int, seconds: float) -> tuple[int, int]:
        """The steps and evaluations that follow after `step` steps and `seconds` of training."""
        steps = limits.max_steps - step
        if limits.max_seconds:
            steps = min(steps, math.ceil(max(0.0, limits.max_seconds - seconds) / self.step))
        return steps, limits.evaluations(step, steps)

    def seconds_left(self, limits: TrainingConfig, step: int = 0, seconds: float = 0.0) -> float:
        """How long the rest of the run takes, evaluations included."""
        steps, evaluations = self.work_left(limits, step, seconds)
        return steps * self.step + evaluations * self.evaluation

    def describe(self, limits: TrainingConfig, step: int = 0, seconds: float = 0.0) -> str:
        """As in "about 2.9 minutes on this machine: 260 steps of 0.65 s, 2 evaluations of 3.1 s"."""
        steps, evaluations = self.work_left(limits, step, seconds)
        return (f"about {readable_time(self.seconds_left(limits, step, seconds))} on this machine: "
                f"{counted(steps, 'step')} of {self.step:.3g} s, "
                f"{counted(evaluations, 'evaluation')} of {self.evaluation:.2g} s")


def seconds_of(call: Callable[[], object], device: Device) -> float:
    """The time that `call` takes."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start


def measure_pace(loss: Callable[[int], Tensor], roles: dict[str, dict[str, Tensor]], config: OptimConfig, device: Device,
                 limits: TrainingConfig, micro_steps: int, eval_sequences: int, compiled: bool = False) -> Pace:
    """The pace of a training with `micro_steps` a step and `eval_sequences` an evaluation.

    `loss(n)` is the loss of n sequences, at most `batch_size` of them; `roles` are the parameters by their roles.
    A compiled model is timed in its own shape only: another one would compile it again.
    """
    parameters = [weights for of in roles.values() for weights in of.values()]

    def micro_step(sequences: int) -> float:
        seconds = seconds_of(lambda: loss(sequences).backward(), device)
        for weights in parameters:
            weights.grad = None
        return seconds

    @torch.inference_mode()
    def forward(sequences: int) -> float:
        return seconds_of(lambda: loss(sequences), device)

    whole = limits.batch_size
    sequences = whole if compiled else math.ceil(whole / 8)
    # The first time also sets the device up.
    first = micro_step(sequences)
    second = first if first > MOST_SECONDS / 2 else micro_step(sequences)
    # Something else may disturb one of the two, and only makes it longer.
    seconds = min(first, second)
    is_short = 2 * seconds * whole / sequences <= MOST_SECONDS
    if is_short and sequences < whole and limits.max_steps * micro_steps >= LEAST_MICRO_STEPS:
        # A sequence takes up to three times as long in a small batch. The first whole one asks for new memory.
        sequences = whole
        seconds = min(micro_step(whole), micro_step(whole))
        if seconds < FAST_SECONDS:
            seconds = statistics.median(micro_step(whole) for _ in range(5))
    step = micro_steps * seconds * whole / sequences + update_seconds(roles, config, device)
    return Pace(step, forward(sequences) * eval_sequences / sequences)


def update_seconds(roles: dict[str, dict[str, Tensor]], config: OptimConfig, device: Device) -> float:
    """The time of an optimizer step for parameters by their roles (`GPT.parameters_by_role`).

    Timed with new tensors of the same shapes, in a smaller number: an update takes a time in
    proportion to it. Of what only AdamW updates a part of the rows is enough.
    """
    shapes = Counter((role, weights.shape) for role, of in roles.items() for weights in of.values())
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds = 0.0
    for (role, shape), count in shapes.items():
        whole = shape.numel() * count
        number = max(1, min(count, SAMPLE_NUMBERS // shape.numel()))
        if shape.numel() > SAMPLE_NUMBERS and role not in ("attention", "mlp"):
            shape = torch.Size((max(1, SAMPLE_NUMBERS // shape[1:].numel()), *shape[1:]))
        tensors = [torch.zeros(shape, device=device.torch, requires_grad=True) for _ in range(number)]
        named = {str(number): weights for number, weights in enumerate(tensors)}
        optimizers = Optimizers({name: {} for name in roles} | {role: named}, config)

        def update(optimizers: Optimizers = optimizers, tensors: list[Tensor] = tensors) -> None:
            for weights in tensors:
                weights.grad = torch.zeros_like(weights)
            optimizers.step(scaler, optimizers.gradient_norm(scaler), config.grad_clip)

        fastest = min(seconds_of(update, device) for _ in range(2))
        seconds += fastest * whole / (shape.numel() * number)
    return seconds
