"""The loss of a large vocabulary, computed in chunks so that its logits never exist all at once.

GPT-2's logits for 4 x 1,024 positions take 0.8 GB in fp32, and their gradient as much again; the
model takes 0.5 GB.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import linear

# The number of logits in a chunk: 64 MB in fp32.
MAX_LOGITS = 2**24
# Inputs with fewer logits need no chunks: the plain loss is as fast.
MIN_LOGITS = 2**23
# The target of a position that does not count, as in torch.nn.functional.cross_entropy.
MASKED = -100
# GPUs need larger products. A logit takes about 8 bytes while its chunk is computed, so a chunk
# takes at most a sixteenth of the memory.
MAX_LOGITS_ON_GPUS = 2**29
LEAST_GPU_BYTES_PER_LOGIT = 128
# Numbers in a row of a matrix, or rows in a chunk, that fill a GPU's tensor cores.
TENSOR_CORE_MULTIPLE = 64


@dataclass(frozen=True)
class LossOptions:
    """How a device computes the loss. The results are equal up to rounding."""

    max_logits: int  # in a chunk
    # The matrix products have a multiple of this number of logits in a row, and rows in a chunk.
    multiple: int = 1
    # Compile the operations on the logits, which are then read twice instead of ten times.
    fused: bool = False


def loss_options(device: torch.device, fused: bool = False,
                 gpu_bytes: float = 0) -> LossOptions | None:
    """The fastest options for a device, or for a GPU with `gpu_bytes` of memory; None on CPUs."""
    if device.type == "cuda" and not gpu_bytes:
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory
    if not gpu_bytes:
        return None
    # A power of two: cards of one kind differ in the last megabytes.
    fitting = 2 ** int(math.log2(gpu_bytes / LEAST_GPU_BYTES_PER_LOGIT))
    return LossOptions(min(MAX_LOGITS_ON_GPUS, fitting), TENSOR_CORE_MULTIPLE, fused)


def next_token_loss(features: Tensor, weight: Tensor, targets: Tensor,
                    options: LossOptions | None = None) -> Tensor:
    """The mean cross-entropy in nats of targets `[N]` under the logits `features` @ `weight`.T.

    `features` are `[N, C]`, `weight` is `[V, C]`. Targets that are MASKED do not count; if all are,
    the loss is 0. On CPUs `torch.nn.functional.linear_cross_entropy` takes 2.6 times as long:
    docs/experiments.md.
    """
    if len(targets) * len(weight) <= MIN_LOGITS:
        logits = linear(features, weight).float()
        total = F.cross_entropy(logits, targets, ignore_index=MASKED, reduction="sum")
        return total / number_of(targets)
    dtype = features.dtype
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    return ChunkedLoss.apply(features, weight, targets, dtype, options or LossOptions(MAX_LOGITS))


def number_of(targets: Tensor) -> Tensor:
    """The number of targets that count; 1 if there are none, so that one can divide by it."""
    return (targets != MASKED).sum().clamp(min=1)


class ChunkedLoss(torch.autograd.Function):
    """Computes a chunk's gradients together with its loss, while the logits are in memory.

    Matrix products are computed in `dtype`, sums in fp32.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype,
                options: LossOptions) -> Tensor:
        # Pad the vocabulary to a multiple that is fast on the device.
        rows = chunk_size(len(targets), len(weight), options)
        vocab_size = len(weight)
        padded_weight = weight.to(dtype)
        if vocab_size % options.multiple:
            padded_weight = F.pad(padded_weight, (0, 0, 0, -vocab_size % options.multiple))

        # The sums over the chunks.
        loss = torch.zeros((), device=features.device)
        needs_gradients = any(ctx.needs_input_grad)
        if needs_gradients:
            features_gradient = torch.empty_like(features, dtype=torch.float32)
            weight_gradient = torch.zeros_like(weight)

        # The operations on the logits of a chunk, compiled where that is asked for.
        on_logits = loss_and_gradient
        if options.fused and torch.compiler.is_compiling():
            # It is compiled together with the model.
            on_logits = fusible_loss_and_gradient
        elif options.fused and needs_gradients:
            on_logits = compiled_loss_and_gradient()

        # Each chunk: logits, their loss, and at once the gradients by features and weight.
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            x = features[chunk].to(dtype)
            logits = x @ padded_weight.mT  # [chunk, padded V]
            # The padding gets the probability 0.
            logits[:, vocab_size:].fill_(-torch.inf)
            if not needs_gradients:
                loss += summed_loss(logits, targets[chunk])
                continue
            chunk_loss, logits_gradient = on_logits(logits, targets[chunk])
            loss += chunk_loss
            # The backward pass of logits = x @ weight.T.
            features_gradient[chunk] = logits_gradient @ padded_weight
            if weight_gradient.dtype == dtype and len(padded_weight) == vocab_size:
                weight_gradient.addmm_(logits_gradient.mT, x)
            else:
                weight_gradient += (logits_gradient.mT @ x)[:vocab_size]

        # The mean over the targets that count.
        count = number_of(targets)
        if needs_gradients:
            ctx.save_for_backward(features_gradient, weight_gradient, count)
            ctx.dtype = features.dtype
        return loss / count

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        features_gradient, weight_gradient, count = ctx.saved_tensors
        # Dividing in the chunks would make gradients of a large batch too small for fp16.
        scale = loss_gradient / count
        features_gradient = (features_gradient * scale).to(ctx.dtype)
        return features_gradient, weight_gradient * scale, None, None, None


