"""Which part of the parameters each process updates, and keeps the optimizer state of.

Muon needs whole matrices; AdamW treats each number alone, so a slice is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
    # All ranks have equally many, except the last ones, which may have none.
    most = math.ceil(n_rows / size)
    return min(rank * most, n_rows), min((rank + 1) * most, n_rows)


def number_range(shape: torch.Size, rank: int, size: int) -> tuple[int, int]:
    """As `row_range`, for the numbers in these rows."""
    first, last = row_range(shape[0], rank, size)
    width = shape[1:].numel()
    return first * width, last * width


@dataclass(frozen=True, eq=False)
class Divided:
    """A tensor of which each process has a part, or none."""

    shape: torch.Size
    own: Tensor  # this process's numbers
    # The rank, start and end of each part. Together they cover the tensor once.
    ranges: list[tuple[int, int, int]]

    @classmethod
    def by_rows(cls, weights: Tensor, size: int) -> Divided:
        """A DTensor of FSDP2."""
        ranges = [(rank, *number_range(weights.shape, rank, size)) for rank in range(size)]
        return cls(weights.shape, weights.detach().to_local(), ranges)

    @classmethod
    def of_one(cls, tensor: Tensor, owner: int, rank: int) -> Divided:
        """A tensor that all processes have, as the `owner`'s. `rank` is this process's."""
        own = tensor.detach() if rank == owner else tensor.new_empty(0)
        return cls(tensor.shape, own, [(owner, 0, tensor.numel())])

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

    @torch.no_grad()
    def load(self, whole: Tensor, rank: int) -> None:
        """Copy this process's numbers from a whole tensor. `rank` is this process's."""
        for source, start, end in self.ranges:
            if source == rank:
                self.own.copy_(whole.reshape(-1)[start:end].view(self.own.shape))

    def collect(self, to: int, rank: int, group: Any = None) -> Tensor | None:
        """The whole tensor in the process `to`, on the CPU; None in the others. All must call it.

        `rank` is this process's.
        """
        own = self.own.reshape(-1)
        ranges = [one for one in self.ranges if one[1] < one[2]]
        # Send the own part, if there is one.
        if rank != to:
            if any(source == rank for source, _, _ in ranges):
                dist.send(own.cpu(), to, group=group)
            return None
        # Copy the own part, and receive those of the others at the same time.
        whole = torch.empty(self.shape.numel(), dtype=self.dtype)
        requests = []
        for source, start, end in ranges:
            if source == rank:
                whole[start:end] = own
            else:
                requests.append(dist.irecv(whole[start:end], source, group=group))
        for request in requests:
            request.wait()
        return whole.view(self.shape)
