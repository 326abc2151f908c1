"""The rules of text generation: length, randomness, and where to stop.

They lie in `conf`, below `generation`, since the command line checks them before it imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """How a model continues a text. The prompt, the rules and the seed decide the result."""

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 50  # 0: no such limit
    top_p: float = 0.9  # the fewest likely tokens with this total probability; 1: no such limit
    seed: int = 1337
    stop: str = ""  # end at this text, which is not printed
    cache: bool = True  # off: recompute the whole context for each token
    int8: bool = False  # 8-bit weights, on the CPU: see docs/benchmarks.md for speed and accuracy

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if self.max_new_tokens < 1:
            yield f"max_new_tokens={self.max_new_tokens} must be at least 1."
        for name in ("top_k", "seed"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must be at least 0."
        if not 0 <= self.temperature < float("inf"):
            yield (f"temperature={self.temperature} must be at least 0; 0 always takes the most "
                   "likely token.")
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p} is a probability: choose 0 < top_p <= 1."
        if self.int8 and not self.cache:
            yield "int8=true needs the cache: leave cache=false out."

    @property
    def decoder_precision(self) -> str:
        """The precision of a decoder's weights; empty for that of autocast."""
        return "int8" if self.int8 else ""
