"""Optional packages, which are imported in the function that needs them."""

from importlib import import_module
from types import ModuleType


def import_optional(name: str, needed_by: str, packages: str) -> ModuleType:
    """Import a module. Without it, raises ValueError: what needs it, and what to install."""
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"{needed_by}: pip install {packages}.") from None
