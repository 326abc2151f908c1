"""Muon, an optimizer of matrices by orthogonalized momentum.

Knows neither the processes nor which parameters it is given.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from hardware import native

# The coefficients of Keller Jordan's Muon (2024), kellerjordan.github.io/posts/muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# From this ratio of columns to rows on, products of square matrices save time.
WIDE = 2


class WithoutCompiler(torch.optim.Optimizer):
    """Keeps torch.optim from importing torch's compiler, which takes 2 s at start-up.

    Decorators of these methods import it to exclude them from compilation; steps are not compiled.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Muon(WithoutCompiler):
    """Muon (Jordan 2024), for matrices, orthogonalizing those of one shape in one batch.

    Equal to `torch.optim.Muon`, which orthogonalizes one matrix after another. With
    `normalize_rows`, the rows of an update have equal norms.
    """

    STATE = ("momentum_buffer",)

    def __init__(self, params: list[dict[str, Any]], lr: float, momentum: float,
                 normalize_rows: bool = False) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.normalize_rows = normalize_rows
        for group in self.param_groups:
            for weights in group["params"]:
                self.state[weights] = {"momentum_buffer": torch.zeros_like(weights)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            # Tall matrices are transposed, to share a batch with wide ones of the same sizes.
            batches: dict[tuple[int, ...], list[Tensor]] = {}
            for weights in group["params"]:
                if weights.grad is not None:
                    batches.setdefault(tuple(sorted(self.shape(weights))), []).append(weights)
            for batch in batches.values():
                self.update(batch, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, batch: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """Update matrices of one shape, or its transpose."""
        # Singular values only need to come near 1, so bf16 is exact enough where it is native.
        is_fast = native("bf16", batch[0].device.type)
        dtype = torch.bfloat16 if is_fast else torch.float32
        means = [self.state[weights]["momentum_buffer"] for weights in batch]
        gradients = [weights.grad for weights in batch]
        # On GPUs, an operation on all matrices is launched once.
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        # Nesterov momentum: the gradient counts once more.
        nesterov = torch._foreach_lerp(gradients, means, momentum)
        updates = self.updates(batch, [direction.to(dtype) for direction in nesterov])
        # Weight decay is decoupled from the update, as in AdamW.
        torch._foreach_mul_(batch, 1 - lr * weight_decay)
        # Tall matrices get larger updates, so that the output of each layer changes about equally.
        for weights, update in zip(batch, updates, strict=True):
            rows, columns = self.shape(weights)
            weights.add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))

    def shape(self, weights: Tensor) -> torch.Size:
        """The shape of the matrix; those of processes that have a part of it differ from it."""
        return weights.shape

    def updates(self, batch: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        """The orthogonalized directions of the matrices in a batch."""
        updates = orthogonalize_all(directions)
        if self.normalize_rows:
            return [equal_rows(update) for update in updates]
        return updates


def wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it has more rows than columns."""
    return matrix.mT if matrix.size(0) > matrix.size(1) else matrix


def orthogonalize_all(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalize matrices of one shape, or its transpose, in one batch."""
    if not matrices:
        return []
    found = orthogonalize(torch.stack([wide(matrix) for matrix in matrices]))
    return [result.mT if matrix.size(0) > matrix.size(1) else result
            for matrix, result in zip(matrices, found, strict=True)]


def equal_rows(update: Tensor) -> Tensor:
    """The update with rows of equal norms, and with the same norm as a whole.

    NorMuon (arXiv:2510.05491), without its running average of the rows' norms.
    """
    norms = update.norm(dim=1, keepdim=True).clamp(min=1e-7)
    return update / norms * (update.norm() / math.sqrt(len(update)))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices `[N, rows, columns]` near 1.

    By five steps of a quintic Newton-Schulz iteration.
    """
    a, b, c = NEWTON_SCHULZ
    # After division by the Frobenius norm, no singular value is above 1.
    norms = matrices.flatten(1).norm(dim=1).clamp(min=1e-7)
    x = matrices / norms[:, None, None]
    if x.dtype == torch.float32 and x.size(2) >= WIDE * x.size(1):
        return orthogonalize_wide(x)
    for _ in range(NEWTON_SCHULZ_STEPS):
        # x = a x + (b A + c A A) x, where A = x x^T: [N, rows, rows]
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def orthogonalize_wide(x: Tensor) -> Tensor:
    """The same iteration, with most products between the square matrices A = x x^T.

    A step multiplies x by P = a + b A + c A A, and so A by P from both sides. x is multiplied once,
    by the product of all P. Gram Newton-Schulz (Zhang et al. 2026,
    dao-lab.ai/blog/2026/gram-newton-schulz), which is not exact enough in 16 bits.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT  # [N, rows, rows]
    # The product of all P so far, [N, rows, rows].
    total = None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        total = factor if total is None else factor @ total
        # The last step needs no further one.
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ (gram @ factor)
    return total @ x
