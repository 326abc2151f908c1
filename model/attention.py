"""Causal self-attention, and its key-value cache.

Knows tensors only: no files, no text, no training.
Shapes: B batch, T positions of the input, S positions attended to (T and those in a cache),
C width, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.autocast import rms_norm
from model.config import GPTConfig
from model.linear import Linear
from model.rotary import rotate

# Unfused attention handles this number of queries at a time. It skips the keys after the last.
QUERY_CHUNK = 256


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which position t attends to positions 0..t only.

    One projection computes queries, keys and values. Dropout acts on the attention weights and on
    the output.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.head_width = config.head_width
        self.qk_norm = config.qk_norm
        self.query_scale = config.query_scale
        self.dropout = config.dropout
        # Queries of H heads, and keys and values of G heads, in one projection.
        fused_width = (self.n_head + 2 * self.n_kv_head) * self.head_width
        self.c_attn = Linear(config.n_embd, fused_width, bias=config.bias)
        # The output projection.
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor | None = None, cache: KVCache | None = None,
                context: AttentionContext | None = None, at: Tensor | None = None) -> Tensor:
        """`x` `[B, T, C]` -> `[B, T, C]`; `rotary` is the table of the T positions, if used.

        With indices `at` `[N]`, the output `[B, N, C]` is that of these positions only.
        """
        # q is [B, H, T, D]; k and v are [B, G, S, D].
        q, k, v = self.project_qkv(x, rotary, cache)
        dropout = self.dropout if self.training else 0.0
        if context is not None:
            y = context.attend(q, k, v, dropout)
        else:
            y = attend(q, k, v, None, dropout)
        return self.project_output(y if at is None else y[:, :, at])

    def forward_with_weights(self, x: Tensor, rotary: Tensor | None = None,
                             cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """The output by unfused attention, and the weights `[B, H, T, S]` before dropout."""
        q, k, v = self.project_qkv(x, rotary, cache)
        mask = causal_mask(q.size(2), k.size(2), x.device)
        y, weights = unfused_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.project_output(y), weights

    def project_qkv(self, x: Tensor, rotary: Tensor | None,
                    cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, D]`, and keys and values `[B, G, S, D]`, which include the cache's."""
        # All heads: [B, T, C] -> [B, T, (H + 2G) D] -> [B, H + 2G, T, D].
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_width).transpose(1, 2)

        # Normalize and rotate queries and keys, together.
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        if self.qk_norm:
            qk = rms_norm(qk)
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)  # [B, H, T, D], [B, G, T, D]
        if self.query_scale != 1:
            q = q * self.query_scale

        # Put the keys and values of earlier positions before them.
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return q, k, v

    def project_output(self, y: Tensor) -> Tensor:
        """Concatenate the heads `[B, H, T, D]` and project them: `[B, T, C]`."""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention `[B, H, T, D]` of queries `[B, H, T, D]` to keys and values `[B, G, S, D]`.

    `mask` `[..., T, S]` is True where a query attends to a key; without it, attention is causal.
    """
    # Two matrix products, where they are faster than the fused kernel.
    T, S = q.size(2), k.size(2)
    if unfused_is_faster(v):
        if mask is None:
            mask = causal_mask(T, S, v.device)
        return attend_in_chunks(q, k, v, mask, dropout)

    # The fused kernel: FlashAttention, where the device and the arguments allow it.
    if mask is not None:
        # Fused kernels on GPUs do not support a mask together with grouped heads.
        k, v = repeat_kv(k, q.size(1)), repeat_kv(v, q.size(1))
    elif 1 < T < S:
        # The kernel's own causal mask assumes that there are no earlier positions.
        mask = causal_mask(T, S, v.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T == S > 1,
        enable_gqa=k.size(1) != q.size(1))


def unfused_is_faster(v: Tensor) -> bool:
    """In bf16 on CPUs the fused kernel takes up to three times as long: docs/experiments.md."""
    return v.is_cpu and v.dtype == torch.bfloat16


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """As `attend`, by unfused attention on chunks of queries; `mask` hides later positions."""
    T, S = q.size(2), k.size(2)
    # A short sequence is one chunk.
    if T <= QUERY_CHUNK:
        return unfused_attention(q, k, v, mask, dropout)[0]
    outputs = []
    end = S - T
    for queries, rows in zip(q.split(QUERY_CHUNK, 2), mask.split(QUERY_CHUNK, -2), strict=True):
        # These queries, [B, H, chunk, D], attend to no key after their own positions.
        end += queries.size(2)
        # The weights of a long context would take most of a step's memory, so the backward pass
        # computes them again.
        y, _ = checkpoint(unfused_attention, queries, k[:, :, :end], v[:, :, :end],
                          rows[..., :end], dropout, use_reentrant=False)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor,
                      dropout: float) -> tuple[Tensor, Tensor]:
    """As `attend`, by two matrix products; also the weights `[B, H, T, S]` before dropout."""
    B, H, T, D = q.shape
    k, v = repeat_kv(k, H), repeat_kv(v, H)
    # Added to the scores: -infinity becomes a weight of 0.
    bias = torch.zeros_like(mask, dtype=v.dtype).masked_fill(~mask, -torch.inf)
    bias = bias.expand(B, H, T, k.size(2))  # [B, H, T, S]
    # One batched product of B * H matrices.
    bias, q, k = (x.to(v.dtype).flatten(0, 1) for x in (bias, q, k))
    # softmax(q k^T / sqrt(D)) v: arXiv:1706.03762, equation 1.
    scores = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).unflatten(0, (B, H))
    weights = scores.softmax(-1)
    return F.dropout(weights, dropout) @ v, weights


def repeat_kv(x: Tensor, n_head: int) -> Tensor:
    """Repeat keys or values `[B, G, S, D]` for the heads that share them: `[B, H, S, D]`."""
    if x.size(1) == n_head:
        return x
    return x.repeat_interleave(n_head // x.size(1), dim=1)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """`[T, S]`, True where one of the last T of S positions attends: to itself and earlier ones."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class AttentionContext(Protocol):
    """Attention other than causal over whole rows; one object serves all layers."""

    # `[B, T]`, the position of each token in its own sequence.
    positions: Tensor
    # `[B, T]`, the index of the token before each; None: its neighbor.
    parents: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """As the function `attend`, with a mask of its own."""


class KVCache:
    """Keys and values of earlier positions, in one preallocated pair of tensors per layer.

    `GPT.forward` appends to it. `positions` is its capacity, by default `block_size`.
    """

    attention_context: AttentionContext | None = None

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, positions: int | None = None) -> None:
        # [B, G, positions, D], of which the first `length` positions are in use.
        shape = (batch_size, config.kv_heads, positions or config.block_size, config.head_width)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length = 0
        # The last ids of the earlier positions, which n-gram embeddings need.
        self.previous_ids: Tensor | None = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append `k` and `v` `[B, G, T, D]`; return all keys and values `[B, G, S, D]`."""
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
