"""Rotary position embeddings (RoPE, arXiv:2104.09864): queries and keys are rotated in pairs.

Shapes: B batch, T time, H heads, D head width.
"""

import torch
from torch import Tensor


def rotary_table(block_size: int, head_width: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines `[2, block_size, D]` of the angles at each position."""
    # Equation 15 of the paper: the wavelengths of the pairs grow from 2 pi to 2 pi * base.
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    # [block_size, D/2], and twice, since both numbers of a pair turn by the same angle.
    angles = torch.arange(block_size, dtype=torch.float32).outer(frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (d, d + D/2) of `x` `[B, H, T, D]` by the angle of its position.

    `table` is `[2, T, D]`, or `[2, B, 1, T, D]` where the positions differ between rows.
    """
    cos, sin = table.to(x.dtype)
    # (left, right) becomes (left cos - right sin, right cos + left sin).
    left, right = x.chunk(2, dim=-1)  # [B, H, T, D/2]
    return x * cos + torch.cat((-right, left), dim=-1) * sin
