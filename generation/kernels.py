"""Matrix products and attention for decoding on a CPU, in C (kernels.c), compiled on first use.

A decoding step computes little with each weight that it reads, so memory bandwidth is the limit:
docs/benchmarks.md has measurements. Shapes: B rows, H heads, G key-value heads, D head width.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.c_library import load_library

SOURCE = Path(__file__).with_suffix(".c")

# As in kernels.c: the number of outputs that are stored side by side, and the types of matrices.
PANEL, NARROW = 64, 16
FP32, BF16, INT8, BF16_CACHE = range(4)
TYPES = {"fp32": (FP32, torch.float32), "bf16": (BF16, torch.bfloat16), "int8": (INT8, torch.int8)}


@cache
def library() -> ctypes.CDLL | OSError:
    """The compiled kernels, or the error if they cannot be compiled."""
    try:
        found = load_library(SOURCE)
    except OSError as error:
        return error
    # Without these, ctypes would pass pointers as 32-bit integers.
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.product.argtypes = [ctypes.c_int] + [pointer] * 5 + [number] * 3
    found.attend.argtypes = [ctypes.c_int] + [pointer] * 8 + [number] * 9 + [ctypes.c_float]
    return found


def available() -> bool:
    return not isinstance(library(), OSError)


def in_panels(matrix: Tensor, width: int = PANEL) -> Tensor:
    """A matrix `[..., out, in]` in the order in which the kernels read it.

    `[..., out / width, in / n, width, n]`, with n numbers in 4 bytes; both sizes are padded with
    zeros.
    """
    # Zeros up to whole panels, and whole groups of n numbers.
    n = 4 // matrix.itemsize
    padding = (0, -matrix.size(-1) % n, 0, -matrix.size(-2) % width)
    if any(padding):
        matrix = F.pad(matrix, padding)
    return matrix.unflatten(-1, (-1, n)).unflatten(-3, (-1, width)).transpose(-3, -2).contiguous()


def product(weight: Tensor, bias: Tensor | None, precision: str) -> Callable[[Tensor], Tensor]:
    """A function from rows `[..., in]` to rows @ `weight`.T + bias `[..., out]`, in fp32.

    `precision` is that of the weights: "fp32", "bf16" (the rows are rounded too on CPUs with bf16
    instructions), or "int8" (with a scale for each output). A row's result is bit-identical alone
    and among others.
    """
    kind, dtype = TYPES[precision]
    outputs, inputs = weight.shape
    scales = None
    if kind == INT8:
        # Symmetric quantization: the largest weight of each output becomes 127.
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (weight / scales[:, None]).round()
    packed = in_panels(weight.to(dtype))  # [out / PANEL, in / n, PANEL, n]
    # The number of inputs with the zeros that fill the last group of n.
    padded = packed.size(1) * packed.size(3)

    def multiply(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        # [..., in] -> [..., padded], in consecutive memory.
        x = F.pad(x, (0, padded - inputs)) if padded > inputs else x.contiguous()
        y = torch.empty(*x.shape[:-1], outputs)
        rows = y.numel() // outputs
        library().product(kind, packed.data_ptr(), x.data_ptr(), y.data_ptr(), address(scales),
                          address(bias), rows, padded, outputs)
        return y

    return multiply


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def values_width(head_width: int) -> int:
    """The width of panels of values: narrow where wide ones would be padded with zeros."""
    return NARROW if head_width % PANEL else PANEL


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scores: Tensor,
           lengths: Tensor) -> Tensor:
    """Attention `[B, H, 1, D]` of one new position per row to itself and to the cache.

    `q` is `[B, H, 1, D]`. `k` and `v`, `[B, G, 1, D]`, are first appended to the cache, which holds
    `lengths` `[B]` positions, packed by `in_panels`: `keys` as B x G matrices `[positions, D]`,
    `values` as `[D, positions]`. `scores` `[B, H, positions]` is working memory.
    """
    B, H, _, D = q.shape
    G = k.size(1)
    # One row of numbers for each row of the batch: [B, H * D], and [B, G * D] for k and v.
    q, k, v = (x.float().flatten(1) for x in (q, k, v))
    y = torch.empty(B, H, 1, D)
    kind = FP32 if keys.dtype == torch.float32 else BF16_CACHE
    tensors = (keys, values, scores, q, k, v, y, lengths)
    library().attend(kind, *(tensor.data_ptr() for tensor in tensors), B, G, H // G, D,
                     scores.size(2), values.size(4), q.stride(0), k.stride(0), v.stride(0),
                     1 / math.sqrt(D))
    return y
