"""nanoGPT's own model, from a checkout that the user has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def nanogpt_module(peer: Path) -> ModuleType:
    """The module `model.py` of the checkout `peer`."""
    specification = importlib.util.spec_from_file_location("nanogpt_model", peer / "model.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt_model"] = module
    specification.loader.exec_module(module)
    return module
