"""The text of --help: presets, settings with their values, flags."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from conf.presets import groups, options
from conf.schema import SCHEMAS, compose
from setting import as_word, type_hints

FLAGS = """Flags:
  --help      this text
  --cfg job   print the composed configuration, run nothing
"""
SWEEP_FLAG = """\
  -m          sweep: one run for each combination of values separated by commas; jobs=2 at
              a time, each in processes_per_job=2 processes, or on a cluster with
              hydra/launcher=slurm; --cfg job prints their settings
"""
HELP_COLUMNS = 100
NAME_COLUMNS = 32


def help_text(root: str | type, doc: str) -> str:
    """The entry point's docstring, the presets, the settings with their values, the flags."""
    parts = [doc.strip()]
    # train.py: presets, and the settings of the default run.
    if root == "config":
        presets = ["Presets, as in model=gpt2; the files are in conf/:"]
        for group in groups():
            presets += two_columns(f"{group}=", ", ".join(options(group)))
        values = help_lines(compose("config", []))
        settings = ["Settings, with their values in the default run:", *values]
        return "\n\n".join([*parts, "\n".join(presets), "\n".join(settings), FLAGS + SWEEP_FLAG])
    # Other commands.
    schema = SCHEMAS.get(root, root)
    if isinstance(schema, type):
        parts.append("\n".join(["Settings, with their defaults:", *help_lines(schema())]))
    return "\n\n".join([*parts, FLAGS])


def help_lines(settings: Any, prefix: str = "") -> Iterator[str]:
    """The lines of --help about a dataclass instance: name=value and the help text of each field.

    Fields without a help text are not for users, and left out.
    """
    hints = type_hints(type(settings))
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            yield ""
            yield from help_lines(value, f"{prefix}{one.name}.")
            continue
        text = one.metadata.get("help", "")
        if not text:
            continue
        # The values to choose from.
        if get_origin(hints[one.name]) is Literal:
            text += f" ({', '.join(get_args(hints[one.name]))})"
        yield from two_columns(f"{prefix}{one.name}={as_word(value)}", text)


def two_columns(name: str, text: str) -> list[str]:
    """A line of a table with two columns, and the lines that a long `text` continues on."""
    indent = " " * NAME_COLUMNS
    if len(name) > NAME_COLUMNS - 4:
        return [f"  {name}", *two_columns("", text)]
    start = f"  {name}".ljust(NAME_COLUMNS)
    return textwrap.wrap(text, HELP_COLUMNS, initial_indent=start, subsequent_indent=indent,
                         break_on_hyphens=False)
