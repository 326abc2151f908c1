"""The model: tensors only, no files, no text, no training.

Each class is imported on first use, so `model.config` can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.config import GPTConfig

if TYPE_CHECKING:
    from model.attention import CausalSelfAttention, KVCache
    from model.gpt import GPT
    from model.skip_init import SkipInit

__all__ = ["GPT", "CausalSelfAttention", "GPTConfig", "KVCache", "SkipInit"]
MODULES = {
    "GPT": "gpt",
    "CausalSelfAttention": "attention",
    "KVCache": "attention",
    "SkipInit": "skip_init",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
