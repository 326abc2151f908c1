"""The shape of a model: sizes and flags. Shared by all of `model/`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from setting import range_problems, setting


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M (Radford et al. 2019).

    The upper limits are far beyond what fits on one machine: they keep a malicious checkpoint from
    allocating memory without bound.
    """

    block_size: int = setting(1024, "the longest context, in tokens", ge=1, le=2**17)
    # Not for users: the tokenizer decides it.
    vocab_size: int = setting(50257, "", ge=1, le=2**24)
    n_layer: int = setting(12, "transformer blocks", ge=1, le=2**10)
    n_head: int = setting(12, "attention heads of a block; they divide n_embd", ge=1)
    n_kv_head: int | None = setting(
        None,
        "heads of keys and values; fewer than n_head: grouped-query attention (arXiv:2305.13245)")
    n_embd: int = setting(768, "width of the embeddings and the blocks", ge=1, le=2**16)
    dropout: float = setting(0.0, "probability of dropout", ge=0, lt=1)
    bias: bool = setting(True, "biases in linear layers and layer norms")
    position: Literal["learned", "rotary"] = setting("learned", "position embedding")
    norm: Literal["layer", "rms", "rms_gain"] = setting(
        "layer", "normalization; rms has no parameters, rms_gain a gain for each channel")
    qk_norm: bool = setting(False, "normalize queries and keys (arXiv:2010.04245)")
    activation: Literal["gelu", "gelu_erf", "relu2", "swiglu"] = setting(
        "gelu",
        "of the MLP: gelu by tanh as in GPT-2, exact gelu, squared relu (arXiv:2109.08668), or "
        "swiglu (arXiv:2002.05202)")
    zero_init: bool = setting(False, "initialize output projections and an untied head to zero")
    tie_head: bool = setting(True, "the output head shares the weights of the token embedding")
    embedding_norm: bool = setting(False, "normalize the input of the first block")
    ngrams: int = setting(
        1, "also embed the last 2, ..., ngrams tokens together; 1: only tokens", ge=1, le=2**4)
    ngram_rows: int = setting(2**14, "rows of the table of n-grams", ge=1, le=2**24)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """The hidden width of the MLP: 4 C, or 8/3 C with SwiGLU, which has a third matrix.

        The latter is a multiple of 32, the number of weights that GGUF files quantize together.
        """
        if self.activation == "swiglu":
            return math.ceil(8 * self.n_embd / 3 / 32) * 32
        return 4 * self.n_embd

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from range_problems(self)
        if self.n_head < 1:
            return
        if self.n_embd % self.n_head:
            nearest = math.ceil(self.n_embd / self.n_head) * self.n_head
            yield (f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                   f"choose n_embd={nearest} or another n_head.")
        elif self.position == "rotary" and self.head_width % 2:
            yield (f"n_embd={self.n_embd} and n_head={self.n_head} make heads of width "
                   f"{self.head_width}: position=rotary needs an even width.")
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            yield f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}."
