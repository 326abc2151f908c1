"""Products and attention of a decoding step, in C (kernels.c): faster than torch's for few rows.

A step computes little with each number that it reads, so the speed of memory is the limit. Measured in
docs/benchmarks.md. Shapes: B rows, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import compiled

PANEL, NARROW = 64, 16  # outputs whose numbers lie beside each other, as in kernels.c
FP32, BF16, INT8, BF16_KEPT = range(4)  # and what a matrix holds
KINDS = {"fp32": (FP32, torch.float32), "bf16": (BF16, torch.bfloat16), "int8": (INT8, torch.int8)}


@cache
def library() -> ctypes.CDLL | OSError:
    """The compiled kernels, or why there are none."""
    try:
        found = compiled.library(__file__.removesuffix("py") + "c")
    except OSError as error:
        return error
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.product.argtypes = [ctypes.c_int] + [pointer] * 5 + [number] * 3
    found.attend.argtypes = [ctypes.c_int] + [pointer] * 8 + [number] * 9 + [ctypes.c_float]
    return found


def available() -> bool:
    return not isinstance(library(), OSError)


def in_panels(matrix: Tensor, width: int = PANEL) -> Tensor:
    """A matrix `[..., out, in]` in the order of its reading: `[..., out / width, in / n, width, n]`, n numbers to 4 bytes.

    Both sizes are made up with zeros.
    """
    n = 4 // matrix.itemsize
    matrix = F.pad(matrix, (0, -matrix.size(-1) % n, 0, -matrix.size(-2) % width))
    return matrix.unflatten(-1, (-1, n)).unflatten(-3, (-1, width)).transpose(-3, -2).contiguous()


def product(weight: Tensor, bias: Tensor | None, precision: str) -> Callable[[Tensor], Tensor]:
    """Rows `[..., in]` times `weight` `[out, in]`, plus a bias, in fp32. A row gives the same bits alone and among others.

    `precision` is that of the weights: "fp32", "bf16" (rows are rounded too on CPUs with bf16
    instructions), or "int8" (with a scale for each output).
    """
    kind, dtype = KINDS[precision]
    size, inputs = weight.shape
    scales = None
    if kind == INT8:
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (weight / scales[:, None]).round()
    held = in_panels(weight.to(dtype))  # [out / PANEL, in / n, PANEL, n]
    width = held.size(1) * held.size(3)

    def multiply(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        x = F.pad(x, (0, width - inputs)) if width > inputs else x.contiguous()
        y = torch.empty(*x.shape[:-1], size)
        library().product(kind, held.data_ptr(), x.data_ptr(), y.data_ptr(), pointer(scales), pointer(bias),
                          y.numel() // size, width, size)
        return y
    return multiply


def values_width(head_width: int) -> int:
    """How wide the panels of values are: narrow where wide ones would be filled with zeros."""
    return NARROW if head_width % PANEL else PANEL


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
    """What the heads take `[B, H, 1, D]` for `q` of that shape, once `k` and `v` `[B, G, 1, D]` have joined the cache.

    It holds `lengths` `[B]` positions so far, as `in_panels` has them: `keys` are B x G matrices `[positions, D]`, `values`
    `[D, positions]`. `scores` `[B, H, positions]` is memory to work in.
    """
    (B, H, _, D), G = q.shape, k.size(1)
    q, k, v = (x.float().flatten(1) for x in (q, k, v))
    y = torch.empty(B, H, 1, D)
    kind = FP32 if keys.dtype == torch.float32 else BF16_KEPT
    library().attend(kind, keys.data_ptr(), values.data_ptr(), scores.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
                     y.data_ptr(), lengths.data_ptr(), B, G, H // G, D, scores.size(2), values.size(4), q.stride(0),
                     k.stride(0), v.stride(0), 1 / math.sqrt(D))
    return y


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
