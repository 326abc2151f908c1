"""Which part of the parameters each process updates, and keeps the optimizer state of.

Muon needs whole matrices; AdamW treats each number alone, so a slice is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Slices start at multiples of this many numbers. The norm of the gradients is made of the norms of
# such chunks, so it does not depend on the number of slices; and vector instructions treat a number
# in a slice as they would in the whole tensor, and give it the same bits.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Part:
    """The numbers from `start` to `end` of a parameter, in their order in memory."""

    weights: Tensor
    start: int
    end: int
    # The parameter itself, or a view of the slice. Of rows, this process has only its own.
    tensor: Tensor | None

    def of(self, whole: Tensor) -> Tensor:
        """The same part of a tensor of the parameter's shape; of a scalar, all."""
        if self.tensor is self.weights or whole.ndim == 0:
            return whole
        return whole.view(-1)[self.start : self.end]


def whole(weights: Tensor) -> Part:
    return Part(weights, 0, weights.numel(), weights)


def deal_out(matrices: list[Tensor], size: int) -> list[list[Part]]:
    """Whole matrices for each of `size` ranks, about equally many of each shape."""
    if size == 1:
        return [[whole(matrix) for matrix in matrices]]
    parts: list[list[Part]] = [[] for _ in range(size)]
    # One after the other, sorted by shape: Muon orthogonalizes those of one shape in one batch.
    by_shape = sorted(matrices, key=lambda matrix: sorted(matrix.shape))
    for index, matrix in enumerate(by_shape):
        parts[index % size].append(whole(matrix))
    return parts


def slices(parameters: list[Tensor], size: int) -> list[list[Part]]:
    """An equal slice of each parameter for each of `size` ranks."""
    if size == 1:
        return [[whole(weights) for weights in parameters]]
    parts: list[list[Part]] = [[] for _ in range(size)]
    for number, weights in enumerate(parameters):
        # Slices end at whole chunks, except at the end of the parameter.
        chunks = math.ceil(weights.numel() / CHUNK)
        for index in range(size):
            start = chunks * index // size * CHUNK
            end = min(chunks * (index + 1) // size * CHUNK, weights.numel())
            if start < end:
                view = weights.detach().view(-1)[start:end]
                # Start at another rank for each parameter: those of fewer chunks than ranks would
                # all go to the first ranks.
                parts[(index + number) % size].append(Part(weights, start, end, view))
    return parts


@torch.no_grad()
def rows(parameters: list[Tensor], rank: int, size: int) -> list[list[Part]]:
    """The rows of each parameter that FSDP2 gives to each rank. `rank` is this process's."""
    parts: list[list[Part]] = [[] for _ in range(size)]
    for weights in parameters:
        for one in range(size):
            start, end = number_range(weights.shape, one, size)
            own = weights.to_local() if one == rank else None
            parts[one].append(Part(weights, start, end, own))
    return parts


def row_range(n_rows: int, rank: int, size: int) -> tuple[int, int]:
    """The first row of a rank, and the one after its last, as `torch.chunk` divides them."""
    most = math.ceil(n_rows / size)
    return min(rank * most, n_rows), min((rank + 1) * most, n_rows)


def number_range(shape: torch.Size, rank: int, size: int) -> tuple[int, int]:
    """As `row_range`, for the numbers in these rows."""
    first, last = row_range(shape[0], rank, size)
    width = shape[1:].numel()
    return first * width, last * width
