"""How weights are updated: AdamW, and Muon with the matrices of one shape orthogonalised together.

Updates and state are those of torch.optim's classes, which are not used: making one of them has torch import its
compiler, which takes a second.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hardware import native

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, kellerjordan.github.io/posts/muon
NEWTON_SCHULZ_STEPS = 5


class Optimizer:
    """Groups of parameters with their rates, and what is remembered of each parameter: what a `GradScaler` asks for.

    The state exists from the start, so that its size is known before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        self.param_groups = [{"lr": lr} | group for group in groups if group["params"]]
        self.state = {weights: self.first_state(weights) for group in self.param_groups for weights in group["params"]}

    def first_state(self, weights: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Update each parameter that has a gradient."""
        for group in self.param_groups:
            if parameters := [weights for weights in group["params"] if weights.grad is not None]:
                self.update(parameters, group["lr"], group["weight_decay"])

    def update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        """Drop the gradients."""
        for weights in self.state:
            weights.grad = None


class AdamW(Optimizer):
    """Loshchilov and Hutter 2017, arXiv:1711.05101, by torch's fused kernel."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr)
        self.betas = betas

    def first_state(self, weights: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros((), device=weights.device),
                "exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.zeros_like(weights)}

    def update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        states = [self.state[weights] for weights in parameters]
        means, squares, steps = ([state[what] for state in states] for what in ("exp_avg", "exp_avg_sq", "step"))
        adamw(parameters, [weights.grad for weights in parameters], means, squares, [], steps, fused=True, amsgrad=False,
              beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=weight_decay, eps=1e-8, maximize=False)


class Muon(Optimizer):
    """Jordan 2024, kellerjordan.github.io/posts/muon: one batched product where torch's own has a loop over matrices."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, lr)
        self.momentum = momentum

    def first_state(self, weights: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(weights)}

    def update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        # Tall matrices are transposed, so that they can be stacked with wide ones of the same sizes.
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for weights in parameters:
            alike.setdefault(tuple(sorted(weights.shape)), []).append(weights)
        for matrices in alike.values():
            # Singular values only have to come near 1, so bf16 is exact enough. Emulated it would take most of a step.
            dtype = torch.bfloat16 if native("bf16", matrices[0].device.type) else torch.float32
            directions = torch.stack([wide(self.direction(weights).to(dtype)) for weights in matrices])
            for weights, update in zip(matrices, orthogonalize(directions), strict=True):
                rows, columns = weights.shape
                weights.mul_(1 - lr * weight_decay)
                weights.add_(update.mT if rows > columns else update, alpha=-lr * math.sqrt(max(1, rows / columns)))

    def direction(self, weights: Tensor) -> Tensor:
        """Nesterov's: the gradient, drawn toward its running mean, which it moves."""
        mean = self.state[weights]["momentum_buffer"]
        mean.lerp_(weights.grad, 1 - self.momentum)
        return weights.grad.lerp(mean, self.momentum)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it has more rows than columns."""
    return matrix.mT if matrix.size(0) > matrix.size(1) else matrix


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices `[N, rows, columns]` with all singular values brought near 1, by Newton and Schulz's quintic iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # the spectral norm is at most 1 now
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
