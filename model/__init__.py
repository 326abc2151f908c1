"""The Transformer. Knows tensors, nothing else.

`from model import GPT` imports torch then: the settings in `model.config` are read without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.config import GPTConfig

if TYPE_CHECKING:
    from model.attention import CausalSelfAttention, KVCache
    from model.gpt import GPT
    from model.undrawn import Undrawn

__all__ = ["GPT", "CausalSelfAttention", "GPTConfig", "KVCache", "Undrawn"]
MODULES = {
    "GPT": "gpt",
    "CausalSelfAttention": "attention",
    "KVCache": "attention",
    "Undrawn": "undrawn",
}


def __getattr__(name: str) -> Any:
    """A class of one of the modules, imported now."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
