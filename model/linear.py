"""The linear layer, which trains in fp32 on AMD CPUs with AVX-512 by oneDNN instead of MKL.

MKL is slower there: docs/experiments.md has timings. Knows tensors only.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hardware import onednn_beats_mkl


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by the function `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` -> `[..., out]`."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of `x` `[..., in]` and `weight` `[out, in]`, equal up to rounding."""
    if onednn_is_faster(x):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_is_faster(x: Tensor) -> bool:
    """Whether oneDNN is faster: training in fp32 on some CPUs. In bf16 torch uses it anyway."""
    trains_in_fp32 = torch.is_grad_enabled() and x.is_cpu and x.dtype == torch.float32
    if not trains_in_fp32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return onednn_beats_mkl()


class OneDNNLinear(torch.autograd.Function):
    """A linear layer whose output and input gradient are computed by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = onednn_linear(gradient, weight.mT.contiguous(), None)
        rows = gradient.reshape(-1, weight.size(0))
        if ctx.needs_input_grad[1]:
            weight_gradient = rows.mT @ x.reshape(-1, weight.size(1))
        if ctx.needs_input_grad[2]:
            bias_gradient = rows.sum(0)
        return x_gradient, weight_gradient, bias_gradient


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
