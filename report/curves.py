"""Draw runs: their losses, learning rates, gradient norms, speeds, and results against settings.

Lists of runs are sorted, the best first; the rank of a run decides its color.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from report.figures import (
    INK,
    abbreviate,
    as_image,
    label_categories,
    label_numbers,
    log_ticks,
    new_figure,
    number_texts,
    quiet,
    short_text,
    svg_element,
)
from report.history import AXES, LOSS, History
from report.runs import are_numbers

# These can be told apart on white and on black.
COLORS = ("#2f7fc1", "#d9702b", "#2f9e6e", "#c2569b", "#8a6fd1", "#a37f1f", "#d14d57", "#2f9fae")
TRAINING, VALIDATION = COLORS[0], COLORS[1]
# The ends of a scale for more runs than colors.
BEST, WORST = (0xD9, 0x70, 0x2B), (0x9A, 0xA8, 0xB8)
MAX_BANDS = 3  # runs whose training losses are also drawn without smoothing
DIAGNOSTICS = ("learning rate", "gradient norm", "tokens per second")
AXIS_LABELS = {"steps": "step", "tokens": "training tokens", "seconds": "seconds of training"}


def color(rank: int, count: int) -> str:
    """The color of a run: its own, or of many runs one on a scale from BEST to WORST."""
    if count <= len(COLORS):
        return COLORS[rank]
    # With an exponent below 1, the first few ranks differ most.
    share = (rank / (count - 1)) ** 0.35
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(BEST, WORST, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def draw_losses(axes: Any, runs: list[History], which: str, axis: str) -> None:
    """The "training" or "validation" losses of runs against "steps", "tokens" or "seconds"."""
    training = which == "training"
    drawn = []
    for rank, run in worst_first(runs):
        if run.unit_factor is not None:
            points = in_unit(run, which)
            bands = training and len(runs) <= MAX_BANDS
            drawn += draw_curve(axes, points, axis, training, bands, **line_style(rank, runs))
    limit_losses(axes, runs, drawn)
    unit = "nats per token" if runs[0].measure == LOSS else "bits per byte"
    axes.set_ylabel(f"{which} loss ({unit})")
    label_progress(axes, axis)


def draw_both_losses(axes: Any, run: History, axis: str) -> None:
    """Training and validation loss of one run."""
    training = {"color": TRAINING, "linewidth": 1.5, "label": "training, smoothed"}
    validation = {"color": VALIDATION, "linewidth": 1.5, "label": "validation"}
    drawn = draw_curve(axes, run.training, axis, smoothed=True, bands=True, **training)
    drawn += draw_curve(axes, run.validation, axis, smoothed=False, bands=False, **validation)
    limit_losses(axes, [run], drawn)
    axes.set_ylabel("loss (nats per token)")
    label_progress(axes, axis)
    axes.legend(loc="upper right")


def worst_first(runs: list[History]) -> list[tuple[int, History]]:
    """The runs with their ranks in the order of drawing: the best on top."""
    return list(enumerate(runs))[::-1]


def draw_curve(axes: Any, points: np.ndarray, axis: str, smoothed: bool, bands: bool,
               **style: Any) -> list[np.ndarray]:
    """Draw one curve `[n, 6]` and return the values. `bands` adds the values before smoothing."""
    x = points[:, AXES.index(axis)]
    mean, lowest, highest = points[:, 3:].T
    drawn = []
    # The values before smoothing: a pale line, and a band from the lowest to the highest.
    if bands:
        shared = {"color": style["color"], "gid": style.get("gid")}
        axes.plot(x, mean, linewidth=0.7, alpha=0.35, **shared)
        axes.fill_between(x, lowest, highest, alpha=0.15, linewidth=0, **shared)
        drawn.append(lowest)

    line = smooth(mean) if smoothed else mean
    # A single point is not a line, and evaluations can be few.
    few = 1 if smoothed else 30
    marker = "o" if len(points) <= few else ""
    axes.plot(x, line, marker=marker, markersize=3, **style)
    return [*drawn, line]


def line_style(rank: int, runs: list[History]) -> dict[str, Any]:
    name = short_text(runs[rank].name, 48)
    # matplotlib leaves labels that start with an underscore out of a legend.
    label = f" {name}" if name.startswith("_") else name
    width = 1.5 if len(runs) <= len(COLORS) else 1
    hue = color(rank, len(runs))
    return {"color": hue, "linewidth": width, "gid": f"run-{rank}", "label": label}


def in_unit(run: History, which: str) -> np.ndarray:
    """A curve of "training" or "validation" losses in the unit that the runs are compared by."""
    points = getattr(run, which).copy()
    points[:, 3:] *= run.unit_factor
    return points


def limit_losses(axes: Any, runs: list[History], drawn: list[np.ndarray]) -> None:
    """Cut off losses above those before training: they would flatten the rest."""
    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low = values.min()
    high = min(values.max(), highest_start(runs))
    if high > low:
        margin = 0.04 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def highest_start(runs: list[History]) -> float:
    """The highest loss before training, in the unit of comparison; infinite if none is known."""
    known = [run for run in runs if run.first_loss is not None and run.unit_factor is not None]
    return max((run.first_loss * run.unit_factor for run in known), default=math.inf)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of `[n]` around each place, over a fifteenth of all.

    Near the start the loss falls fast, so fewer values are averaged. At the end there are no values
    on one side: the curve goes straight to the end of the line that fits the last fifth best.
    Otherwise it would follow the noise of the last few values.
    """
    # The mean over `reach` values on each side, by differences of cumulative sums.
    index = np.arange(len(values))
    widest = len(values) // 30
    reach = np.minimum(np.minimum(index // 3, index[::-1]), widest)
    sums = np.concatenate(([0.0], values.cumsum()))
    smoothed = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)

    # A straight line to the end.
    if widest:
        last_fifth = values[-6 * widest - 1 :]
        _, end = np.polyfit(np.arange(-6 * widest, 1), last_fifth, 1)
        smoothed[-widest - 1 :] = np.linspace(smoothed[-widest - 1], end, widest + 1)
    return smoothed


def label_progress(axes: Any, axis: str) -> None:
    """An x-axis for "steps", "tokens" or "seconds" of training."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(AXIS_LABELS[axis])
    locator = MaxNLocator(7, integer=axis != "seconds", steps=[1, 2, 5, 10], min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)
    abbreviate(axes.xaxis)


def draw_diagnostic(axes: Any, runs: list[History], name: str) -> None:
    """The learning rate, gradient norm or speed of runs against steps."""
    # Draw the curves.
    peaks = []
    for rank, run in worst_first(runs):
        points = run.diagnostics.get(name, np.empty((0, 6)))
        bands = name == "gradient norm" and len(runs) <= MAX_BANDS
        smoothed = name in DIAGNOSTICS[1:]
        draw_curve(axes, points, "steps", smoothed, bands, **line_style(rank, runs))
        peak = points[:, 3].max(initial=0)
        if peak > 0:
            peaks.append(peak)

    # Learning rates of very different size are drawn on a log axis, all else from 0.
    if name == "learning rate" and peaks and max(peaks) >= 10 * min(peaks):
        axes.set_yscale("log")
        # Schedules end near 0, which would take most of a log axis.
        axes.set_ylim(min(peaks) / 20, 1.5 * max(peaks))
        log_ticks(axes.yaxis)
    elif peaks:
        axes.set_ylim(0, 1.05 * max(peaks))
        abbreviate(axes.yaxis)
    axes.set_ylabel(name)
    label_progress(axes, "steps")


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


def losses_svg(runs: list[History], axis: str) -> str:
    """<svg> elements of the losses: one picture for one run, two for several."""
    names = [run.name for run in runs]
    if len(runs) == 1:
        title = f"training and validation loss against {axis}"
        draw = functools.partial(draw_both_losses, run=runs[0], axis=axis)
        return svg_element(draw, names, title, (5.4, 3.2))
    pictures = ""
    for which in ("validation", "training"):
        title = f"{which} loss against {axis}"
        draw = functools.partial(draw_losses, runs=runs, which=which, axis=axis)
        pictures += svg_element(draw, names, title, (4.8, 3.2))
    return pictures


def diagnostic_svg(runs: list[History], name: str) -> str:
    names = [run.name for run in runs]
    title = f"{name} against steps"
    return svg_element(lambda axes: draw_diagnostic(axes, runs, name), names, title, (3.8, 2.5))


def slice_svg(runs: list[History], key: str, ranked: list[History]) -> str:
    names = [run.name for run in ranked]
    title = f"{runs[0].measure} against {key}"
    return svg_element(lambda axes: draw_slice(axes, runs, key, ranked), names, title, (3.6, 2.7))


def curves_png(runs: list[History]) -> bytes:
    """All pictures of losses and diagnostics, against steps, tokens and seconds."""
    # A row or two of losses, and one of diagnostics.
    rows = 2 if len(runs) == 1 else 3
    figure, style = new_figure(16, 4 * rows, "curves")
    with style, quiet():
        grid = figure.subplots(rows, 3, squeeze=False)
        for column, axis in enumerate(AXES):
            if len(runs) == 1:
                draw_both_losses(grid[0][column], runs[0], axis)
            else:
                draw_losses(grid[0][column], runs, "validation", axis)
                draw_losses(grid[1][column], runs, "training", axis)
        for column, name in enumerate(DIAGNOSTICS):
            draw_diagnostic(grid[-1][column], runs, name)
        # One legend of the runs for all pictures.
        add_names(figure, grid[-1][0], runs)
        return as_image(figure, "png")


def slices_png(runs: list[History], keys: list[str], ranked: list[History]) -> bytes:
    """The slices of all `keys`."""
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, style = new_figure(4 * columns, 3.2 * rows, "slices")
    with style, quiet():
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        # The last row may have places without a slice.
        for axes in grid[len(keys) :]:
            axes.set_axis_off()
        for axes, key in zip(grid, keys, strict=False):
            draw_slice(axes, runs, key, ranked)
        return as_image(figure, "png")


def loss_picture(runs: list[History], kind: str) -> bytes:
    """The losses of runs against steps, as a file of the type `kind`: png, svg or pdf.

    One run has its training and validation loss, several have their validation losses.
    """
    figure, style = new_figure(7, 4, "loss")
    with style, quiet():
        axes = figure.subplots()
        if len(runs) == 1:
            draw_both_losses(axes, runs[0], "steps")
        else:
            draw_losses(axes, runs, "validation", "steps")
        add_names(figure, axes, runs)
        return as_image(figure, kind)


def add_names(figure: Any, axes: Any, runs: list[History]) -> None:
    """The name of one run or a legend of several above a figure; of many, only the best's name."""
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    elif len(runs) <= len(COLORS):
        lines, names = axes.get_legend_handles_labels()
        columns = min(3, len(runs))
        figure.legend(lines[::-1], names[::-1], loc="outside upper center", ncols=columns)
    else:
        figure.suptitle(f"{len(runs)} runs; the best is orange: {runs[0].name}")
