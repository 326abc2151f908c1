"""Which part of the parameters each process updates, and keeps the optimizer state of.

Muon needs whole matrices; AdamW treats each number alone, so a slice is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    tensor: Tensor  # the parameter itself, or a view of the slice

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


@dataclass(frozen=True, eq=False)
class Divided:
    """A tensor of which each process has a part, or none."""

    shape: torch.Size
    own: Tensor  # this process's numbers, in one dimension
    # The rank, first and last number of each part, in order: together they cover the tensor once.
    ranges: list[tuple[int, int, int]]

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.shape.numel() * self.own.itemsize

    def copy(self) -> Divided:
        """The same with a copy of the own part on the CPU."""
        return Divided(self.shape, self.own.to("cpu", copy=True), self.ranges)

    def collect(self, to: int, rank: int, group: Any = None) -> Tensor | None:
        """The whole tensor in the process `to`, on the CPU; None in the others. All must call it.

        `rank` is this process's.
        """
        import torch.distributed as dist

        ranges = [one for one in self.ranges if one[1] < one[2]]
        if rank != to:
            if any(source == rank for source, _, _ in ranges):
                dist.send(self.own.cpu(), to, group=group)
            return None
        whole = torch.empty(self.shape.numel(), dtype=self.dtype)
        requests = []
        for source, start, end in ranges:
            if source == rank:
                whole[start:end] = self.own
            else:
                requests.append(dist.irecv(whole[start:end], source, group=group))
        for request in requests:
            request.wait()
        return whole.view(self.shape)
