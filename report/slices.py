"""Draw the scores of runs against the values of one setting."""

from __future__ import annotations

from typing import Any

import numpy as np

from report.colors import color
from report.curves import highest_start
from report.figures import INK
from report.history import History
from report.labels import label_categories, label_numbers, number_texts, short_text
from report.runs import are_numbers


def draw_slice(axes: Any, runs: list[History], key: str, ranked: list[History]) -> None:
    """The score of each run against its value of the setting `key`; `ranked` are all runs, sorted.

    A triangle is a run that ended above its first loss. A short line is the median of the runs that
    share a value.
    """
    # Place the runs along x: by their numbers, or in categories.
    values = [run.settings.get(key) for run in runs]
    values = [value if are_numbers([value]) else str(value) for value in values]
    different = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    categories = not are_numbers(different) or spans_zero(different)
    x = [different.index(value) for value in values] if categories else values

    # Draw a mark for each run, the best on top.
    highest = highest_start(runs)
    scores = [min(run.score, highest) for run in runs]
    axes.margins(x=0.08)
    for run, place, score in reversed(list(zip(runs, x, scores, strict=True))):
        marker = "o" if run.score <= highest else "^"
        rank = ranked.index(run)
        hue = color(rank, len(ranked))
        axes.plot([place], [score], marker, markersize=5, color=hue, gid=f"run-{rank}")

    # Label the axes.
    if categories:
        label_categories(axes, [short_text(text) for text in number_texts(different)])
    else:
        label_numbers(axes, different)
    if len(different) <= 8:
        draw_medians(axes, x, scores)
    axes.set(xlabel=key, ylabel=runs[0].measure)


def spans_zero(values: list[float]) -> bool:
    """Whether a few numbers from 0 on differ too much for one scale, such as 0, 0.001 and 0.1."""
    positive = [value for value in values if value > 0]
    few_from_zero = min(values) == 0 and 1 < len(values) <= 8
    return few_from_zero and max(positive) >= 100 * min(positive)


def draw_medians(axes: Any, x: list[float], scores: list[float]) -> None:
    """A short line at the median of the scores that share a value, where several do."""
    # Fix the limits: the lines have the same length in units of the axes.
    axes.set_xlim(axes.get_xlim())
    to_axes = axes.transData + axes.transAxes.inverted()
    for place in set(x):
        here = [score for at, score in zip(x, scores, strict=True) if at == place]
        if len(here) > 1:
            middle = to_axes.transform((place, 1.0))[0]
            left, right = max(0.0, middle - 0.05), min(1.0, middle + 0.05)
            axes.axhline(float(np.median(here)), left, right, color=INK, linewidth=1)
