"""The configuration: dataclasses, YAML presets and command-line overrides.

    from conf import compose
    settings = compose(["training=smoke", "name=first"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.settings import Settings


def compose(overrides: list[str]) -> Settings:
    """The settings of a training run, from `overrides` as on the command line of train.py.

    Raises ConfigError, a ValueError that lists every problem. Changes no global state.
    """
    # Importing Hydra takes time, and modules that need no settings import this package, too.
    from conf import schema

    return schema.compose("config", overrides)
