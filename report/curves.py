"""Draw what a run records at each step: losses, learning rate, gradient norm, speed.

Also the results of runs against the values of a setting.

Lists of runs are sorted, the best first; the rank of a run decides its color.
"""

import math
from typing import Any

import numpy as np

from report import labels
from report.colors import COLORS, color
from report.figures import INK
from report.history import AXES, LOSS, History
from report.runs import are_numbers

TRAINING, VALIDATION = COLORS[0], COLORS[1]
BOTH = "training and validation"
MAX_BANDS = 3  # runs whose training losses are also drawn without smoothing
DIAGNOSTICS = ("learning rate", "gradient norm", "tokens per second")
AXIS_LABELS = {"steps": "step", "tokens": "training tokens", "seconds": "seconds of training"}


def loss_kinds(runs: list[History]) -> list[str]:
    """The pictures of losses: for one run, BOTH in one picture; for several, one for each."""
    return [BOTH] if len(runs) == 1 else ["validation", "training"]


def draw_losses(axes: Any, runs: list[History], which: str, axis: str) -> None:
    """Losses of runs against "steps", "tokens" or "seconds".

    `which` is "training" or "validation", or BOTH for a single run.
    """
    if which == BOTH:
        training = {"color": TRAINING, "linewidth": 1.5, "label": "training, smoothed"}
        validation = {"color": VALIDATION, "linewidth": 1.5, "label": "validation"}
        drawn = draw_curve(axes, runs[0].training, axis, smoothed=True, bands=True, **training)
        drawn += draw_curve(axes, runs[0].validation, axis, False, False, **validation)
        if drawn:
            axes.legend(loc="upper right")
    else:
        drawn = []
        smoothed = which == "training"
        bands = smoothed and len(runs) <= MAX_BANDS
        # The best run comes last: it is drawn on top.
        for rank, run in reversed(list(enumerate(runs))):
            if run.unit_factor is not None:
                points, style = in_unit(run, which), line_style(rank, runs)
                drawn += draw_curve(axes, points, axis, smoothed, bands, **style)
    limit_losses(axes, runs, drawn)
    unit = "nats per token" if runs[0].measure == LOSS else "bits per byte"
    axes.set_ylabel(f"loss ({unit})" if which == BOTH else f"{which} loss ({unit})")
    label_progress(axes, axis)


def draw_curve(axes: Any, points: np.ndarray, axis: str, smoothed: bool, bands: bool,
               **style: Any) -> list[np.ndarray]:
    """Draw one curve `[n, 6]` and return the values. `bands` adds the values before smoothing."""
    points = finite(points)
    # A line without points would still be named in the legend.
    if not len(points):
        return []
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
    marker = "o" if len(points) <= (1 if smoothed else 30) else ""
    axes.plot(x, line, marker=marker, markersize=3, **style)
    return [*drawn, line]


def finite(points: np.ndarray) -> np.ndarray:
    """The points of a curve `[n, 6]` without NaN and infinite values, as of a step that failed."""
    return points[np.isfinite(points).all(1)]


def line_style(rank: int, runs: list[History]) -> dict[str, Any]:
    name = labels.short_text(runs[rank].name, 48)
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
    values = np.concatenate([*drawn, []])
    values = values[np.isfinite(values)]
    low = values.min(initial=math.inf)
    high = min(values.max(initial=-math.inf), highest_start(runs))
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
        _, end = np.polyfit(np.arange(-6 * widest, 1), values[-6 * widest - 1 :], 1)
        smoothed[-widest - 1 :] = np.linspace(smoothed[-widest - 1], end, widest + 1)
    return smoothed


def label_progress(axes: Any, axis: str) -> None:
    """An x-axis for "steps", "tokens" or "seconds" of training."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(AXIS_LABELS[axis])
    locator = MaxNLocator(7, integer=axis != "seconds", steps=[1, 2, 5, 10], min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)
    labels.abbreviate(axes.xaxis)


def draw_diagnostic(axes: Any, runs: list[History], name: str) -> None:
    """The learning rate, gradient norm or speed of runs against steps."""
    # Draw the curves.
    peaks = []
    for rank, run in reversed(list(enumerate(runs))):
        points = finite(run.diagnostics.get(name, np.empty((0, 6))))
        bands = name == "gradient norm" and len(runs) <= MAX_BANDS
        draw_curve(axes, points, "steps", name in DIAGNOSTICS[1:], bands, **line_style(rank, runs))
        peaks.append(points[:, 3].max(initial=0))
    peaks = [peak for peak in peaks if peak > 0]

    # Learning rates of very different size are drawn on a log axis, all else from 0.
    if name == "learning rate" and peaks and max(peaks) >= 10 * min(peaks):
        axes.set_yscale("log")
        # Schedules end near 0, which would take most of a log axis.
        axes.set_ylim(min(peaks) / 20, 1.5 * max(peaks))
        labels.log_ticks(axes.yaxis)
    elif peaks:
        axes.set_ylim(0, 1.05 * max(peaks))
        labels.abbreviate(axes.yaxis)
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
    categories = not are_numbers(different) or spans_zero(different) or exceeds_axis(different)
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
        labels.label_categories(axes, labels.number_texts(different))
    else:
        labels.label_numbers(axes, different)
    if len(different) <= 8:
        draw_medians(axes, x, scores)
    axes.set(xlabel=key, ylabel=runs[0].measure)


def spans_zero(values: list[float]) -> bool:
    """Whether a few numbers from 0 on differ too much for one scale, such as 0, 0.001 and 0.1."""
    positive = [value for value in values if value > 0]
    few_from_zero = min(values) == 0 and 1 < len(values) <= 8
    return few_from_zero and max(positive) >= 100 * min(positive)


def exceeds_axis(values: list[float]) -> bool:
    """Whether some of the numbers are so large or small that matplotlib's margins overflow."""
    return any(value and not 1e-100 < abs(value) < 1e100 for value in values)


def draw_medians(axes: Any, x: list[float], scores: list[float]) -> None:
    """A short line at the median of the scores that share a value, where several do."""
    for place in set(x):
        here = [score for at, score in zip(x, scores, strict=True) if at == place]
        if len(here) > 1:
            axes.plot([place], [np.median(here)], "_", markersize=20, color=INK)
