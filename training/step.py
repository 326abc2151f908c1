"""A step of training: the loss of a batch, the gradients of a step, the validation loss.

Knows no files and no settings: it is given a model that returns its loss, and batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
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

Batch = tuple[Tensor, Tensor]  # inputs and targets, each `[B, T]`
# The documents of a batch are usually longer on average, in tokens.
LEAST_USUAL_DOCUMENT = 64


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


def accumulate_gradients(model: nn.Module, buckets: GradientBuckets | RowGradients,
                         batches: Batches, boundary: int | None, step: int,
                         scaler: torch.amp.GradScaler, device: Device, seed: int,
                         interrupt: Interrupt) -> Tensor | None:
    """Run forward and backward for each micro-step; return its loss, in nats per token.

    Of several processes, each then has the gradients of the parts that it updates, added over all.
    Each counts by its share of the step's targets, so that the sum is the mean over all of them,
    however they are divided into micro-steps and among processes. The losses `[micro_steps]` stay
    on the device. Returns None if interrupted between two micro-steps.
    """
    # How much each micro-step counts, and the sums of its gradients so far.
    losses = []
    n_targets = batches.n_targets(step)
    all_targets = sum(n_targets)
    gradients = TreeSum(buckets.parameters, batches.micro_steps)
    # The number of this process's first micro-step among those of all processes.
    first = batches.rank * batches.micro_steps
    for micro_step in range(batches.micro_steps):
        # Several processes must agree on an interrupt, which they do once a step.
        if interrupt and batches.world_size == 1:
            return None

        # Forward pass. The mean over the micro-step becomes its part of the mean over the step.
        batch = batches.batch(step, micro_step)
        seed_dropout(seed, step, first + micro_step)
        loss = loss_of(model, batch, device, boundary)
        loss = loss / (all_targets / n_targets[first + micro_step])

        # Backward pass. During the last one, complete gradients are already sent.
        if micro_step == batches.micro_steps - 1:
            buckets.start(gradients.put_total)
        scaler.scale(loss).backward()
        gradients.after_backward(micro_step)
        losses.append(loss.detach().to(device.sum_dtype))
    gradients.finish()
    buckets.finish()
    return torch.stack(losses)


def read_losses(losses: Tensor, norm: Tensor) -> tuple[float, float]:
    """The sum of the losses, in order, and the norm: read from the device at once."""
    *values, norm_value = torch.cat((losses, norm.to(losses.dtype)[None])).tolist()
    return sum(values), norm_value


@torch.inference_mode()
def evaluate(model: nn.Module, validation: Validation, device: Device, boundary: int | None,
             world: World) -> float:
    """The mean loss over the validation windows, in nats per token."""
    model.eval()
    # Each process has every size-th batch.
    turns = math.ceil(validation.n_batches / world.size)
    losses = torch.zeros(turns, dtype=device.sum_dtype, device=device.torch)
    for turn, (inputs, targets, weight) in enumerate(validation):
        loss = loss_of(model, (inputs, targets), device, boundary)
        if weight:
            losses[turn] = loss.to(device.sum_dtype) * weight
    model.train()
    # Row r of the gathered losses is from rank r; batch b was the turn b // size of rank b % size.
    in_order = world.gather(losses).view(world.size, turns).T.flatten()
    return sum(in_order.tolist())


def loss_of(model: nn.Module, batch: Batch, device: Device, boundary: int | None) -> Tensor:
    """The mean loss of a batch, in nats per token.

    With a `boundary`, the token that starts a document, attention does not cross documents. The
    batch is in the CPU's memory.
    """
    options = document_options(batch[0], boundary, device)
    inputs, targets = (ids.to(device.torch, non_blocking=True) for ids in batch)
    with device.autocast():
        return model(inputs, targets, **options)


def document_options(inputs: Tensor, boundary: int | None, device: Device) -> dict[str, Any]:
    """The arguments of `GPT.features` for attention within documents; none without a boundary.

    `inputs` `[B, T]` are in the CPU's memory, where counting documents waits for no other device.
    """
    if boundary is None:
        return {}
    documents = document_numbers(inputs.to(device.torch, non_blocking=True), boundary)
    return {"document_ids": documents, "max_documents": most_documents(inputs, boundary)}


def most_documents(inputs: Tensor, boundary: int) -> int:
    """A bound on the number of documents in `inputs` `[B, T]`.

    It is the same for most batches, since a compiled model is compiled again for another one.
    """
    # Each sequence begins with the rest of a document.
    number = len(inputs) + np.count_nonzero(inputs.numpy() == boundary)
    usual = inputs.numel() // LEAST_USUAL_DOCUMENT
    return max(usual, 2 ** math.ceil(math.log2(number)))


def document_numbers(inputs: Tensor, boundary: int | None) -> Tensor | None:
    """For each input token, the number of its document within the row: `[B, T]`."""
    if boundary is None:
        return None
    return (inputs == boundary).cumsum(dim=1)


def first_loss(model: nn.Module, batch: Batch, device: Device,
               boundary: int | None) -> Callable[[int], Tensor]:
    """A function that returns the loss of the first n sequences of a batch."""
    inputs, targets = batch
    return lambda n: loss_of(model, (inputs[:n], targets[:n]), device, boundary)


def try_micro_step(model: nn.Module, batch: Batch, device: Device, boundary: int | None) -> None:
    """Run forward and backward once, without any effect, so that a failure shows."""
    loss_of(model, batch, device, boundary).backward()
    model.zero_grad(set_to_none=True)


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Make dropout a function of the position in training, not of earlier random numbers."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))
