"""Text generation with a trained model: `from generation import open_run`.

`Engine` and `open_run` import torch on first use, as the names of `model` do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from conf.sampling import SamplingConfig

if TYPE_CHECKING:
    from generation.engine import Engine, open_run

__all__ = ["Engine", "SamplingConfig", "open_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("generation.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
