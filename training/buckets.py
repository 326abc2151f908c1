"""Sends gradients to the processes that update them, while the backward pass computes the rest.

Each process needs the sum over all processes of the gradients of its own parts only (as in ZeRO
stage 2, arXiv:1910.02054). Gradients are sent in buckets, as in DistributedDataParallel
(arXiv:2006.15704): those of the last layers are complete first, so they are sent first.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from training.distributed import World
from training.sharding import Part
from training.tree_sum import add_in_tree

# The numbers in a bucket, unless a single parameter has more: 32 MiB in fp32.
BUCKET_NUMBERS = 2**23
# Buckets that are sent at the same time. More would take more memory.
MOST_IN_FLIGHT = 2


class Bucket:
    """Parameters whose gradients are sent together, and the parts of them that each rank owns."""

    def __init__(self, world: World, parameters: list[Tensor], parts: list[list[Part]]) -> None:
        self.world = world
        self.parameters = parameters
        members = set(parameters)
        self.parts = [[part for part in some if part.weights in members] for some in parts]
        self.work: dist.Work | None = None

    def send(self) -> None:
        """Start to send the gradients to the owners of their parts, and drop them."""
        # A gradient that is missing here is missing in all processes.
        existing = [[part for part in some if part.weights.grad is not None] for some in self.parts]
        gradients = [part.of(part.weights.grad).reshape(-1) for some in existing for part in some]
        # The numbers for each rank, in the order in which the gradients are concatenated.
        sizes = [sum(part.tensor.numel() for part in some) for some in existing]
        self.own = existing[self.world.rank]
        for weights in self.parameters:
            weights.grad = None
        if gradients:
            self.received, self.work = self.world.exchange(torch.cat(gradients), sizes)

    def receive(self) -> None:
        """Add the gradients of the own parts from all processes, in a fixed binary tree.

        No arithmetic is left to the communication library, so the result does not depend on how it
        routes messages.
        """
        if self.work is None:
            return
        self.work.wait()
        # One chunk from each process. The sum shares the memory of all chunks, so it is copied.
        total = add_in_tree(list(self.received.chunk(self.world.size))).clone()
        self.received = self.work = None

        # Divide the sum into the gradients of the own parts.
        sums = total.split([part.tensor.numel() for part in self.own])
        for part, gradient in zip(self.own, sums, strict=True):
            part.tensor.grad = gradient.view_as(part.tensor)


class GradientBuckets:
    """The gradients of a step, added over all processes.

    `parameters` are in the order in which the forward pass uses them, and `parts[rank]` are what a
    rank updates. With one process, nothing is sent.
    """

    def __init__(self, world: World, parameters: list[Tensor], parts: list[list[Part]],
                 bucket_numbers: int = BUCKET_NUMBERS) -> None:
        self.parameters = parameters
        self.buckets: list[Bucket] = []
        if world.size > 1:
            self.buckets = [Bucket(world, members, parts)
                            for members in fill(parameters, bucket_numbers)]
        # The number of each parameter's bucket.
        self.bucket_of = {weights: number for number, bucket in enumerate(self.buckets)
                          for weights in bucket.parameters}
        self.hooks: list[RemovableHandle] = []

    def start(self, put_total: Callable[[int], None]) -> None:
        """Before a step's last backward pass: send each bucket as soon as it is complete.

        `put_total(index)` puts the sum over the step's micro-steps into a parameter's gradient.
        """
        if not self.buckets:
            return
        self.incomplete = [len(bucket.parameters) for bucket in self.buckets]
        self.sent = self.received = 0
        for index, weights in enumerate(self.parameters):
            hook = partial(self.complete, put_total, index)
            self.hooks.append(weights.register_post_accumulate_grad_hook(hook))

    def complete(self, put_total: Callable[[int], None], index: int, weights: Tensor) -> None:
        """Called when a parameter has its last gradient."""
        put_total(index)
        self.incomplete[self.bucket_of[weights]] -= 1
        # All processes must send the buckets in the same order.
        while self.sent < len(self.buckets) and self.incomplete[self.sent] == 0:
            self.send_next()

    @torch.no_grad()
    def send_next(self) -> None:
        if self.sent - self.received == MOST_IN_FLIGHT:
            self.receive_next()
        self.buckets[self.sent].send()
        self.sent += 1

    @torch.no_grad()
    def receive_next(self) -> None:
        self.buckets[self.received].receive()
        self.received += 1

    def finish(self) -> None:
        """After the last backward pass: put the sums of all processes into the own parts' `.grad`.

        Does not wait for the device.
        """
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if not self.buckets:
            return
        # Buckets that are still incomplete have parameters without a gradient.
        while self.sent < len(self.buckets):
            self.send_next()
        while self.received < len(self.buckets):
            self.receive_next()


def fill(parameters: list[Tensor], numbers: int) -> list[list[Tensor]]:
    """Parameters in buckets of at most `numbers` numbers, the last parameter first.

    A parameter with more numbers has a bucket of its own.
    """
    buckets: list[list[Tensor]] = []
    # The first parameter opens a bucket.
    size = numbers
    for weights in reversed(parameters):
        if size + weights.numel() > numbers:
            buckets.append([])
            size = 0
        buckets[-1].append(weights)
        size += weights.numel()
    return buckets
