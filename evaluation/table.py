"""The results of an evaluation as one table of text."""

from __future__ import annotations

import math
from typing import Any

# The title of each column of numbers, the name of the number, and how it is written.
COLUMNS = (("loss", "loss", ".4f"), ("perplexity", "perplexity", ".2f"),
           ("bits/byte", "bits_per_byte", ".4f"), ("accuracy", "accuracy", ".1%"),
           ("acc. norm.", "accuracy_normalised", ".1%"))


def table(models: list[dict[str, Any]]) -> str:
    """One row for each model and text or task; numbers have their standard errors."""
    rows = []
    for model in models:
        measured = [model["loss"]] if "loss" in model else []
        for one in [*measured, *model["tasks"]]:
            name = one.get("text") or one["task"]
            count = one.get("tokens") or one["documents"]
            unit = "tokens" if "tokens" in one else "documents"
            rows.append([model["name"], name, f"{count:,} {unit}", *numbers(one)])
    titles = ["model", "on", "size", *(title for title, _, _ in COLUMNS)]
    columns = [column for column in zip(titles, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for line in zip(*columns, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def numbers(measured: dict[str, Any]) -> list[str]:
    """Each number as a cell with its standard error; empty where it was not measured."""
    cells = []
    for _, name, style in COLUMNS:
        cell = ""
        if name in measured:
            cell = format(measured[name], style)
            error = measured[f"{name}_se"]
            if math.isfinite(error):
                cell += f" ± {format(error, style)}"
        cells.append(cell)
    return cells
