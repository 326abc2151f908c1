"""Causal self-attention with one fused projection, and the key-value cache that it fills.

Knows tensors only: no files, no text, no training.
Shapes: B batch, T time, C width, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.config import GPTConfig
from model.linear import Linear

QUERIES_AT_ONCE = 256  # of products on a CPU: what a block of queries cannot see is not computed


class KVCache:
    """Keys and values of the positions already seen: one preallocated pair of tensors a layer.

    The modules stay stateless: whoever generates makes a cache and passes it to `GPT.forward`,
    which writes behind `length` and moves it on. It holds `positions` of them: as many as a block, if not said.
    """

    within = None  # see generation/caches.py

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, positions: int = 0) -> None:
        shape = (batch_size, config.kv_heads, positions or config.block_size, config.head_width)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length = 0
        self.before: Tensor | None = None  # the ids behind which the next ones come, where n-grams need them

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append `k`, `v` `[B, G, T, D]` of one layer; return all `[B, G, length + T, D]` so far."""
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Documents:
    """Rows in which several documents lie one behind the other: where each position is in its own, and what it sees.

    Made once a forward pass, for all layers, from `numbers` `[B, T]`: the document of each position, rising along a row.
    A mask hides the others. Where flash attention can be had (`packed`), it takes the documents of the whole batch end to
    end instead, and spends nothing on what lies between two of them: chosen for that, and not yet run on a GPU.
    """

    def __init__(self, numbers: Tensor, packed: bool = False) -> None:
        T = numbers.size(1)
        begins = F.pad(numbers.diff() != 0, (1, 0), value=True)  # [B, T]
        index = torch.arange(T, device=numbers.device)
        self.positions = index - (index * begins).cummax(dim=1).values  # [B, T], from 0 in each document
        self.mask = self.cuts = None
        if packed:
            self.cuts = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=numbers.numel()).int()  # [documents + 1]
        else:
            same = numbers[:, None, :, None] == numbers[:, None, None, :]
            self.mask = visible(T, T, numbers.device) & same  # [B, 1, T, T]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """What the heads take `[B, H, T, D]`, for queries of that shape, keys and values `[B, G, T, D]`."""
        if self.cuts is None:
            return attend(q, k, v, self.mask, dropout)
        from torch.nn.attention.varlen import varlen_attn  # here, since it takes a second to import

        B, H, T, _ = q.shape
        k, v = for_all_heads(k, H), for_all_heads(v, H)
        q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H, D]
        return varlen_attn(q, k, v, self.cuts, self.cuts, T, T, window_size=(-1, 0)).unflatten(0, (B, T)).transpose(1, 2)


def can_pack(config: GPTConfig, device: torch.device, training: bool) -> bool:
    """Whether flash attention takes documents end to end here: in bfloat16, on GPUs that have it, without dropout."""
    bf16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    return (device.type == "cuda" and bf16 and not (training and config.dropout)
            and config.head_width % 8 == 0 and config.head_width <= 256)


def rotary_table(block_size: int, head_width: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines `[2, block_size, D]` of rotary positions (Su et al. 2021, arXiv:2104.09864)."""
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.arange(block_size, dtype=torch.float32).outer(frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (d, d + D/2) of `x` `[B, H, T, D]` by its position's angle; `table` `[2, T, D]`.

    A `table` `[2, B, 1, T, D]` gives each row positions of its own.
    """
    cos, sin = table.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which position t sees positions 0..t only.

    One matrix product makes queries, keys and values together; the kernels of
    `scaled_dot_product_attention` do the rest without storing the `[T, T]` weights.
    Dropout acts on the attention weights and on the way back into the residual stream.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.head_width = config.head_width
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        fused_width = (self.n_head + 2 * self.n_kv_head) * self.head_width
        self.c_attn = Linear(config.n_embd, fused_width, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor | None = None, cache: KVCache | None = None,
                documents: Documents | None = None) -> Tensor:
        """`x` `[B, T, C]` -> `[B, T, C]`; `rotary` is the table of the T positions, where used."""
        q, k, v = self.project(x, rotary, cache)
        dropout = self.dropout if self.training else 0.0
        return self.merge(attend(q, k, v, None, dropout) if documents is None else documents.attend(q, k, v, dropout))

    def explicit(self, x: Tensor, rotary: Tensor | None = None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """The same by plain products, and the weights `[B, H, T, S]` before dropout, over all S positions seen."""
        q, k, v = self.project(x, rotary, cache)
        mask = visible(q.size(2), k.size(2), x.device)
        y, weights = attend_by_products(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.merge(y), weights

    def project(self, x: Tensor, rotary: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, D]` of `x`, and keys and values `[B, G, S, D]` of it and of what the cache holds."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_width).transpose(1, 2)  # [B, H + 2G, T, D]
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_width,))
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        """What the heads took `[B, H, T, D]`, side by side and projected: `[B, T, C]`."""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """What the heads take `[B, H, T, D]`, for queries of that shape, keys and values `[B, G, S, D]`.

    A `mask` `[..., T, S]` is True where one may look; None: at all that is not later.
    """
    T, S = q.size(2), k.size(2)
    if products_are_faster(v):
        mask = visible(T, S, v.device) if mask is None else mask
        if T <= QUERIES_AT_ONCE:
            return attend_by_products(q, k, v, mask, dropout)[0]
        parts = []
        for queries, seen in zip(q.split(QUERIES_AT_ONCE, 2), mask.split(QUERIES_AT_ONCE, -2), strict=True):
            end = S - T + sum(part.size(2) for part in parts) + queries.size(2)
            # The weights of a long context would be most of what a step keeps: they are computed again for the gradients.
            parts.append(checkpoint(attend_by_products, queries, k[:, :, :end], v[:, :, :end], seen[..., :end], dropout,
                                    use_reentrant=False)[0])
        return torch.cat(parts, dim=2)
    if mask is not None:  # kernels that take one have no grouped heads on GPUs
        k, v = for_all_heads(k, q.size(1)), for_all_heads(v, q.size(1))
    # Without earlier positions the kernel's own causal mask serves; a single new position sees
    # everything; several new ones behind a cache need a mask that is shifted by its length.
    if mask is None and 1 < T < S:
        mask = visible(T, S, v.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=mask is None and T == S > 1, enable_gqa=k.size(1) != q.size(1))


def products_are_faster(v: Tensor) -> bool:
    """On CPUs in bf16 the fused kernel takes up to three times as long: docs/benchmarks.md."""
    return v.is_cpu and v.dtype == torch.bfloat16


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """As `attend`, and the weights `[B, H, T, S]` before dropout."""
    k, v = for_all_heads(k, q.size(1)), for_all_heads(v, q.size(1))
    hidden = torch.zeros_like(mask, dtype=v.dtype).masked_fill(~mask, -torch.inf).expand(*q.shape[:3], k.size(2))
    hidden, q, k = (x.to(v.dtype).flatten(0, 1) for x in (hidden, q, k))  # one product of two stacks of matrices
    scores = torch.baddbmm(hidden, q, k.mT, alpha=q.size(-1) ** -0.5).unflatten(0, v.shape[:2])
    weights = scores.softmax(-1)
    return F.dropout(weights, dropout) @ v, weights


def for_all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values `[B, G, S, D]`, each group's once for every head that shares it: `[B, H, S, D]`."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def visible(T: int, S: int, device: torch.device) -> Tensor:
    """True `[T, S]` where one of the last T of S positions may look: at itself and at what comes before it."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
