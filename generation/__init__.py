"""Text generation with a trained model: `from generation import open_run, open_weights`.

`Engine`, `open_run` and `open_weights` import torch on first use, as the names of `model` do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from conf.sampling import SamplingConfig

if TYPE_CHECKING:
    from generation.engine import Engine, open_run, open_weights

__all__ = ["Engine", "SamplingConfig", "open_run", "open_weights"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("generation.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
