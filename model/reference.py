"""Attention in seven steps, from two matrix products to the module that the model uses.

For reading from top to bottom beside docs/attention.md, and as references for tests, which compare
each class with the one before it. Training and sampling do not use this file.

Shapes: B batch, T time, H heads, D head width; `d_in` and `d_out` are the widths of the input and
the output. With `return_weights=True` each class also returns its attention weights before
dropout: row t has the weights of all positions in the output of position t.
"""

import math

import torch
from torch import Tensor, nn

from model.attention import CausalSelfAttention
from model.config import GPTConfig

# The context vectors, and the attention weights if requested.
Output = Tensor | tuple[Tensor, Tensor]


class SelfAttention_v1(nn.Module):
    """Scaled dot-product attention (arXiv:1706.03762, equation 1).

    For one sequence, with three plain matrices and no mask.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor, return_weights: bool = False) -> Output:
        """`x` `[T, d_in]` -> `[T, d_out]`, and weights `[T, T]`."""
        queries = x @ self.W_query  # [T, d_out]
        keys = x @ self.W_key  # [T, d_out]
        values = x @ self.W_value  # [T, d_out]
        # [T, T]: the score of key s for query t.
        scores = queries @ keys.T / math.sqrt(keys.size(-1))
        # Each row sums to 1.
        weights = torch.softmax(scores, dim=-1)
        context = weights @ values  # [T, d_out]
        return (context, weights) if return_weights else context


class SelfAttention_v2(nn.Module):
    """The same with `nn.Linear`, which has a better initialization and optional biases.

    `nn.Linear` stores its matrix transposed: `W_query.weight` equals `W_query.T` of v1.
    """

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor, return_weights: bool = False) -> Output:
        """`x` `[T, d_in]` -> `[T, d_out]`, and weights `[T, T]`."""
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)  # [T, d_out]
        scores = queries @ keys.T / math.sqrt(keys.size(-1))
        weights = torch.softmax(scores, dim=-1)
        context = weights @ values
        return (context, weights) if return_weights else context


class CausalAttention(SelfAttention_v2):
    """Attention to the position itself and earlier ones only, for next-token prediction.

    The scores of later positions become minus infinity before the softmax, so their weights are
    exactly 0 and the others still sum to 1. Adds dropout on the weights, and a batch dimension.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float,
                 qkv_bias: bool = False) -> None:
        super().__init__(d_in, d_out, qkv_bias)
        self.dropout = nn.Dropout(dropout)
        is_later = torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)
        self.register_buffer("mask", is_later)

    def forward(self, x: Tensor, return_weights: bool = False) -> Output:
        """`x` `[B, T, d_in]` -> `[B, T, d_out]`, and weights `[B, T, T]`.

        Raises ValueError if T exceeds `context_length`.
        """
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)  # [B, T, d_out]
        weights = self.causal_weights(queries, keys)
        context = self.dropout(weights) @ values
        return (context, weights) if return_weights else context

    def causal_weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention weights `[..., T, T]` of queries and keys `[..., T, D]`."""
        length, context_length = keys.size(-2), len(self.mask)
        if length > context_length:
            raise ValueError(f"An input of {length} positions is longer than "
                             f"context_length={context_length}.")
        scores = queries @ keys.mT / math.sqrt(keys.size(-1))
        scores = scores.masked_fill(self.mask[:length, :length], -torch.inf)
        return torch.softmax(scores, dim=-1)


class CausalMechanismV1(CausalAttention):
    """Causal attention for a batch of sequences of different lengths, padded at their end.

    No position attends to padding, and the output of padding is zero, whatever its input. Adds
    dropout on the context vectors.
    """

    def forward(self, x: Tensor, lengths: Tensor | None = None,
                return_weights: bool = False) -> Output:
        """`x` `[B, T, d_in]` -> `[B, T, d_out]`, and weights `[B, T, T]`.

        `lengths` `[B]` are the lengths of the sequences, by default T. Raises ValueError if T
        exceeds `context_length` or if `lengths` are invalid.
        """
        is_padding = padding_mask(x, lengths)[:, :, None]  # [B, T, 1]
        # Padding may hold NaN, which a weight of 0 would not remove.
        x = x.masked_fill(is_padding, 0.0)
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)  # [B, T, d_out]
        # Padding comes last, so the causal mask already hides it from the other positions.
        weights = self.causal_weights(queries, keys).masked_fill(is_padding, 0.0)
        context = self.dropout(self.dropout(weights) @ values)
        return (context, weights) if return_weights else context


class MultiHeadAttentionWrapper(nn.Module):
    """Independent causal heads, each of width `d_out`, with concatenated outputs.

    Raises ValueError if `num_heads` is less than 1.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int,
                 qkv_bias: bool = False) -> None:
        super().__init__()
        check_num_heads(num_heads)
        sizes = (d_in, d_out, context_length, dropout, qkv_bias)
        self.heads = nn.ModuleList(CausalAttention(*sizes) for _ in range(num_heads))

    def forward(self, x: Tensor, return_weights: bool = False) -> Output:
        """`x` `[B, T, d_in]` -> `[B, T, H * d_out]`, and weights `[B, H, T, T]`."""
        outputs = [head(x, return_weights=True) for head in self.heads]
        contexts, weights = zip(*outputs, strict=True)
        context = torch.cat(contexts, dim=-1)
        return (context, torch.stack(weights, dim=1)) if return_weights else context


