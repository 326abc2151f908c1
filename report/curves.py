"""Pictures of losses, by matplotlib: as SVG for a page, whose colours for ink and lines then follow it, and as PNG."""

from __future__ import annotations

import io
import math
import re
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import numpy as np

from report.history import AXES, History, are_numbers

INK, LINE = "#1b1f24", "#d0d6dc"
COLORS = ("#2f7fc1", "#d9702b", "#2f9e6e", "#c2569b", "#8a6fd1", "#a37f1f", "#d14d57", "#2f9fae")  # on white and black
BEST, WORST = (0xD9, 0x70, 0x2B), (0x9A, 0xA8, 0xB8)  # where there are more runs than colours
MOST_BANDS = 3  # runs whose losses are also drawn as they were, not smoothed
LABELS = {"steps": "step", "tokens": "tokens trained on", "seconds": "seconds of training"}
STYLE = {"font.size": 9, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
         "ytick.color": INK, "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False}


def new_figure(width: float, height: float, name: str) -> tuple[Any, AbstractContextManager[None]]:
    """A matplotlib figure in inches, and the style to draw it in. Raises ValueError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot, which would keep it
    except ImportError:
        raise ValueError("Curves need matplotlib: pip install matplotlib.") from None
    return Figure(figsize=(width, height), layout="constrained"), matplotlib.rc_context(STYLE | {"svg.hashsalt": name})


def color(number: int, count: int) -> str:
    """Of the run that came out as `number`, from 0: its own, or among many from the best one's to the last one's."""
    if count <= len(COLORS):
        return COLORS[number]
    share = (number / (count - 1)) ** 0.35  # the first few differ most
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(BEST, WORST, strict=True))


def draw_losses(axes: Any, runs: list[History], which: str, axis: str) -> None:
    """The "training" or "validation" losses of `runs`, the best first, against "steps", "tokens" or "seconds"."""
    column, few, drawn = AXES.index(axis), len(runs) <= len(COLORS), []
    for number, run in reversed(list(enumerate(runs))):  # the best on top
        points = getattr(run, which)
        x, mean, least, highest = points[:, column], points[:, 3], points[:, 4], points[:, 5]
        how = {"color": color(number, len(runs)), "gid": f"run-{number}"}
        if which == "training" and len(runs) <= MOST_BANDS:
            axes.plot(x, mean, linewidth=0.7, alpha=0.35, **how)
            axes.fill_between(x, least, highest, alpha=0.15, linewidth=0, **how)
            drawn.append(least)
        line = smooth(mean) if which == "training" else mean
        mark = "o" if few and len(points) <= 30 and which == "validation" else ""
        axes.plot(x, line, marker=mark, markersize=3, linewidth=1.5 if few else 1, label=run.name, **how)
        drawn.append(line)
    seen = np.concatenate(drawn)
    starts = [run.first_loss for run in runs if run.first_loss is not None]
    if len(seen) and (high := min(seen.max(), max(starts, default=math.inf))) > (low := seen.min()):
        margin = 0.04 * (high - low)  # what rises above where training began would hide the rest
        axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel=LABELS[axis], ylabel=f"{which} loss (nats a token)")
    thousands(axes)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of `[n]` around each place: of a fifteenth of all, fewer towards both ends."""
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, index[::-1]), len(values) // 30)
    sums = np.concatenate(([0.0], values.cumsum()))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def draw_slice(axes: Any, runs: list[History], key: str, numbers: dict[History, int]) -> None:
    """The score of each run against its value of the setting `key`; `numbers` are those of all runs."""
    values = [run.settings.get(key) for run in runs]
    numeric = are_numbers(values)
    places = sorted(set(values)) if numeric else sorted(set(map(str, values)))
    x = values if numeric else [places.index(str(value)) for value in values]
    for run, place in reversed(list(zip(runs, x, strict=True))):
        number = numbers[run]
        axes.plot([place], [run.score], "o", markersize=5, color=color(number, len(numbers)), gid=f"run-{number}")
    if not numeric:
        words = [place if len(place) <= 20 else f"{place[:9]}…{place[-10:]}" for place in places]
        leaning = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len("".join(words)) > 32 else {}
        axes.set_xticks(range(len(places)), words, **leaning)
        axes.set_xlim(-0.5, len(places) - 0.5)
    else:
        if logarithmic := min(places) > 0 and max(places) >= 10 * min(places):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        at = np.log(places) if logarithmic else np.array(places)
        words = [f"{place:g}" for place in places]
        if len(places) <= 5 and (np.diff(at) > np.ptp(at) * max(map(len, words)) / 36).all():  # letters that fit below
            axes.set_xticks(places, words)
            axes.minorticks_off()
    axes.set(xlabel=key, ylabel=runs[0].measure)


def thousands(axes: Any) -> None:
    """Large numbers on the x-axis in short, as 10 k and 2 M."""
    def short(value: float, _: int) -> str:
        power = next((power for power in (9, 6, 3) if abs(value) >= 10**power), 0)
        return f"{value / 10**power:g}{ {9: ' G', 6: ' M', 3: ' k', 0: ''}[power] }"

    axes.xaxis.set_major_formatter(short)


def curve_svg(runs: list[History], which: str, axis: str) -> str:
    """One picture as an <svg> element: its lines have class "run" and the run's number in data-run."""
    figure, style = new_figure(6, 3.6, f"{which} {axis}")
    with style:
        draw_losses(figure.subplots(), runs, which, axis)
        return as_element(figure, f"{which} loss against {axis}", [run.name for run in runs])


def slice_svg(runs: list[History], key: str, numbers: dict[History, int]) -> str:
    figure, style = new_figure(3.6, 2.7, f"slice {key}")
    with style:
        draw_slice(figure.subplots(), runs, key, numbers)
        return as_element(figure, f"{runs[0].measure} against {key}", [run.name for run in numbers])


def as_element(figure: Any, label: str, names: list[str]) -> str:
    """A figure as an <svg> element of a page, without a background; what it shows of a run says its name."""
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg "):].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    svg = re.sub(r'<g id="run-(\d+)">', lambda found: f'<g class="run" data-run="{found[1]}">'
                 f"<title>{escape(names[int(found[1])])}</title>", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)  # as fine as a screen
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def curves_png(runs: list[History]) -> bytes:
    """All six pictures of losses, side by side."""
    figure, style = new_figure(16, 8, "curves")
    with style:
        grid = figure.subplots(2, 3, squeeze=False)
        for row, which in enumerate(("validation", "training")):
            for column, axis in enumerate(AXES):
                draw_losses(grid[row][column], runs, which, axis)
        if len(runs) <= len(COLORS):
            lines, names = grid[0][0].get_legend_handles_labels()
            figure.legend(lines[::-1], names[::-1], loc="outside upper center", ncols=min(4, len(runs)))
        else:
            figure.suptitle(f"{len(runs)} runs; the best is orange: {runs[0].name}")
        return as_png(figure)


def slices_png(runs: list[History], keys: list[str], numbers: dict[History, int]) -> bytes:
    """The slices of all `keys`."""
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, style = new_figure(4 * columns, 3.2 * rows, "slices")
    with style:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, key in zip(grid, keys, strict=False):
            draw_slice(axes, runs, key, numbers)
        for axes in grid[len(keys):]:
            axes.set_axis_off()
        return as_png(figure)


def as_png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
