"""The loss of a large vocabulary, computed in chunks so that its logits never exist all at once.

GPT-2's logits for 4 x 1,024 positions take 0.8 GB in fp32, and their gradient as much again; the
model takes 0.5 GB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import linear

# The number of logits in a chunk: 64 MB in fp32.
MAX_LOGITS = 2**24
# The target of a position that does not count, as in torch.nn.functional.cross_entropy.
MASKED = -100


def next_token_loss(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats of targets `[N]` under the logits `features` @ `weight`.T.

    `features` are `[N, C]`, `weight` is `[V, C]`. Targets that are MASKED do not count; if all are,
    the loss is 0. Small inputs need no chunks. On CPUs
    `torch.nn.functional.linear_cross_entropy` takes 2.6 times as long: docs/benchmarks.md.
    """
    if len(targets) * len(weight) <= MAX_LOGITS:
        logits = linear(features, weight).float()
        total = F.cross_entropy(logits, targets, ignore_index=MASKED, reduction="sum")
        return total / number_of(targets)
    dtype = features.dtype
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    return ChunkedLoss.apply(features, weight, targets, dtype)


def number_of(targets: Tensor) -> Tensor:
    """The number of targets that count; 1 if there are none, so that one can divide by it."""
    return (targets != MASKED).sum().clamp(min=1)


class ChunkedLoss(torch.autograd.Function):
    """Computes a chunk's gradients together with its loss, while the logits are in memory.

    Matrix products are computed in `dtype`, sums in fp32.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor,
                dtype: torch.dtype) -> Tensor:
        chunk_size = max(1, MAX_LOGITS // len(weight))
        cast_weight = weight.to(dtype)
        loss = torch.zeros((), device=features.device)
        needs_gradients = any(ctx.needs_input_grad)
        if needs_gradients:
            features_gradient = torch.empty_like(features, dtype=torch.float32)
            weight_gradient = torch.zeros_like(weight)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            x = features[chunk].to(dtype)
            logits = (x @ cast_weight.mT).float()  # [chunk, V]
            log_normalizers = logits.logsumexp(dim=1, keepdim=True)
            masked = targets[chunk] == MASKED
            at_targets = torch.arange(len(x), device=x.device), targets[chunk].clamp(min=0)
            losses = log_normalizers[:, 0] - logits[at_targets]
            loss += losses.masked_fill(masked, 0).sum()
            if needs_gradients:
                # The gradient of the logits: probabilities less one-hot targets. Where the target
                # is masked, it is 0: without another pass over the logits, by exp(-inf).
                log_normalizers.masked_fill_(masked[:, None], torch.inf)
                logits_gradient = logits.sub_(log_normalizers).exp_()
                logits_gradient[at_targets] -= (~masked).float()
                logits_gradient = logits_gradient.to(dtype)
                features_gradient[chunk] = logits_gradient @ cast_weight
                weight_gradient += logits_gradient.mT @ x
        count = number_of(targets)
        if needs_gradients:
            ctx.save_for_backward(features_gradient, weight_gradient, count)
            ctx.dtype = features.dtype
        return loss / count

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features_gradient, weight_gradient, count = ctx.saved_tensors
        # Dividing in the chunks would make gradients of a large batch too small for fp16.
        scale = loss_gradient / count
        return (features_gradient * scale).to(ctx.dtype), weight_gradient * scale, None, None
