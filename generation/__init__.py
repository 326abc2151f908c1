"""Text generation with a trained model: `from generation import open_run`.

The names below import torch on first use, as in `model`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conf.sampling import SamplingConfig
    from generation.engine import Engine, open_run

__all__ = ["Engine", "SamplingConfig", "open_run"]
MODULES = {
    "Engine": "generation.engine",
    "SamplingConfig": "conf.sampling",
    "open_run": "generation.engine",
}


def __getattr__(name: str) -> Any:
    """A class or function of one of the modules, imported now."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
