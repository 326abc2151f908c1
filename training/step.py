"""A step of training: the loss of a batch, the gradients of a step, the validation loss.

Knows no files and no settings: it is given a model that returns its loss, and batches.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training.buckets import GradientBuckets
from training.device import Device
from training.distributed import World
from training.fsdp import RowGradients
from training.interrupt import Interrupt
from training.tree_sum import TreeSum

# The documents of a batch are usually longer on average, in tokens.
LEAST_USUAL_DOCUMENT = 64
Batch = tuple[Tensor, Tensor]  # inputs and targets, each `[B, T]`


class Batches(Protocol):
    """This process's batches of each step. A process takes consecutive micro-steps of the step."""

    rank: int
    world_size: int
    micro_steps: int  # of a step, in this process

    def batch(self, step: int, micro_step: int) -> Batch: ...

    def n_targets(self, step: int) -> list[int]:
        """The number of targets that count in each micro-step, of all processes."""


class Validation(Protocol):
    """This process's validation batches, with their weights in the mean."""

    n_batches: int  # of all processes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]: ...


@dataclass(frozen=True)
class BatchLoss:
    """A model's mean loss on a batch, in nats per token, in the precision of a device.

    With a `boundary`, the token that starts a document, attention does not cross documents.
    """

    model: nn.Module
    device: Device
    boundary: int | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch in the CPU's memory."""
        options = document_options(batch[0], self.boundary, self.device.torch)
        inputs, targets = (ids.to(self.device.torch, non_blocking=True) for ids in batch)
        with self.device.autocast():
            return self.model(inputs, targets, **options)

    def try_backward(self, batch: Batch) -> None:
        """Run forward and backward without any effect, so that a failure shows."""
        self(batch).backward()
        self.model.zero_grad(set_to_none=True)


def accumulate_gradients(loss_fn: BatchLoss, batches: Batches,
                         buckets: GradientBuckets | RowGradients, scaler: torch.amp.GradScaler,
                         step: int, seed: int, interrupt: Interrupt) -> Tensor | None:
    """Run forward and backward for each micro-step; return its loss, in nats per token.

    Of several processes, each then has the gradients of the parts that it updates, added over all.
    Each counts by its share of the step's targets, so that the sum is the mean over all of them,
    however they are divided into micro-steps and among processes. The losses `[micro_steps]` stay
    on the device. Returns None if interrupted between two micro-steps.
    """
    # How much each micro-step counts, and the sums of its gradients so far.
    n_targets = batches.n_targets(step)
    all_targets = sum(n_targets)
    losses = []
    gradients = TreeSum(buckets.parameters, batches.micro_steps)
    # The number of this process's first micro-step among those of all processes.
    first = batches.rank * batches.micro_steps
    for micro_step in range(batches.micro_steps):
        # Several processes must agree on an interrupt, which they do once a step.
        if interrupt and batches.world_size == 1:
            return None

        # Forward pass. The mean over the micro-step becomes its part of the mean over the step.
        seed_dropout(seed, step, first + micro_step)
        batch = batches.batch(step, micro_step)
        loss = loss_fn(batch) / (all_targets / n_targets[first + micro_step])

        # Backward pass. During the last one, complete gradients are already sent.
        if micro_step == batches.micro_steps - 1:
            buckets.start(gradients.put_total)
        scaler.scale(loss).backward()
        gradients.after_backward(micro_step)
        # Kept on the device: reading it would wait for the backward pass.
        losses.append(loss.detach().to(loss_fn.device.sum_dtype))

    # Put the sums into `.grad`: of the micro-steps, and then of the processes.
    gradients.finish()
    buckets.finish()
    return torch.stack(losses)


def read_losses(losses: Tensor, norm: Tensor) -> tuple[float, float]:
    """The sum of the losses, in order, and the norm: read from the device at once."""
    # In one transfer: each one would wait for the device.
    *values, norm_value = torch.cat((losses, norm.to(losses.dtype)[None])).tolist()
    return sum(values), norm_value


@torch.inference_mode()
def evaluate(loss_fn: BatchLoss, validation: Validation, world: World) -> float:
    """The mean loss over the validation windows, in nats per token."""
    loss_fn.model.eval()
    # Each process has every size-th batch.
    turns = math.ceil(validation.n_batches / world.size)
    # Kept on the device until all are there: [turns].
    dtype = loss_fn.device.sum_dtype
    losses = torch.zeros(turns, dtype=dtype, device=loss_fn.device.torch)
    for turn, (inputs, targets, weight) in enumerate(validation):
        loss = loss_fn((inputs, targets))
        if weight:
            losses[turn] = loss.to(dtype) * weight
    loss_fn.model.train()

    # Row r of the gathered losses is from rank r; batch b was the turn b // size of rank b % size.
    in_order = world.gather(losses).view(world.size, turns).T.flatten()
    return sum(in_order.tolist())


def first_loss(loss_fn: BatchLoss, batch: Batch) -> Callable[[int], Tensor]:
    """A function that returns the loss of the first n sequences of a batch."""
    inputs, targets = batch
    return lambda n: loss_fn((inputs[:n], targets[:n]))


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Make dropout a function of the position in training, not of earlier random numbers."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))


def document_options(inputs: Tensor, boundary: int | None, device: torch.device) -> dict[str, Any]:
    """The arguments of `GPT.features` for attention within documents; none without a boundary.

    A document starts at each token whose id is the `boundary`.
    `inputs` `[B, T]` are in the CPU's memory, where counting documents waits for no other device.
    """
    if boundary is None:
        return {}
    # For each token, the number of its document within the row: [B, T].
    documents = (inputs.to(device, non_blocking=True) == boundary).cumsum(dim=1)
    return {"document_ids": documents, "max_documents": most_documents(inputs, boundary)}


def most_documents(inputs: Tensor, boundary: int) -> int:
    """A bound on the number of documents in `inputs` `[B, T]`.

    It is the same for most batches, since a compiled model is compiled again for another one.
    """
    # Each sequence begins with the rest of a document.
    number = len(inputs) + np.count_nonzero(inputs.numpy() == boundary)
    usual = inputs.numel() // LEAST_USUAL_DOCUMENT
    return max(usual, 2 ** math.ceil(math.log2(number)))
