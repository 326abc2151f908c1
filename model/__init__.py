"""The model: tensors only, no files, no text, no training.

`GPT` is imported on first use, so the settings can be read without torch.
"""

from typing import TYPE_CHECKING, Any

from model.config import GPTConfig

if TYPE_CHECKING:
    from model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]


def __getattr__(name: str) -> Any:
    if name != "GPT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from model.gpt import GPT

    return GPT
