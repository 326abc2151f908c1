"""The model: token ids in, next-token logits or their mean loss out.

One architecture, from GPT-2 as published to a modern variant: the differences are flags of
`GPTConfig`.
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

from model.attention import AttentionContext, CausalSelfAttention, KVCache
from model.autocast import square
from model.config import GPTConfig
from model.documents import DocumentAttention, supports_varlen
from model.linear import Linear
from model.loss import LossOptions, next_token_loss
from model.ngram import NGramEmbedding
from model.parametrization import initial_scale, rate_scale
from model.rotary import rotary_table
from model.skip_init import SkipInit


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm != "layer":
        return nn.RMSNorm(config.n_embd, elementwise_affine=config.norm == "rms_gain")
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class MLP(nn.Module):
    """Two linear layers with an activation between them; SwiGLU has a third, its gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_width, bias=config.bias)
        if config.activation == "swiglu":
            self.c_gate = Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.activation = config.activation
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Into the hidden layer, [B, T, C] -> [B, T, mlp_width], and back.
        if self.activation == "swiglu":
            # Equation 6 of arXiv:2002.05202.
            x = F.silu(self.c_gate(x)) * self.c_fc(x)
        elif self.activation == "relu2":
            x = square(F.relu(self.c_fc(x)))
        else:
            x = F.gelu(self.c_fc(x), approximate="tanh" if self.activation == "gelu" else "none")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """A pre-norm Transformer block: attention, then an MLP, each added to its input."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor | None = None, cache: KVCache | None = None,
                context: AttentionContext | None = None, at: Tensor | None = None) -> Tensor:
        """`x` `[B, T, C]` -> `[B, T, C]`; the other arguments are those of the attention."""
        update = self.attn(self.ln_1(x), rotary, cache, context=context, at=at)
        x = (x if at is None else x[:, at]) + update
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only Transformer language model.

    Raises ValueError for an invalid `config`, with all its problems.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        # The settings: of the shape, and of how to compute it.
        problems = list(config.problems())
        if problems:
            raise ValueError("\n".join(problems))
        self.config = config
        # Activation checkpointing: the backward pass computes each block's activations again.
        self.recompute = False
        # How to compute the loss on the device; None: as on a CPU.
        self.loss_options: LossOptions | None = None

        # Embeddings of tokens, positions and n-grams.
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            table = rotary_table(config.block_size, config.head_width)
            self.register_buffer("rotary", table, persistent=False)
        if config.ngrams > 1:
            self.ngram = NGramEmbedding(config)
        self.drop = nn.Dropout(config.dropout)

        # The blocks, the last norm and the head. A tied head uses the weights of wte.
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        if not config.tie_head:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @classmethod
    def empty(cls, config: GPTConfig, device: str = "meta") -> GPT:
        """A model whose weights have no values yet; on the device "meta" it takes no memory."""
        with SkipInit(device):
            return cls(config)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as GPT-2: weights have a standard deviation of 0.02, biases are zero.

        The projections into the residual stream are smaller by a factor of sqrt(2 n_layer).
        parametrization.py may scale both.
        """
        for name, weights in self.named_parameters():
            scale = initial_scale(self.config, name)
            if name.endswith("bias"):
                weights.zero_()
            elif weights.dim() == 1:
                # The gain of a norm.
                weights.fill_(scale)
            # Each block is the identity at first, and all tokens are equally likely.
            elif self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
                weights.zero_()
            elif name.endswith("c_proj.weight"):
                weights.normal_(std=scale * 0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                weights.normal_(std=scale * 0.02)

    def features(self, idx: Tensor, cache: KVCache | None = None,
                 document_ids: Tensor | None = None, max_documents: int = 0,
                 context: AttentionContext | None = None, at: Tensor | None = None) -> Tensor:
        """Token ids `[B, T]` -> the final residual stream `[B, T, C]`, or `[B, N, C]` with `at`.

        With a `cache` the ids continue its positions, and it advances by T. With `document_ids`
        `[B, T]`, which increase along a row, each document is a sequence of its own; a bound on
        their number, `max_documents`, saves memory. Any other attention is a `context`, whose
        positions the caller has checked. With the indices `at` `[N]`, the last block computes its
        output at these only. Raises ValueError if the positions exceed `block_size`.
        """
        # The positions of the ids, which continue those of the cache.
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if context is None and end > self.config.block_size:
            raise ValueError(f"A context of {end} tokens is longer than "
                             f"block_size={self.config.block_size}.")

        # Attention other than causal: of a cache, or within documents.
        if cache is not None:
            context = cache.attention_context
        if document_ids is not None:
            assert cache is None, "a cache continues one document"
            varlen = supports_varlen(self.config, idx.device, self.training)
            context = DocumentAttention(document_ids, varlen, max_documents)
        positions = context.positions if context is not None else None

        # Embed the tokens, [B, T, C], and look up the angles of their rotary positions.
        x = self.drop(self.embed(idx, start, context, cache))
        rotary = None
        if self.config.position == "rotary":
            if positions is None:
                rotary = self.rotary[:, start:end]  # [2, T, D]
            else:
                rotary = self.rotary[:, positions[:, None]]  # [2, B, 1, T, D]

        # Each block adds to the residual stream x.
        for block in self.h:
            # In the last block, positions without output need keys and values only.
            block_at = at if block is self.h[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, cache, context, block_at, use_reentrant=False)
            else:
                x = block(x, rotary, cache, context, block_at)
        if cache is not None:
            cache.length = end
        return self.ln_f(x)

    def embed(self, idx: Tensor, start: int, context: AttentionContext | None,
              cache: KVCache | None) -> Tensor:
        """The sum of all embeddings `[B, T, C]`; positions begin at `start` without a `context`."""
        positions = parents = None
        if context is not None:
            positions, parents = context.positions, context.parents

        # Tokens, and their positions if these are learned.
        x = self.wte(idx)  # [B, T, C]
        if self.config.position == "learned":
            if positions is None:
                x = x + self.wpe.weight[start : start + idx.size(1)]
            else:
                x = x + self.wpe(positions)
        # N-grams.
        if self.config.ngrams > 1:
            previous_ids = cache.previous_ids if cache is not None else None
            x = x + self.ngram(idx, previous_ids, positions, parents)
            # The n-grams of the next ids begin among these.
            if cache is not None:
                cache.previous_ids = self.ngram.last_ids(idx, previous_ids)
        if self.config.embedding_norm:
            x = F.rms_norm(x, (self.config.n_embd,))
        return x

    @property
    def head_weight(self) -> Tensor:
        """The weights `[V, C]` of the output head."""
        return (self.wte if self.config.tie_head else self.lm_head).weight

    def head(self, features: Tensor) -> Tensor:
        """Features `[..., C]` -> logits `[..., V]`."""
        return F.linear(features, self.head_weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                document_ids: Tensor | None = None, max_documents: int = 0) -> Tensor:
        """Logits `[B, T, V]` for ids `[B, T]`, or with `targets` `[B, T]` the mean loss in nats.

        The other arguments are those of `features`.
        """
        features = self.features(idx, cache, document_ids, max_documents)  # [B, T, C]
        if targets is None:
            return self.head(features)  # [B, T, V]
        # The loss of all positions, [B * T, C] and [B * T].
        return next_token_loss(features.flatten(0, 1), self.head_weight, targets.flatten(),
                               self.loss_options)

    def parameters_by_role(self) -> dict[str, dict[str, Tensor]]:
        """The parameters by role and name; each has one role."""
        roles: dict[str, dict[str, Tensor]] = {
            "embedding": {}, "attention": {}, "mlp": {}, "vector": {}, "head": {}}
        for name, weights in self.named_parameters():
            # Gains and biases are vectors, wherever they are.
            if weights.dim() == 1:
                role = "vector"
            elif name.startswith(("wte", "wpe", "ngram")):
                role = "embedding"
            elif name.startswith("lm_head"):
                role = "head"
            elif ".attn." in name:
                role = "attention"
            else:
                role = "mlp"
            roles[role][name] = weights
        return roles

    def parameter_counts(self) -> dict[str, int]:
        """The number of parameters of each role."""
        return {role: sum(weights.numel() for weights in parameters.values())
                for role, parameters in self.parameters_by_role().items()}

    def rate_scales(self, optimizer: str) -> dict[str, float]:
        """The factors of the learning rates of the parameters, by name."""
        return {name: rate_scale(self.config, name, optimizer)
                for name, _ in self.named_parameters()}

    def flops_per_token(self) -> int:
        """The floating-point operations of forward and backward per token.

        As in arXiv:2204.02311, appendix B: six for each weight of a matrix product, which includes
        the head but not the embeddings; and 12 * C * T per layer for the two products of attention,
        without the saving by the causal mask.
        """
        config = self.config
        roles = self.parameters_by_role()
        weights = [*roles["attention"].values(), *roles["mlp"].values(), self.head_weight]
        products = sum(weight.numel() for weight in weights)
        # A multiplication and an addition, in the forward pass and twice in the backward pass.
        return 6 * products + 12 * config.n_layer * config.n_embd * config.block_size
