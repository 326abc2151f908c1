"""Draw losses and settings of runs with matplotlib: as SVG for a page, whose colours it follows, and as PNG."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from report.history import AXES, LOSS, History, are_numbers

INK, LINE = "#1b1f24", "#d0d6dc"
# These can be told apart on white and on black.
COLORS = ("#2f7fc1", "#d9702b", "#2f9e6e", "#c2569b", "#8a6fd1", "#a37f1f", "#d14d57", "#2f9fae")
TRAINING, VALIDATION = COLORS[0], COLORS[1]
BEST, WORST = (0xD9, 0x70, 0x2B), (0x9A, 0xA8, 0xB8)  # the ends of a scale, for more runs than colours
MOST_BANDS = 3  # runs whose training losses are also drawn unsmoothed
MOST_CATEGORIES = 16  # labels below a slice
DIAGNOSTICS = ("learning rate", "gradient norm", "tokens per second")
PICTURES = (".png", ".svg", ".pdf")
LABELS = {"steps": "step", "tokens": "training tokens", "seconds": "seconds of training"}
STYLE = {"font.size": 9, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
         "ytick.color": INK, "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
         "legend.frameon": False, "text.parse_math": False}


def new_figure(width: float, height: float, name: str) -> tuple[Any, AbstractContextManager[None]]:
    """A matplotlib figure in inches, and the style to draw it in. Raises ValueError if matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # pyplot would keep the figure
    except ImportError:
        raise ValueError("Curves need matplotlib: pip install matplotlib.") from None
    return Figure(figsize=(width, height), layout="constrained"), matplotlib.rc_context(STYLE | {"svg.hashsalt": name})


def color(number: int, count: int) -> str:
    """The colour of the run with the rank `number`, from 0: its own, or among many one between BEST and WORST."""
    if count <= len(COLORS):
        return COLORS[number]
    share = (number / (count - 1)) ** 0.35  # the first few differ most
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(BEST, WORST, strict=True))


def draw_losses(axes: Any, runs: list[History], which: str, axis: str) -> None:
    """The "training" or "validation" losses of `runs`, the best first, against "steps", "tokens" or "seconds"."""
    drawn = []
    for number, run in reversed(list(enumerate(runs))):  # the best on top
        if run.unit is not None:
            bands = which == "training" and len(runs) <= MOST_BANDS
            drawn += draw_curve(axes, in_unit(run, which), axis, which == "training", bands, **line_of(number, runs))
    limit_losses(axes, runs, drawn)
    axes.set(ylabel=f"{which} loss ({unit_of(runs)})")
    label_progress(axes, axis)


def draw_both_losses(axes: Any, run: History, axis: str) -> None:
    """Training and validation loss of one run against "steps", "tokens" or "seconds"."""
    drawn = draw_curve(axes, run.training, axis, True, True, color=TRAINING, linewidth=1.5, label="training, smoothed")
    drawn += draw_curve(axes, run.validation, axis, False, False, color=VALIDATION, linewidth=1.5, label="validation")
    limit_losses(axes, [run], drawn)
    axes.set(ylabel="loss (nats per token)")
    label_progress(axes, axis)
    axes.legend(loc="upper right")


def draw_curve(axes: Any, points: np.ndarray, axis: str, smoothed: bool, bands: bool, **style: Any) -> list[np.ndarray]:
    """One curve `[n, 6]`; returns the values that were drawn. `bands` also shows what smoothing leaves out."""
    x, mean, lowest, highest = points[:, AXES.index(axis)], points[:, 3], points[:, 4], points[:, 5]
    drawn = []
    if bands:
        hue, gid = style["color"], style.get("gid")
        axes.plot(x, mean, linewidth=0.7, alpha=0.35, color=hue, gid=gid)
        axes.fill_between(x, lowest, highest, alpha=0.15, linewidth=0, color=hue, gid=gid)
        drawn.append(lowest)
    line = smooth(mean) if smoothed else mean
    single = len(points) == 1  # which is no line
    axes.plot(x, line, marker="o" if single or (not smoothed and len(points) <= 30) else "", markersize=3, **style)
    return [*drawn, line]


