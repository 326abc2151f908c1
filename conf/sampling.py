"""The sampling settings: length, randomness, and the text to stop at.

They are here, below `generation`, since the command line checks them before it imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from setting import SettingsBase, setting

# A decoder is made for these; the others can change from text to text.
FIXED = ("cache", "int8")


@dataclass(frozen=True)
class SamplingConfig(SettingsBase):
    """How a model continues a text. The prompt, these settings and the seed decide the result."""

    max_new_tokens: int = setting(200, "the largest number of tokens to generate", ge=1)
    temperature: float = setting(0.8, "randomness; 0: always the most likely token", ge=0)
    top_k: int = setting(50, "sample from the k most likely tokens; 0: from all", ge=0)
    top_p: float = setting(
        0.9, "sample from the fewest tokens with this total probability; 1: from all", gt=0, le=1)
    seed: int = setting(1337, "the same seed gives the same text", ge=0)
    stop: str = setting("", "end before this text, taken literally (in bash: $'\\n\\n')")
    cache: bool = setting(True, "false: recompute the whole context for each token")
    int8: bool = setting(
        False, "8-bit weights, on a CPU with gcc or clang: 2 to 3 times as fast, less accurate")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.int8 and not self.cache:
            yield "int8=true needs the cache: leave out cache=false."

    @property
    def decoder_precision(self) -> str:
        """The precision of a decoder's weights; empty for that of autocast."""
        return "int8" if self.int8 else ""
