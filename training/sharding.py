"""Which part of the parameters each process updates, and keeps the optimizer state of.

Muon needs whole matrices; AdamW treats each number alone, so a slice is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    tensor: Tensor  # the parameter itself, or a view of the slice

    def of(self, whole: Tensor) -> Tensor:
        """The same part of a tensor of the parameter's shape; of a scalar, all."""
        if self.tensor is self.weights or whole.ndim == 0:
            return whole
        return whole.view(-1)[self.start : self.end]

    def take_gradient(self) -> None:
        if self.weights.grad is not None:
            self.tensor.grad = self.of(self.weights.grad)


def whole(weights: Tensor) -> Part:
    return Part(weights, 0, weights.numel(), weights)


def deal_out(matrices: list[Tensor], size: int) -> list[list[Part]]:
    """Whole matrices for each of `size` ranks, about equally many of each shape."""
    if size == 1:
        return [[whole(matrix) for matrix in matrices]]
    parts: list[list[Part]] = [[] for _ in range(size)]
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
        chunks = math.ceil(weights.numel() / CHUNK)
        for index in range(size):
            start = chunks * index // size * CHUNK
            end = min(chunks * (index + 1) // size * CHUNK, weights.numel())
            if start < end:
                view = weights.detach().view(-1)[start:end]
                # Parameters of fewer chunks than ranks go to one rank after the other.
                parts[(index + number) % size].append(Part(weights, start, end, view))
    return parts