def line_of(number: int, runs: list[History]) -> dict[str, Any]:
    """The style of the curves of the run with the rank `number`."""
    return {"color": color(number, len(runs)), "linewidth": 1.5 if len(runs) <= len(COLORS) else 1,
            "gid": f"run-{number}", "label": label(runs[number])}


def in_unit(run: History, which: str) -> np.ndarray:
    """The curve of "training" or "validation" losses in the unit that the runs are compared by."""
    points = getattr(run, which).copy()
    points[:, 3:] *= run.unit
    return points


def unit_of(runs: list[History]) -> str:
    return "nats per token" if runs[0].measure == LOSS else "bits per byte"


def limit_losses(axes: Any, runs: list[History], drawn: list[np.ndarray]) -> None:
    """Cut off what is above the losses that the runs started from: it would flatten the rest."""
    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values) and (high := min(values.max(), highest_start(runs))) > (low := values.min()):
        margin = 0.04 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def highest_start(runs: list[History]) -> float:
    """The highest loss before training, in the unit of the runs' measure; infinite if none is known."""
    starts = [run.first_loss * run.unit for run in runs if run.first_loss is not None and run.unit is not None]
    return max(starts, default=math.inf)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of `[n]` around each place, over a fifteenth of all.

    Near the start the loss falls fast, so fewer values are averaged. At the end there is nothing to average on one
    side: the curve goes straight to where the line that fits the last fifth best ends. Otherwise it would follow
    the noise of the last few values.
    """
    index, widest = np.arange(len(values)), len(values) // 30
    reach = np.minimum(np.minimum(index // 3, index[::-1]), widest)
    sums = np.concatenate(([0.0], values.cumsum()))
    smoothed = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    if widest:
        _, height = np.polyfit(np.arange(-6 * widest, 1), values[-6 * widest - 1:], 1)
        smoothed[-widest - 1:] = np.linspace(smoothed[-widest - 1], height, widest + 1)
    return smoothed


def draw_diagnostic(axes: Any, runs: list[History], name: str) -> None:
    """The learning rate, gradient norm or speed of `runs` against steps."""
    peaks = []
    for number, run in reversed(list(enumerate(runs))):
        points = run.diagnostics.get(name, np.empty((0, 6)))
        bands = len(runs) <= MOST_BANDS and name == "gradient norm"
        draw_curve(axes, points, "steps", name != "learning rate", bands, **line_of(number, runs))
        if len(points):
            peaks.append(points[:, 3].max())
    positive = [peak for peak in peaks if peak > 0]
    if name == "learning rate" and positive and max(positive) >= 10 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 20, 1.5 * max(positive))  # schedules end near 0
        log_ticks(axes.yaxis)
    elif positive:
        axes.set_ylim(0, 1.05 * max(positive))
        abbreviate(axes.yaxis)
    axes.set(ylabel=name)
    label_progress(axes, "steps")


def draw_slice(axes: Any, runs: list[History], key: str, numbers: dict[History, int]) -> None:
    """The score of each run against its value of the setting `key`; `numbers` are the ranks of all runs.

    A short line is the median of the runs that share a value.
    """
    values = [run.settings.get(key) for run in runs]
    even = not are_numbers(values) or spans_zero(values)
    places = distinct(values)
    x = [places.index(value) if even else value for value in map(comparable_value, values)]
    highest = highest_start(runs)
    axes.margins(x=0.08)
    for run, place in reversed(list(zip(runs, x, strict=True))):
        number = numbers[run]
        axes.plot([place], [min(run.score, highest)], "o" if run.score <= highest else "^", markersize=5,
                  color=color(number, len(numbers)), gid=f"run-{number}")
    if even:
        label_categories(axes, [short_text(text) for text in number_texts(places)])
    else:
        label_numbers(axes, places)
    if len(places) <= 8:
        draw_medians(axes, x, [min(run.score, highest) for run in runs])
    axes.set(xlabel=key, ylabel=runs[0].measure)


def comparable_value(value: Any) -> Any:
    """A number as it is, anything else as text."""
    return value if are_numbers([value]) else str(value)


def distinct(values: list[Any]) -> list[Any]:
    """The different values of a setting: numbers in their order, then texts in theirs."""
    return sorted(set(map(comparable_value, values)), key=lambda value: (isinstance(value, str), value))


def spans_zero(values: list[float]) -> bool:
    """Whether a few numbers from 0 on differ too much for one scale, such as 0, 0.001 and 0.1."""
    positive = [value for value in values if value > 0]
    return min(values) == 0 and len(set(values)) <= 8 and bool(positive) and max(positive) >= 100 * min(positive)


def draw_medians(axes: Any, x: list[float], scores: list[float]) -> None:
    """A short line at the median of the scores that share a value, where several do."""
    low, high = axes.get_xlim()
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.set_xlim(low, high)
    for place in set(x):
        here = [score for at, score in zip(x, scores, strict=True) if at == place]
        if len(here) > 1:
            middle = to_axes.transform((place, 1.0))[0]
            axes.axhline(float(np.median(here)), max(0.0, middle - 0.05), min(1.0, middle + 0.05), color=INK, linewidth=1)


def label_categories(axes: Any, texts: list[str]) -> None:
    """Texts at 0, 1, 2, ...: level if they fit, else slanted, and not all of them if there are many."""
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len("".join(texts)) > 32 else {}
    every = math.ceil(len(texts) / MOST_CATEGORIES)
    axes.set_xticks(range(0, len(texts), every), texts[::every], **slanted)
    axes.set_xlim(-0.5, len(texts) - 0.5)


def label_numbers(axes: Any, places: list[float]) -> None:
    """An x-axis for numbers, on a log scale if they span a factor of ten; few values are the ticks themselves."""
    logarithmic = min(places) > 0 and max(places) >= 10 * min(places)
    if logarithmic:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(5, integer=all(isinstance(place, int) for place in places)))
        axes.xaxis.set_major_formatter(lambda value, _: number_text(value, 6))
    at, texts = np.log(places) if logarithmic else np.array(places), number_texts(places)
    letters = max(map(len, texts))
    if len(places) <= 5 and (np.diff(at) > np.ptp(at) * letters / 36).all():  # as many as fit side by side
        axes.set_xticks(places, texts)


def log_ticks(axis: Any) -> None:
    """At most six plain numbers along a log axis: 1, 2 and 5 times powers of ten, or powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def ticks(factors: tuple[int, ...], every: int) -> list[float]:
        numbers = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
        return [number for number in numbers if low <= number <= high]

    choices = [ticks(factors, every) for factors, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5))]
    axis.set_ticks(next((choice for choice in choices if len(choice) <= 6), choices[-1]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value, 3)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def label_progress(axes: Any, axis: str) -> None:
    """An x-axis for "steps", "tokens" or "seconds" of training."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(LABELS[axis])
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=axis != "seconds", steps=[1, 2, 5, 10]))
    abbreviate(axes.xaxis)


def abbreviate(axis: Any) -> None:
    """Large numbers in short, such as 10 k and 2 M."""
    def short(value: float, _: int) -> str:
        power = next((power for power in (9, 6, 3) if abs(value) >= 10**power), 0)
        return number_text(value / 10**power, 6) + {9: " G", 6: " M", 3: " k", 0: ""}[power]

    axis.set_major_formatter(short)


def number_text(value: float, digits: int) -> str:
    """A number with this many significant digits, whole ones with all of theirs: 0.00123, 3e-5, 131072."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{value:.0f}"
    digits = max(digits, len(f"{abs(value):.0f}")) if abs(value) < 1e9 else digits
    return re.sub(r"e([-+])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{value:.{digits}g}")


def number_texts(values: list[Any]) -> list[str]:
    """Settings as texts: fractions have three significant digits, or more where different ones would look alike."""
    different = len(set(map(str, values)))
    for digits in range(3, 18):
        texts = [number_text(value, digits) if isinstance(value, float) and math.isfinite(value) else as_text(value)
                 for value in values]
        if len(set(texts)) >= different:
            break
    return texts


def as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def short_text(text: str) -> str:
    """A long text without its middle."""
    return text if len(text) <= 20 else f"{text[:9]}…{text[-10:]}"


def label(run: History) -> str:
    """A run's name in a legend; matplotlib leaves out labels that start with an underscore."""
    name = run.name if len(run.name) <= 48 else f"{run.name[:24]}…{run.name[-23:]}"
    return f" {name}" if name.startswith("_") else name


def losses_svg(runs: list[History], which: str, axis: str) -> str:
    """The losses of several runs as an <svg> element: lines have class "run" and the run's rank in data-run."""
    return drawn_svg(lambda axes: draw_losses(axes, runs, which, axis), runs, f"{which} loss against {axis}", (4.8, 3.2))


def both_losses_svg(run: History, axis: str) -> str:
    return drawn_svg(lambda axes: draw_both_losses(axes, run, axis), [run],
                     f"training and validation loss against {axis}", (5.4, 3.2))


def diagnostic_svg(runs: list[History], name: str) -> str:
    return drawn_svg(lambda axes: draw_diagnostic(axes, runs, name), runs, f"{name} against steps", (3.8, 2.5))


def slice_svg(runs: list[History], key: str, numbers: dict[History, int]) -> str:
    return drawn_svg(lambda axes: draw_slice(axes, runs, key, numbers), list(numbers),
                     f"{runs[0].measure} against {key}", (3.6, 2.7))


def drawn_svg(draw: Callable[[Any], None], runs: list[History], title: str, size: tuple[float, float]) -> str:
    """One picture as an <svg> element of a page, without a background; each line is titled with its run's name."""
    figure, style = new_figure(*size, title)
    content = io.StringIO()
    with style, quiet():
        draw(figure.subplots())
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg "):].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    svg = re.sub(r'<g id="run-(\d+)">', lambda found: f'<g class="run" data-run="{found[1]}">'
                 f"<title>{escape(runs[int(found[1])].name)}</title>", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)  # as fine as a screen
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def curves_png(runs: list[History]) -> bytes:
    """All pictures of losses and diagnostics, against steps, tokens and seconds."""
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
        if len(runs) == 1:
            figure.suptitle(runs[0].name)
        else:
            add_names(figure, grid[-1][0], runs)
        return as_image(figure, "png")


