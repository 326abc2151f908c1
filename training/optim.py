"""Optimizers and schedules: which parameter is updated how, and by how much at each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from terminal import counted
from training.config import OptimConfig
from training.updates import AdamW, Muon, Optimizer


def lr_scale(step: int, config: OptimConfig, max_steps: int) -> float:
    """The part of the full learning rate that step `step` (from 0) uses: a pure function of the step.

    A linear warm-up, then: cosine, half a wave down to `min_lr_ratio` (arXiv:1608.03983); wsd, level and
    then straight down in the last `decay_fraction` (arXiv:2404.06395); constant, level.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps if config.schedule == "cosine" else config.decay_start(max_steps)
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if config.schedule == "cosine" else progress
    return 1.0 - (1.0 - config.min_lr_ratio) * fall


def same_rates(step: int, config: OptimConfig, old_max_steps: int, max_steps: int) -> bool:
    """Whether the rates before `step` are the same for both numbers of steps."""
    # The last one tells: a schedule that has once left another does not meet it again.
    return step == 0 or lr_scale(step - 1, config, old_max_steps) == lr_scale(step - 1, config, max_steps)


def extension(step: int, config: OptimConfig, old_max_steps: int, max_steps: int, replanned: bool) -> str:
    """What it means that a run at `step` that was planned for `old_max_steps` is now one of `max_steps`.

    `replanned`: it had other rates earlier, from another such change.
    """
    if same_rates(step, config, old_max_steps, max_steps) and not replanned:
        return f"The learning rates so far are those of a run planned for {counted(max_steps, 'step')}: it becomes that run."
    before, after, end = (lr_scale(step - 1, config, old_max_steps), lr_scale(step, config, max_steps),
                          lr_scale(max_steps - 1, config, max_steps))
    longer = counted(max_steps, "step")
    return (f"The {config.schedule} schedule for {counted(old_max_steps, 'step')} becomes the one for {longer} "
            f"from here on: the rate stood at {before:.0%} of its peak, goes on at {after:.0%}, and ends at {end:.0%}. "
            f"A run planned for {longer} from the start would have had other rates until here.")


class Optimizers:
    """One or two optimizers that act as one.

    `roles` are the parameters by what they do (`GPT.parameters_by_role`). Muon takes the matrices inside the
    blocks (roles "attention" and "mlp"), where steps in all directions of a product's space should be alike
    (Jordan 2024, kellerjordan.github.io/posts/muon); AdamW takes the rest, or with optimizer=adamw everything.
    """

    def __init__(self, roles: dict[str, list[Tensor]], config: OptimConfig) -> None:
        matrices = roles["attention"] + roles["mlp"]
        tables, vectors = roles["embedding"] + roles["head"], roles["vector"]
        self.all: list[Optimizer] = []
        if config.optimizer == "muon":
            groups = [{"params": matrices, "weight_decay": config.weight_decay}]
            self.all.append(Muon(groups, config.muon_lr, config.momentum))
        else:
            tables = matrices + tables
        groups = [{"params": tables, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.all.append(AdamW(groups, config.lr, (config.beta1, config.beta2)))
        self.full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]
        self.parameters = [weights for role in roles.values() for weights in role]

    def set_scale(self, scale: float) -> None:
        """Use this part of each group's full learning rate from now on."""
        for optimizer, rates in zip(self.all, self.full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale

    def gradient_norm(self, scaler: torch.amp.GradScaler) -> Tensor:
        """The norm of all gradients together, unscaled."""
        for optimizer in self.all:
            scaler.unscale_(optimizer)
        return torch.nn.utils.get_total_norm([weights.grad for weights in self.parameters if weights.grad is not None])

    def step(self, scaler: torch.amp.GradScaler, norm: Tensor, grad_clip: float) -> None:
        """Clip the gradients, whose norm is `norm`, update the weights, and clear the gradients.

        A scaler whose scale was too high for some of them has all optimizers pass this step over.
        """
        if scaler.is_enabled() and not norm.isfinite():
            self.clear(scaler)
            return
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, grad_clip, norm)
        for optimizer in self.all:
            scaler.step(optimizer)
        self.clear(scaler)

    def clear(self, scaler: torch.amp.GradScaler) -> None:
        """Drop the gradients, used or not; a scaler learns from them what scale to use next."""
        scaler.update()
        for optimizer in self.all:
            optimizer.clear()

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, `OPTIMIZER.PARAMETER.WHAT`. Rates are no state: the schedule gives them."""
        return {f"{number}.{index}.{what}": tensor
                for number, optimizer in enumerate(self.all)
                for index, state in enumerate(optimizer.state.values())
                for what, tensor in state.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
