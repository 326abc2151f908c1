"""A copy of a model whose weights are laid out to be read once a token: what makes decoding fast.

With one new position a row a step does few operations for each weight: it is as fast as memory is read. How fast a product
reads its weights depends on their layout; docs/benchmarks.md has what was measured. The copy runs the model's own code.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT

KNOWN = {"block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "dropout", "bias", "position", "norm",
         "qk_norm", "activation", "zero_init", "tie_head", "embedding_norm", "ngrams", "ngram_rows"}
FP16_MOST = 65504.0
PIECE = 192  # numbers that stay in registers while rows are summed
Product = Callable[[Tensor], Tensor]


def can_copy(model: GPT) -> bool:
    """Whether `decoding_copy` knows all flags of the model, and its products fit it; else the model itself must decode."""
    return model.wte.weight.dtype == torch.float32 and all(
        getattr(model.config, field.name) == field.default for field in fields(model.config) if field.name not in KNOWN)


def has_kernels(model: GPT) -> bool:
    """Whether there are kernels for `packed` copies where the model is."""
    return (model.wte.weight.is_cpu and torch.backends.mkldnn.is_available()
            and torch.backends.quantized.engine in ("x86", "fbgemm")
            and hasattr(torch.ops.quantized, "linear_prepack_fp16") and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """The plain product of rows `[..., in]` with `weight` `[out, in]`, which is cast once."""
    weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias).float()


def packed(weight: Tensor, bias: Tensor | None, rows: int, precision: str) -> Product:
    """The fastest way that was found on CPUs to multiply a few rows `[..., in]` by `weight` `[out, in]`."""
    if precision == "int8" and rows == 1:
        return by_sums_of_bytes(weight, bias)
    if precision == "int8" and rows < 100:
        scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        integers, zeros = (weight / scales).round().to(torch.int8), torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings(action="ignore"):  # that some day there will be another way
            quantized = torch._make_per_channel_quantized_tensor(integers, scales[:, 0], zeros, 0)
        held = torch.ops.quantized.linear_prepack(quantized, bias)

        def by_integers(x: Tensor) -> Tensor:
            try:
                return torch.ops.quantized.linear_dynamic(x, held, True)
            except RuntimeError:  # what is not finite has no scale
                return x.new_full((*x.shape[:-1], len(weight)), torch.nan)
        return by_integers
    if precision == "bf16" and rows <= 10 and weight.abs().max() <= FP16_MOST:
        # As small as bf16, with more digits, and read faster.
        held = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, held)
    pieces = next((n for n in range(8, 65) if weight.size(0) % n == 0), 0)
    if precision == "fp32" and rows <= 4 and pieces:
        parts = weight.view(pieces, -1, weight.size(1))

        def by_pieces(x: Tensor) -> Tensor:
            y = torch.bmm(parts, x.flatten(0, -2).t().expand(pieces, -1, -1))  # [pieces, out / pieces, rows]
            y = y.flatten(0, 1).t().view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return by_pieces
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    held = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), min(rows, 2**16))  # it cannot count to 2**31
    bias = bias if bias is None else bias.to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), held, bias, "none", [], "").float()


def by_sums_of_bytes(weight: Tensor, bias: Tensor | None) -> Product:
    """A product in 8 bits by the kernel that sums rows of a table, each times a number: with one row it is the fastest.

    The tables are pieces of the turned weights, so narrow that their sums stay in the processor's registers. Each of their
    rows has a scale and an offset of its own; numbers and sums are fp32.
    """
    size, inputs = weight.shape
    pieces = -(-size // PIECE)
    width = -(-size // pieces)
    tables = F.pad(weight, (0, 0, 0, pieces * width - size)).view(pieces, width, inputs).transpose(1, 2)
    held = torch.ops.quantized.embedding_bag_byte_prepack(tables.reshape(pieces * inputs, width))
    numbers = torch.empty(pieces, inputs)
    all_rows, starts = torch.arange(len(held), dtype=torch.int32), torch.arange(pieces, dtype=torch.int32) * inputs
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets

    def by_sums(x: Tensor) -> Tensor:
        if x.numel() > inputs:
            return torch.stack([by_sums(row) for row in x.view(-1, inputs)]).view(*x.shape[:-1], size)
        numbers.copy_(x.view(1, inputs))
        y = sums(held, all_rows, starts, per_sample_weights=numbers.view(-1)).view(-1)[:size]
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], size)
    return by_sums


@torch.no_grad()
def decoding_copy(model: GPT, lay_out: Callable[[Tensor, Tensor | None], Product]) -> GPT:
    """A model like `model` that shares its tensors, but whose products are what `lay_out` makes of weights and biases."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    twin.head = lay_out(twin.head_weight.detach(), None)
    if not model.config.tie_head:
        del twin.lm_head
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                bias = child.bias if child.bias is None else child.bias.detach()
                delattr(module, name)  # a module's name takes nothing but modules
                setattr(module, name, lay_out(child.weight.detach(), bias))
    return twin
