"""A step of training: the loss of a batch, the gradients of a step, the validation loss.

Knows no files and no settings: it is given a model that returns its loss, and batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from training.device import Device
from training.interrupt import Interrupt

Batch = tuple[Tensor, Tensor]  # inputs and targets, each `[B, T]`


class Batches(Protocol):
    """This process's batches of each step. A process takes consecutive micro-steps of the step."""

    rank: int
    micro_steps: int  # of a step, in this process

    def batch(self, step: int, micro_step: int) -> Batch: ...


def accumulate_gradients(model: nn.Module, batches: Batches, boundary: int | None, step: int,
                         scaler: torch.amp.GradScaler, device: Device, seed: int,
                         interrupt: Interrupt) -> Tensor | None:
    """Run forward and backward for each micro-step; return their mean loss, in nats per token.

    The loss stays on the device. Returns None if interrupted between two micro-steps.
    """
    loss = torch.zeros((), dtype=device.sum_dtype, device=device.torch)
    first = batches.rank * batches.micro_steps
    for micro_step in range(batches.micro_steps):
        if interrupt:
            return None
        batch = batches.batch(step, micro_step)
        # By its number among the micro-steps of all processes.
        seed_dropout(seed, step, first + micro_step)
        micro_loss = loss_of(model, batch, device, boundary) / batches.micro_steps
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    return loss


@torch.inference_mode()
def evaluate(model: nn.Module, validation: Iterable[tuple[Tensor, Tensor, float]], device: Device,
             boundary: int | None = None) -> float:
    """The mean loss over the validation windows, in nats per token."""
    model.eval()
    total = torch.zeros((), dtype=device.sum_dtype, device=device.torch)
    for inputs, targets, weight in validation:
        loss = loss_of(model, (inputs, targets), device, boundary)
        total += loss.to(device.sum_dtype) * weight
    model.train()
    return total.item()


def loss_of(model: nn.Module, batch: Batch, device: Device, boundary: int | None) -> Tensor:
    """The mean loss of a batch, in nats per token.

    With a `boundary`, the token that starts a document, attention does not cross documents.
    """
    inputs, targets = (ids.to(device.torch) for ids in batch)
    with device.autocast():
        return model(inputs, targets, document_ids=document_numbers(inputs, boundary))


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
    """Make dropout a function of the position in training, not of what was drawn before."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))
