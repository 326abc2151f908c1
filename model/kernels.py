"""What decoding does with every weight and every key, in C (kernels.c): as fast as memory is read, as torch's do not.

With one new position a row a step does few operations for each number it reads: docs/benchmarks.md has what was measured.
Shapes: B rows, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import compiled

PANEL = 64  # outputs whose numbers lie beside each other
FP32, BF16, INT8, BF16_KEPT = range(4)  # what a matrix holds, in kernels.c
KINDS = {"fp32": (FP32, torch.float32), "bf16": (BF16, torch.bfloat16), "int8": (INT8, torch.int8)}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be made."""
    try:
        found = compiled.library(Path(__file__).with_suffix(".c"))
    except OSError:
        return None
    found.product.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3
    found.attend.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 8 + [ctypes.c_long] * 8 + [ctypes.c_float]
    return found


def in_panels(matrix: Tensor, width: int = PANEL) -> Tensor:
    """A matrix `[..., out, in]` in the order of its reading: `[..., out / width, in / n, width, n]`, n numbers to 4 bytes.

    Both sizes are made up with zeros.
    """
    n = 4 // matrix.itemsize
    matrix = F.pad(matrix, (0, -matrix.size(-1) % n, 0, -matrix.size(-2) % width))
    return matrix.unflatten(-1, (-1, n)).unflatten(-3, (-1, width)).transpose(-3, -2).contiguous()


def product(weight: Tensor, bias: Tensor | None, precision: str) -> Callable[[Tensor], Tensor]:
    """The product of rows `[..., in]` with `weight` `[out, in]`, in fp32, plus a bias; a row's is the same in every company.

    `precision` is that of the weights: "fp32", "bf16" (rows are rounded too), or "int8" (a scale for each output).
    """
    call, (kind, dtype), (size, inputs), scales = library().product, KINDS[precision], weight.shape, None
    if precision == "int8":
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (weight / scales[:, None]).round()
    held = in_panels(weight.to(dtype))
    steps, missing = held.size(1), held.size(1) * held.size(3) - inputs
    taken = torch.bfloat16 if kind == BF16 else torch.float32

    def multiply(x: Tensor) -> Tensor:
        x = x.to(taken)
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        y = torch.empty(*x.shape[:-1], size)
        call(kind, held.data_ptr(), x.data_ptr(), y.data_ptr(), pointer(scales), pointer(bias), y.numel() // size, steps, size)
        return y
    return multiply


def values_width(head_width: int) -> int:
    """How wide the panels of values are: narrow where wide ones would hold much of nothing."""
    return 16 if head_width % PANEL else PANEL


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
    """What the heads take `[B, H, 1, D]` for `q` of that shape, when `k` and `v` `[B, G, 1, D]` have joined the cache.

    That is `keys` `[B, G, ...]` and `values` `[B, G, ...]`, matrices `[positions, D]` and `[D, positions]` as `in_panels` has
    them, with `lengths` `[B]` positions so far. `scores` `[B, H, positions]` is memory to work in.
    """
    (B, H, _, D), G = q.shape, k.size(1)
    q, k, v = q.flatten(1), k.flatten(1), v.flatten(1)
    y = torch.empty(B, H, 1, D)
    kind = FP32 if keys.dtype == torch.float32 else BF16_KEPT
    library().attend(
         kind, keys.data_ptr(), values.data_ptr(), scores.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(),
         lengths.data_ptr(), B, G, H // G, D, scores.size(2), q.stride(0), k.stride(0), v.stride(0), 1 / math.sqrt(D))
    return y


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