def chunk_size(n_targets: int, vocab_size: int, options: LossOptions) -> int:
    """The number of rows in a chunk."""
    rows = max(1, options.max_logits // vocab_size)
    if options.multiple == 1:
        return rows
    # Chunks of equal size, so that the last product is not a small one.
    rows = math.ceil(n_targets / math.ceil(n_targets / rows))
    return math.ceil(rows / options.multiple) * options.multiple


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses of logits `[N, V]`."""
    log_probabilities = logits.log_softmax(dim=1, dtype=torch.float32)  # [N, V]
    return F.nll_loss(log_probabilities, targets, ignore_index=MASKED, reduction="sum")


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses of a chunk, and its gradient by the logits, in their dtype.

    The gradient is the probabilities less one-hot targets; 0 where the target is masked. Changes
    the logits of masked targets.
    """
    # A masked target becomes one that is certain: its loss is 0, and so is its gradient.
    rows = torch.arange(len(targets), device=targets.device)
    columns = targets.clamp(min=0)
    target_logits = logits[rows, columns]
    target_logits = target_logits.masked_fill(targets == MASKED, torch.finfo(logits.dtype).max)
    logits[rows, columns] = target_logits

    # The probability of a target can be too small for fp32, but not the largest one of its row.
    probabilities = logits.softmax(dim=1, dtype=torch.float32)
    differences = logits.amax(dim=1).float() - target_logits.float()
    loss = (differences - probabilities.amax(dim=1).log()).sum()
    probabilities[rows, columns] -= 1
    return loss, probabilities.to(logits.dtype)


def fusible_loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`loss_and_gradient` as a compiler fuses it: it does not write the logits in fp32."""
    dtype = logits.dtype
    masked = targets == MASKED
    # No column is MASKED.
    is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    # The loss of a row is its normalizer less the logit of its target, both [N].
    logits = logits.float()
    log_normalizers = logits.logsumexp(dim=1)
    target_logits = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    loss = (log_normalizers - target_logits).masked_fill(masked, 0).sum()
    # The probabilities of a masked row are 0 with an infinite normalizer.
    log_normalizers = log_normalizers.masked_fill(masked, torch.inf)
    gradient = (logits - log_normalizers[:, None]).exp() - is_target.float()
    return loss, gradient.to(dtype)


@cache
def compiled_loss_and_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(fusible_loss_and_gradient, dynamic=False)
