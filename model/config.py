"""The shape of a model: sizes and flags. Shared by all of `model/`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# Far beyond what runs here; a checkpoint from a stranger cannot ask for more.
LIMITS = {"block_size": 2**17, "vocab_size": 2**24, "n_layer": 2**10, "n_embd": 2**16, "ngrams": 2**4, "ngram_rows": 2**24}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M (Radford et al. 2019)."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257  # in training, the tokenizer decides it
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention (arXiv:2305.13245)
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms
    position: Literal["learned", "rotary"] = "learned"
    norm: Literal["layer", "rms"] = "layer"  # rms: without parameters
    qk_norm: bool = False  # normalise queries and keys (arXiv:2010.04245)
    activation: Literal["gelu", "gelu_erf", "relu2"] = "gelu"  # by tanh as in GPT-2, exact, squared (arXiv:2109.08668)
    zero_init: bool = False  # output projections start at zero, and so does an untied head
    tie_head: bool = True  # the head reads the token embedding instead of a matrix of its own
    embedding_norm: bool = False  # normalise what goes into the first block
    ngrams: int = 1  # more than 1: embed the last 2, ..., ngrams tokens together, too (model/ngram.py)
    ngram_rows: int = 2**14  # of their table

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "ngrams", "ngram_rows"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
                return
        for name, most in LIMITS.items():
            if getattr(self, name) > most:
                yield f"{name}={getattr(self, name)} is too large: the most is {most}."
                return
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} is a probability: choose 0 <= dropout < 1."
        if self.n_embd % self.n_head:
            yield (f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                   f"choose n_embd={math.ceil(self.n_embd / self.n_head) * self.n_head} or another n_head.")
        elif self.position == "rotary" and self.head_width % 2:
            yield (f"n_embd={self.n_embd} over n_head={self.n_head} gives heads of odd width {self.head_width}: "
                   f"rotary positions need an even one.")
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            yield f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}."
