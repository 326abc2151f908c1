"""The results of evaluations, `evaluation.json`, as a table."""

import math
from typing import Any

from terminal import counted

# The number of each column, its title, and how it is written. Others have columns of their own.
COLUMNS = {"loss": ("loss", ".4f"), "perplexity": ("perplexity", ".2f"),
           "bits_per_byte": ("bits/byte", ".4f"), "accuracy": ("accuracy", ".1%"),
           "accuracy_normalised": ("acc. norm.", ".1%")}


def table(models: list[dict[str, Any]]) -> str:
    """One row for each model and text or task; numbers have their standard errors."""
    rows = cells(models)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def cells(models: list[dict[str, Any]]) -> list[list[str]]:
    """The table as rows of cells, with a row of titles."""
    # The entries with numbers: the loss on a text, and each of the tasks.
    measured = []
    for model in models:
        losses = [model["loss"]] if "loss" in model else []
        measured += [(model["name"], one) for one in [*losses, *model["tasks"]]]

    # A column for each number that any entry has: those have a standard error beside them.
    recorded = dict.fromkeys(name for _, one in measured for name in one)
    names = dict.fromkeys([*COLUMNS, *(name.removesuffix("_se") for name in recorded)])
    names = [name for name in names if f"{name}_se" in recorded]

    rows = [["model", "on", "size", *(COLUMNS.get(name, (name,))[0] for name in names)]]
    for model, one in measured:
        unit = "document" if "task" in one else "token"
        size = counted(one[f"{unit}s"], unit)
        numbers = [number(one, name) for name in names]
        rows.append([model, str(one.get("text") or one["task"]), size, *numbers])
    return rows


def number(measured: dict[str, Any], name: str) -> str:
    """A number with its standard error; empty if it was not measured."""
    value, error = measured.get(name), measured.get(f"{name}_se")
    if value is None:
        return ""
    style = COLUMNS.get(name, ("", ".4f"))[1]
    if abs(value) >= 1e9:
        style = ".2e"
    if error is None or not math.isfinite(error):
        return format(value, style)
    return f"{format(value, style)} ± {format(error, style)}"
