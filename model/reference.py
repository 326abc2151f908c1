"""Attention from two matrix products to the block that the model uses, one idea a class.

For reading from top to bottom, and as oracles: tests prove how each class follows from the one before it
(docs/attention.md walks along). Nothing in training or sampling imports this file.

Shapes: B batch, T time, H heads, D head width; `d_in` and `d_out` are the widths of what comes in and goes out.
With `return_weights=True` each class also returns its attention weights, before dropout: row t holds how much position t
takes from each position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.attention import CausalSelfAttention
from model.config import GPTConfig

Attended = Tensor | tuple[Tensor, Tensor]  # the context vectors, and the weights where they are asked for


class SelfAttention_v1(nn.Module):
    """Each position asks with its query; the keys that fit it best give the most of their values.

    One sequence, three bare matrices, no mask (Vaswani et al. 2017, arXiv:1706.03762, equation 1).
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor, return_weights: bool = False) -> Attended:
        """`x` `[T, d_in]` -> `[T, d_out]`, and weights `[T, T]`."""
        queries, keys, values = x @ self.W_query, x @ self.W_key, x @ self.W_value  # [T, d_out] each
        scores = queries @ keys.T  # [T, T]: how well query t fits key s
        weights = torch.softmax(scores / math.sqrt(keys.size(-1)), dim=-1)  # each row sums to 1
        context = weights @ values  # [T, d_out]
        return (context, weights) if return_weights else context


class SelfAttention_v2(nn.Module):
    """The same with `nn.Linear`, which brings a better start for training and, if wanted, biases.

    A linear layer keeps its matrix transposed: `W_query.weight` here is `W_query.T` there.
    """

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor, return_weights: bool = False) -> Attended:
        """`x` `[T, d_in]` -> `[T, d_out]`, and weights `[T, T]`."""
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)  # [T, d_out] each
        weights = torch.softmax(queries @ keys.T / math.sqrt(keys.size(-1)), dim=-1)
        context = weights @ values
        return (context, weights) if return_weights else context


class CausalAttention(nn.Module):
    """No position sees what comes after it, so that each can be trained to say what comes next.

    What is ahead is masked before the softmax: its score becomes minus infinity, its weight exactly 0, and the others
    still sum to 1. Dropout on the weights; batches; any length up to `context_length`.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", future(context_length))

    def forward(self, x: Tensor, return_weights: bool = False) -> Attended:
        """`x` `[B, T, d_in]` -> `[B, T, d_out]`, and weights `[B, T, T]`. Raises ValueError for too long an input."""
        T = fitting(x, self.mask)
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)  # [B, T, d_out] each
        scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.size(-1))  # [B, T, T]
        weights = torch.softmax(scores.masked_fill(self.mask[:T, :T], -torch.inf), dim=-1)
        context = self.dropout(weights) @ values
        return (context, weights) if return_weights else context


class CausalMechanismV1(CausalAttention):
    """Sequences of different lengths in one batch, the shorter ones padded at their end.

    Nobody attends to padding, and padding attends to nobody: its rows are zero, whatever lies in it. Dropout on
    the weights, and on the context vectors too.
    """

    def forward(self, x: Tensor, lengths: Tensor | None = None, return_weights: bool = False) -> Attended:
        """`x` `[B, T, d_in]`, `lengths` `[B]` (all T without it) -> `[B, T, d_out]`, and weights `[B, T, T]`.

        Raises ValueError for too long an input and for lengths that do not fit it.
        """
        T = fitting(x, self.mask)
        padding = padded(x, lengths)  # [B, T]
        x = x.masked_fill(padding[:, :, None], 0.0)  # even NaN, which no weight of 0 could hide
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)  # [B, T, d_out] each
        scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.size(-1))  # [B, T, T]
        # Padding comes last, so the causal mask already hides it from each real position. Its own rows must go.
        weights = torch.softmax(scores.masked_fill(self.mask[:T, :T], -torch.inf), dim=-1)
        weights = weights.masked_fill(padding[:, :, None], 0.0)
        context = self.dropout(self.dropout(weights) @ values)
        return (context, weights) if return_weights else context


class MultiHeadAttentionWrapper(nn.Module):
    """Several causal heads side by side, each `d_out` wide, each free to look for something else.

    Raises ValueError for less than one head.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int,
                 qkv_bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads} must be at least 1.")
        self.heads = nn.ModuleList(CausalAttention(d_in, d_out, context_length, dropout, qkv_bias)
                                   for _ in range(num_heads))

    def forward(self, x: Tensor, return_weights: bool = False) -> Attended:
        """`x` `[B, T, d_in]` -> `[B, T, H * d_out]`, and weights `[B, H, T, T]`."""
        contexts, weights = zip(*(head(x, return_weights=True) for head in self.heads), strict=True)
        context = torch.cat(contexts, dim=-1)
        return (context, torch.stack(weights, dim=1)) if return_weights else context


