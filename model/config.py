"""The shape of a model: sizes and flags. Shared by all of `model/`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from setting import SettingsBase, setting


@dataclass(frozen=True)
class GPTConfig(SettingsBase):
    """The shape of a GPT. The defaults are GPT-2 124M (Radford et al. 2019).

    The upper limits are far beyond what fits on one machine: they keep a malicious checkpoint from
    allocating memory without bound.
    """

    # The size.
    block_size: int = setting(1024, "the longest context, in tokens", ge=1, le=2**17)
    # Not for users: the tokenizer decides it.
    vocab_size: int = setting(50257, "", ge=1, le=2**24)
    n_layer: int = setting(12, "transformer blocks", ge=1, le=2**10)
    n_head: int = setting(12, "attention heads of a block; they divide n_embd", ge=1)
    n_kv_head: int | None = setting(
        None, "key-value heads; fewer than n_head: grouped-query attention (arXiv:2305.13245)")
    n_embd: int = setting(768, "width of the embeddings and the blocks", ge=1, le=2**16)
    # The layers: those of GPT-2, or of later models.
    dropout: float = setting(0.0, "probability of dropout", ge=0, lt=1)
    bias: bool = setting(True, "biases in linear layers and layer norms")
    position: Literal["learned", "rotary"] = setting("learned", "position embedding")
    norm: Literal["layer", "rms", "rms_gain"] = setting(
        "layer", "normalization; rms has no parameters, rms_gain a gain for each channel")
    qk_norm: bool = setting(False, "normalize queries and keys (arXiv:2010.04245)")
    activation: Literal["gelu", "gelu_erf", "relu2", "swiglu"] = setting(
        "gelu", "of the MLP: gelu by tanh as in GPT-2, exact gelu, squared relu "
        "(arXiv:2109.08668), or swiglu (arXiv:2002.05202)")
    zero_init: bool = setting(False, "initialize output projections and an untied head to zero")
    tie_head: bool = setting(True, "the output head shares the weights of the token embedding")
    embedding_norm: bool = setting(False, "normalize the input of the first block")
    # Embeddings of several tokens together.
    ngrams: int = setting(
        1, "also embed the last 2, ..., ngrams tokens together; 1: only tokens", ge=1, le=2**4)
    ngram_rows: int = setting(2**14, "rows of the table of n-grams", ge=1, le=2**24)
    # The dependence of initial weights and learning rates on the size.
    parametrization: Literal["standard", "mup"] = setting(
        "standard", "mup: rates tuned on a narrow model suit a wide one (docs/transfer.md)")
    mup_base_width: int = setting(
        256, "mup: n_embd of the model that rates were tuned on", ge=1, le=2**16)
    mup_base_depth: int | None = setting(
        None, "mup: its n_layer, to scale branches by depth (arXiv:2505.01618)", ge=1, le=2**10)
    mup_base_head_width: int | None = setting(
        None, "mup: its n_embd / n_head, if wider models have wider heads, not more", ge=1)

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

    @property
    def width_ratio(self) -> float:
        """The width relative to that of the base model of muP."""
        return self.n_embd / self.mup_base_width

    @property
    def depth_ratio(self) -> float:
        """The depth relative to that of the base model of muP; 1 if depths are not scaled."""
        return self.n_layer / (self.mup_base_depth or self.n_layer)

    @property
    def query_scale(self) -> float:
        """The factor of queries, besides attention's 1 / sqrt(D).

        Under muP both together are proportional to 1 / D (arXiv:2203.03466, definition 4.1).
        """
        if self.parametrization == "standard" or self.mup_base_head_width is None:
            return 1.0
        return math.sqrt(self.mup_base_head_width / self.head_width)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        # The checks below divide by them.
        if self.n_head < 1 or self.n_embd < 1:
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
        if self.parametrization == "mup" and self.n_embd % self.n_head == 0:
            yield from self.mup_problems()

    def mup_problems(self) -> Iterator[str]:
        """One sentence for each setting that the rules of muP do not have."""
        width = self.head_width
        if self.mup_base_head_width is None and self.mup_base_width % width:
            yield (f"parametrization=mup: heads of width n_embd / n_head = {width} do not divide "
                   f"mup_base_width={self.mup_base_width}. Choose another n_head, or set "
                   "mup_base_head_width, the width of the heads of the base model.")
        if self.tie_head and self.norm == "rms":
            yield ("parametrization=mup with tie_head=true scales the gain of the last norm, and "
                   "norm=rms has none: choose norm=rms_gain or tie_head=false.")
