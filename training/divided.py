"""A tensor that is divided among the processes, as checkpoints save and load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.sharding import number_range


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