def slices_png(runs: list[History], keys: list[str], numbers: dict[History, int]) -> bytes:
    """The slices of all `keys`."""
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, style = new_figure(4 * columns, 3.2 * rows, "slices")
    with style, quiet():
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, key in zip(grid, keys, strict=False):
            draw_slice(axes, runs, key, numbers)
        for axes in grid[len(keys):]:
            axes.set_axis_off()
        return as_image(figure, "png")


def picture_problems(out: str) -> Iterator[str]:
    """One sentence if the file `out` has a type that cannot be drawn."""
    if out and Path(out).suffix.lower() not in PICTURES:
        yield f"out={out} must end in .png, .svg or .pdf."


def loss_picture(runs: list[History], kind: str) -> bytes:
    """The losses of runs against steps, the best run first, as a file of the type `kind`.

    One run has its training and validation loss, several have their validation losses.
    """
    figure, style = new_figure(7, 4, "loss")
    with style, quiet():
        axes = figure.subplots()
        if len(runs) == 1:
            draw_both_losses(axes, runs[0], "steps")
            axes.set_title(runs[0].name)
        else:
            draw_losses(axes, runs, "validation", "steps")
            add_names(figure, axes, runs)
        return as_image(figure, kind)


def add_names(figure: Any, axes: Any, runs: list[History]) -> None:
    """A legend of several runs above a figure; of many, only the name of the best run."""
    if len(runs) <= len(COLORS):
        lines, names = axes.get_legend_handles_labels()
        columns = min(3, len(runs))
        figure.legend(lines[::-1], names[::-1], loc="outside upper center", ncols=columns)
    else:
        figure.suptitle(f"{len(runs)} runs; the best is orange: {runs[0].name}")


def as_image(figure: Any, kind: str, dpi: int = 110) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=dpi)
    return picture.getvalue()


def quiet() -> AbstractContextManager[None]:
    """No warnings about letters of run names that the font lacks: they are drawn as boxes."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
