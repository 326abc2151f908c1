"""The model: tensors only, no files, no text, no training.

`GPT` and `SkipInit` are imported on first use, so the settings can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.config import GPTConfig

if TYPE_CHECKING:
    from model.gpt import GPT
    from model.skip_init import SkipInit

__all__ = ["GPT", "GPTConfig", "SkipInit"]
MODULES = {"GPT": "model.gpt", "SkipInit": "model.skip_init"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
