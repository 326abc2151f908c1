"""The loss of a large vocabulary without all logits at once: a chunk of positions after the other.

GPT-2's logits of 4 x 1,024 positions are 0.8 GB in fp32, and as much again for their gradient; the model itself is 0.5 GB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import linear

LOGITS_AT_ONCE = 2**24  # 64 MB in fp32


def next_token_loss(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of targets `[N]` under logits `features` `[N, C]` times `weight` `[V, C]` turned.

    Logits that are few are computed at once. `torch.nn.functional.linear_cross_entropy` does the same as the rest of
    this file; on CPUs it took 2.6 times as long (docs/benchmarks.md).
    """
    if len(targets) * len(weight) <= LOGITS_AT_ONCE:
        return F.cross_entropy(linear(features, weight).float(), targets)
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    return ChunkedLoss.apply(features, weight, targets, dtype)


class ChunkedLoss(torch.autograd.Function):
    """Computes the gradients with the loss, while a chunk's logits are there. Products are of `dtype`, sums of fp32."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
        product_weight = weight.to(dtype)
        loss = torch.zeros((), device=features.device)
        wanted = any(ctx.needs_input_grad)
        if wanted:
            ctx.count = len(targets)
            features_gradient, weight_gradient = torch.empty_like(features, dtype=torch.float32), torch.zeros_like(weight)
        for start in range(0, len(targets), chunk):
            x, aims = features[start : start + chunk].to(dtype), targets[start : start + chunk]
            logits = (x @ product_weight.mT).float()  # [chunk, V]
            normalizers = logits.logsumexp(dim=1, keepdim=True)
            rows = torch.arange(len(aims), device=aims.device)
            loss += (normalizers[:, 0] - logits[rows, aims]).sum()
            if wanted:
                off = logits.sub_(normalizers).exp_()  # the probabilities, less the truth: the gradient by the logits
                off[rows, aims] -= 1
                off = off.to(dtype)
                features_gradient[start : start + chunk] = off @ product_weight
                weight_gradient += off.mT @ x
        if wanted:
            ctx.save_for_backward(features_gradient, weight_gradient)
            ctx.dtype = features.dtype
        return loss / len(targets)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        scale = outer / ctx.count  # here and not before, so that fp16 holds the small gradients of a large batch
        return (features_gradient * scale).to(ctx.dtype), weight_gradient * scale, None, None