class MultiHeadAttention(CausalAttention):
    """All heads in one projection each for queries, keys and values, then an output projection.

    Here `d_out` is the width of all heads together. Raises ValueError if it is not divisible by
    `num_heads`.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int,
                 qkv_bias: bool = False) -> None:
        super().__init__(d_in, d_out, context_length, dropout, qkv_bias)
        check_num_heads(num_heads)
        if d_out % num_heads:
            raise ValueError(f"d_out={d_out} is not divisible by num_heads={num_heads}.")
        self.num_heads = num_heads
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor, return_weights: bool = False) -> Output:
        """`x` `[B, T, d_in]` -> `[B, T, d_out]`, and weights `[B, H, T, T]`."""
        queries = self.split_heads(self.W_query(x))  # [B, H, T, D]
        keys = self.split_heads(self.W_key(x))  # [B, H, T, D]
        values = self.split_heads(self.W_value(x))  # [B, H, T, D]
        weights = self.causal_weights(queries, keys)
        context = self.dropout(weights) @ values  # [B, H, T, D]
        # Concatenate the heads: [B, T, d_out].
        context = self.out_proj(context.transpose(1, 2).flatten(2))
        return (context, weights) if return_weights else context

    def split_heads(self, x: Tensor) -> Tensor:
        """`[B, T, d_out]` -> `[B, H, T, D]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def check_num_heads(num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1.")


def padding_mask(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`[B, T]`, True where `x` `[B, T, d_in]` is padding. Raises ValueError for bad `lengths`."""
    B, T = x.shape[:2]
    if lengths is None:
        return torch.zeros(B, T, dtype=torch.bool, device=x.device)
    if lengths.shape != (B,) or lengths.is_floating_point():
        raise ValueError(f"lengths has the shape {list(lengths.shape)} and the type "
                         f"{lengths.dtype}: a batch of {B} needs integers of the shape [{B}].")
    if ((lengths < 0) | (lengths > T)).any():
        raise ValueError(f"lengths={lengths.tolist()} must be between 0 and {T}, the positions of "
                         "the input.")
    return torch.arange(T, device=x.device) >= lengths[:, None]


@torch.no_grad()
def fuse(attention: MultiHeadAttention) -> CausalSelfAttention:
    """Convert to the model's attention: its one projection stacks the three of `attention`.

    In training the result has dropout on its output too. Raises ValueError unless `d_in` equals
    `d_out`.
    """
    d_out, d_in = attention.W_query.weight.shape
    if d_in != d_out:
        raise ValueError(f"d_in={d_in} and d_out={d_out} must be equal: the fused attention has "
                         "one width.")
    # A model's attention of the same width and heads.
    config = GPTConfig(block_size=len(attention.mask), n_head=attention.num_heads, n_embd=d_out,
                       dropout=attention.dropout.p)
    fused = CausalSelfAttention(config).to(attention.W_query.weight)
    # Stack the three projections, whose biases may be missing.
    projections = (attention.W_query, attention.W_key, attention.W_value)
    fused.c_attn.weight.copy_(torch.cat([linear.weight for linear in projections]))
    fused.c_attn.bias.zero_()
    if attention.W_query.bias is not None:
        fused.c_attn.bias.copy_(torch.cat([linear.bias for linear in projections]))
    fused.c_proj.load_state_dict(attention.out_proj.state_dict())
    return fused.train(attention.training)


@torch.no_grad()
def unfuse(fused: CausalSelfAttention, context_length: int) -> MultiHeadAttention:
    """The inverse of `fuse`; key-value heads that several heads share are repeated.

    The result has no rotary positions. Raises ValueError for attention with `qk_norm`, which it
    does not have either.
    """
    if fused.qk_norm:
        raise ValueError("MultiHeadAttention does not support qk_norm=True.")
    # Attention in steps of the same width and heads.
    has_bias = fused.c_attn.bias is not None
    width = fused.c_proj.in_features
    attention = MultiHeadAttention(width, width, context_length, fused.dropout, fused.n_head,
                                   has_bias).to(fused.c_attn.weight)
    # Divide the one projection, weights and biases alike. Scaled queries get larger weights.
    group_size = fused.n_head // fused.n_kv_head
    for name, parameter in fused.c_attn.named_parameters():
        heads = parameter.unflatten(0, (-1, fused.head_width))  # [H + 2G, D, ...]
        q, k, v = heads.split((fused.n_head, fused.n_kv_head, fused.n_kv_head))
        k, v = k.repeat_interleave(group_size, 0), v.repeat_interleave(group_size, 0)
        attention.W_query.get_parameter(name).copy_(q.flatten(0, 1) * fused.query_scale)
        attention.W_key.get_parameter(name).copy_(k.flatten(0, 1))
        attention.W_value.get_parameter(name).copy_(v.flatten(0, 1))
    # The output projection is the same, except for a bias that may be missing.
    attention.out_proj.bias.zero_()
    for name, parameter in fused.c_proj.named_parameters():
        attention.out_proj.get_parameter(name).copy_(parameter)
    return attention.train(fused.training)
