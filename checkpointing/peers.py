"""The processes of a run that save a checkpoint together, tensor by tensor.

They talk in a group of their own, so that saving can continue in a thread beside training. Knows
no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from training.distributed import TIMEOUT, World
from training.sharding import Divided

T = TypeVar("T")


class Peers:
    """The processes of `world`. All of them must call the same methods in the same order.

    With one process, nothing is sent.
    """

    def __init__(self, world: World | None = None) -> None:
        world = world or World({})
        self.rank, self.size, self.is_first = world.rank, world.size, world.is_first
        self.group: Any = None
        if self.size > 1:
            # All have arrived here: a new group would not notice a process that has ended.
            world.agree(0.0, False)
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def tell(self, value: T | None = None) -> T:
        """The first process's value, in all processes."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the first one; an empty list in the others."""
        if self.size == 1:
            return [value]
        everyone = [None] * self.size if self.is_first else None
        dist.gather_object(value, everyone, dst=0, group=self.group)
        return everyone or []

    def own_share(self, tensors: Mapping[str, Tensor | Divided], writers: int) -> list[str]:
        """The names of the tensors that this process writes, if `writers` processes do."""
        return in_rounds(tensors, writers)[self.rank :: writers] if self.rank < writers else []

    def collect(self, tensors: Mapping[str, Tensor | Divided], writers: int) -> Iterator[Tensor]:
        """Yield the tensors of `own_share`, whole.

        Each process has one whole tensor at a time. All must exhaust the iterator.
        """
        names = in_rounds(tensors, writers)
        for first in range(0, len(names), writers):
            # First all tensors of a round are sent, then they are written at the same time.
            own = None
            for writer, name in enumerate(names[first : first + writers]):
                tensor = tensors[name]
                if isinstance(tensor, Divided):
                    tensor = tensor.collect(writer, self.rank, self.group)
                if writer == self.rank:
                    own = tensor
            if own is not None:
                yield own


def in_rounds(tensors: Mapping[str, Tensor | Divided], writers: int) -> list[str]:
    """The names in the order in which `writers` processes take one each: of similar sizes."""
    if writers == 1:
        return list(tensors)
    return sorted(tensors, key=lambda name: -tensors[name].nbytes)