class MultiHeadAttention(nn.Module):
    """All heads at once: one projection each for queries, keys and values, cut into heads; `out_proj` mixes the heads.

    `d_out` is the width of all heads together from here on. Raises ValueError if it is not divisible by `num_heads`.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int,
                 qkv_bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads} must be at least 1.")
        if d_out % num_heads:
            raise ValueError(f"d_out={d_out} is not divisible by num_heads={num_heads}.")
        self.num_heads, self.head_width = num_heads, d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", future(context_length))

    def forward(self, x: Tensor, return_weights: bool = False) -> Attended:
        """`x` `[B, T, d_in]` -> `[B, T, d_out]`, and weights `[B, H, T, T]`. Raises ValueError for too long an input."""
        T = fitting(x, self.mask)
        queries, keys, values = (self.cut(W(x)) for W in (self.W_query, self.W_key, self.W_value))  # [B, H, T, D]
        scores = queries @ keys.transpose(2, 3) / math.sqrt(self.head_width)  # [B, H, T, T]
        weights = torch.softmax(scores.masked_fill(self.mask[:T, :T], -torch.inf), dim=-1)
        context = self.dropout(weights) @ values  # [B, H, T, D]
        context = self.out_proj(context.transpose(1, 2).flatten(2))  # heads side by side again: [B, T, d_out]
        return (context, weights) if return_weights else context

    def cut(self, x: Tensor) -> Tensor:
        """`[B, T, d_out]` -> `[B, H, T, D]`."""
        return x.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)


def future(context_length: int) -> Tensor:
    """True where a row's position would see a later one: above the diagonal of `[context_length, context_length]`."""
    return torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)


def fitting(x: Tensor, mask: Tensor) -> int:
    """The length T of `x` `[B, T, d_in]`. Raises ValueError where it is more than the mask was made for."""
    if x.size(1) > mask.size(0):
        raise ValueError(f"An input of {x.size(1)} positions is longer than context_length={mask.size(0)}.")
    return x.size(1)


def padded(x: Tensor, lengths: Tensor | None) -> Tensor:
    """True `[B, T]` where `x` `[B, T, d_in]` is padding. Raises ValueError for lengths that do not fit."""
    B, T = x.shape[:2]
    if lengths is None:
        return torch.zeros(B, T, dtype=torch.bool, device=x.device)
    if lengths.shape != (B,) or lengths.is_floating_point():
        raise ValueError(f"lengths is {lengths.dtype} of the shape {list(lengths.shape)}, a batch of {B} needs whole "
                         f"numbers of the shape [{B}].")
    if ((lengths < 0) | (lengths > T)).any():
        raise ValueError(f"lengths={lengths.tolist()} must lie between 0 and the {T} positions of the input.")
    return torch.arange(T, device=x.device) >= lengths[:, None]


@torch.no_grad()
def fuse(attention: MultiHeadAttention) -> CausalSelfAttention:
    """The fused block with the same weights: the three projections become the rows of one.

    In training it differs in one thing: it has dropout on its output too, on the way into the residual stream. Raises
    ValueError unless `d_in` is `d_out`, as in a block whose output is added to its input.
    """
    d_out, d_in = attention.W_query.weight.shape
    if d_in != d_out:
        raise ValueError(f"The fused block has one width, this attention has d_in={d_in} and d_out={d_out}.")
    config = GPTConfig(block_size=attention.mask.size(0), n_head=attention.num_heads, n_embd=d_out,
                       dropout=attention.dropout.p)
    fused = CausalSelfAttention(config).to(attention.W_query.weight)
    parts = (attention.W_query, attention.W_key, attention.W_value)
    fused.c_attn.weight.copy_(torch.cat([part.weight for part in parts]))
    fused.c_attn.bias.copy_(torch.cat([part.bias if part.bias is not None else torch.zeros_like(part.weight[:, 0])
                                       for part in parts]))
    fused.c_proj.load_state_dict(attention.out_proj.state_dict())
    return fused.train(attention.training)


@torch.no_grad()
def split(fused: CausalSelfAttention, context_length: int) -> MultiHeadAttention:
    """The way back: three projections from one; key-value heads that several heads share are repeated.

    For blocks that are called without rotary positions, which these classes do not have. Raises ValueError for one
    that normalises its queries and keys, which they do not do either.
    """
    if fused.qk_norm:
        raise ValueError("A block with qk_norm has no equal among the plain classes.")
    width, D = fused.c_proj.in_features, fused.head_width
    attention = MultiHeadAttention(width, width, context_length, fused.dropout, fused.n_head,
                                   qkv_bias=fused.c_attn.bias is not None).to(fused.c_attn.weight)
    shared = fused.n_head // fused.n_kv_head
    for name in ("weight", "bias") if fused.c_attn.bias is not None else ("weight",):
        heads = getattr(fused.c_attn, name).unflatten(0, (-1, D))  # [H + 2G, D, ...]
        q, k, v = heads.split((fused.n_head, fused.n_kv_head, fused.n_kv_head))
        for part, of_heads in ((attention.W_query, q), (attention.W_key, k.repeat_interleave(shared, 0)),
                               (attention.W_value, v.repeat_interleave(shared, 0))):
            getattr(part, name).copy_(of_heads.flatten(0, 1))
    attention.out_proj.weight.copy_(fused.c_proj.weight)
    attention.out_proj.bias.copy_(fused.c_proj.bias if fused.c_proj.bias is not None else torch.zeros(width))
    return attention.train(fused.training)
