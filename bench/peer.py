"""nanoGPT's own model, from a checkout that the user has."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def peer_problems(peer: str) -> Iterator[str]:
    """What is wrong with a setting that may name a checkout."""
    if peer and not Path(peer, "model.py").is_file():
        yield f"peer={peer} is no nanoGPT checkout: it has no model.py."


def nanogpt_module(peer: Path) -> ModuleType:
    """The module `model.py` of the checkout `peer`."""
    specification = importlib.util.spec_from_file_location("nanogpt_model", peer / "model.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt_model"] = module
    specification.loader.exec_module(module)
    return module
