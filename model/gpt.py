"""The model: token ids in, next-token logits or their mean loss out.

One family, from GPT-2 exactly as published to a modern variant; each difference is a flag of `GPTConfig`.
Knows tensors only: no files, no text, no training. Parameter names are GPT-2's own.
Shapes: B batch, T time, C width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention import CausalSelfAttention, Documents, KVCache, can_pack, rotary_table
from model.config import GPTConfig
from model.linear import Linear
from model.loss import next_token_loss
from model.ngram import NGramEmbedding


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class MLP(nn.Module):
    """Two linear layers, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = config.activation
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.activation == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu" else "none")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """A pre-norm Transformer block: attention mixes positions, the MLP works within each."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor | None = None, cache: KVCache | None = None,
                documents: Documents | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, cache, documents=documents)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only Transformer language model.

    Raises ValueError for a `config` whose values cannot work, with all reasons.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := list(config.problems()):
            raise ValueError("\n".join(problems))
        self.config = config
        self.recompute = False  # keep what goes into each block, and compute the rest again for the gradients: less memory
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.register_buffer("rotary", rotary_table(config.block_size, config.head_width), persistent=False)
        if config.ngrams > 1:
            self.ngram = NGramEmbedding(config)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        if not config.tie_head:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal with deviation 0.02, the residual projections smaller by sqrt(2 n_layer), biases 0."""
        for name, weights in self.named_parameters():
            if name.endswith("bias"):
                weights.zero_()
            elif weights.dim() == 1:  # the gain of a layer norm
                weights.fill_(1.0)
            elif self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
                weights.zero_()
            elif name.endswith("c_proj.weight"):
                weights.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                weights.normal_(std=0.02)

    def features(self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """Token ids `[B, T]` -> the final residual stream `[B, T, C]`.

        With a `cache` the ids continue the positions it holds, and it moves on by T. With `documents` `[B, T]`, numbers
        that rise along a row, those of one number are a sequence of their own: positions restart, attention stays within.
        Raises ValueError where the positions would pass `block_size`.
        """
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"A context of {end} tokens is longer than block_size={self.config.block_size}.")
        x, rotary, within = self.wte(idx), None, cache.within if cache is not None else None
        if documents is not None:
            assert cache is None, "a cache continues one document"
            within = Documents(documents, can_pack(self.config, idx.device, self.training))
        if self.config.position == "learned":
            x = x + (self.wpe.weight[start:end] if within is None else self.wpe(within.positions))
        else:
            rotary = self.rotary[:, start:end] if within is None else self.rotary[:, within.positions[:, None]]
        if self.config.ngrams > 1:
            before = cache.before if cache is not None else None
            x = x + self.ngram(idx, before, within.positions if within is not None else None)
            if cache is not None:
                cache.before = self.ngram.following(idx, before)
        if self.config.embedding_norm:
            x = F.rms_norm(x, (self.config.n_embd,))
        x = self.drop(x)
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, cache, within, use_reentrant=False)
            else:
                x = block(x, rotary, cache, within)
        if cache is not None:
            cache.length = end
        return self.ln_f(x)

    @property
    def head_weight(self) -> Tensor:
        """The matrix `[V, C]` from features to logits."""
        return (self.wte if self.config.tie_head else self.lm_head).weight

    def head(self, features: Tensor) -> Tensor:
        """Features `[..., C]` -> logits `[..., V]`."""
        return F.linear(features, self.head_weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                documents: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` for ids `[B, T]`; with `targets` `[B, T]`, the mean loss in nats (a scalar) instead.

        `cache` and `documents` are as `features` takes them.
        """
        features = self.features(idx, cache, documents)
        if targets is None:
            return self.head(features)
        return next_token_loss(features.flatten(0, 1), self.head_weight, targets.flatten())

    def parameters_by_role(self) -> dict[str, dict[str, Tensor]]:
        """The parameters by role and name, each once."""
        roles: dict[str, dict[str, Tensor]] = {
            "embedding": {}, "attention": {}, "mlp": {}, "vector": {}, "head": {}}
        for name, weights in self.named_parameters():
            if weights.dim() == 1:
                roles["vector"][name] = weights  # biases and gains
            elif name.startswith(("wte", "wpe", "ngram")):
                roles["embedding"][name] = weights
            elif name.startswith("lm_head"):
                roles["head"][name] = weights
            else:
                roles["attention" if ".attn." in name else "mlp"][name] = weights
        return roles

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward (arXiv:2204.02311, appendix B).

        Six for each weight of a matrix product (the head's counts, a looked-up embedding does not), and
        12 * C * T a layer for the two products of attention, counted as if no mask saved half of them.
        """
        config, roles = self.config, self.parameters_by_role()
        products = sum(w.numel() for role in ("attention", "mlp") for w in roles[role].values())
        products += config.vocab_size * config.n_embd
        return 6 * products + 12 * config.n_layer * config.n_embd * config.block_size
