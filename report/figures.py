"""Figures of matplotlib in the style of the reports: as SVG for a page, or as image files.

Also the labels of their axes. Knows nothing about runs.
"""

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

import atomic
from setting import as_word
from terminal import say

# An SVG on a page takes the colors of the page instead of these two.
INK, LINE = "#1b1f24", "#d0d6dc"
STYLE = {
    "font.size": 9, "svg.fonttype": "none", "legend.frameon": False, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
}
PICTURES = (".png", ".svg", ".pdf")
MAX_CATEGORIES = 16  # labels below an axis


def picture_problems(out: str) -> Iterator[str]:
    """One sentence if the file `out` has a type that cannot be drawn."""
    if out and Path(out).suffix.lower() not in PICTURES:
        yield f"out={out} must end in .png, .svg or .pdf."


def write_picture(out: str, draw: Callable[[str], bytes]) -> None:
    """Write to the file `out` what `draw` returns for its type, and say so."""
    path = Path(out)
    atomic.write_bytes(path, draw(path.suffix.lower().lstrip(".")))
    say(f"Drew {path}")


def new_figure(width: float, height: float, name: str) -> tuple[Any, AbstractContextManager[None]]:
    """A figure in inches, and the style to draw it in. Raises ValueError without matplotlib."""
    try:
        import matplotlib

        # Not pyplot, which keeps every figure.
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Curves need matplotlib: pip install matplotlib.") from None
    style = matplotlib.rc_context(STYLE | {"svg.hashsalt": name})
    return Figure(figsize=(width, height), layout="constrained"), style


def quiet() -> AbstractContextManager[None]:
    """No warnings about letters of run names that the font lacks: they are drawn as boxes."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def as_image(figure: Any, kind: str, dpi: int = 110) -> bytes:
    """The figure as a file of the type `kind`: png, svg or pdf."""
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=dpi)
    return picture.getvalue()


def svg_element(draw: Callable[[Any], None], names: list[str], title: str,
                size: tuple[float, float]) -> str:
    """What `draw` draws on its axes, as an <svg> element of a page, without a background.

    Lines of the run with the rank n, whose id is "run-n", get the class "run", data-run="n" and
    the name of the run as their title.
    """
    figure, style = new_figure(*size, title)
    content = io.StringIO()
    with style, quiet():
        draw(figure.subplots())
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})

    # The <svg> element, with the names of the runs and fewer digits.
    svg = content.getvalue()
    # Without the XML declaration, and in the colors of the page.
    svg = svg[svg.index("<svg ") :].replace(INK, "var(--ink)").replace(LINE, "var(--line)")

    def with_name(group: re.Match[str]) -> str:
        name = escape(names[int(group[1])])
        return f'<g class="run" data-run="{group[1]}"><title>{name}</title>'

    def rounded(path: re.Match[str]) -> str:
        # A tenth of a point is finer than a screen.
        return re.sub(r"(\.\d)\d+", r"\1", path[0])

    svg = re.sub(r'<g id="run-(\d+)">', with_name, svg)
    svg = re.sub(r' d="[^"]*"', rounded, svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def label_categories(axes: Any, texts: list[str]) -> None:
    """Texts at x = 0, 1, 2, ...: level if they fit, else slanted; of many, only some."""
    slanted = {}
    if len("".join(texts)) > 32:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    every = math.ceil(len(texts) / MAX_CATEGORIES)
    axes.set_xticks(range(0, len(texts), every), texts[::every], **slanted)
    axes.set_xlim(-0.5, len(texts) - 0.5)


def label_numbers(axes: Any, numbers: list[float]) -> None:
    """An x-axis for numbers, on a log scale if they span a factor of ten.

    A few numbers are the ticks themselves, if their texts fit side by side.
    """
    from matplotlib.ticker import MaxNLocator

    # Choose the scale, and its ticks.
    logarithmic = min(numbers) > 0 and max(numbers) >= 10 * min(numbers)
    if logarithmic:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    else:
        integer = all(isinstance(number, int) for number in numbers)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=integer))
        axes.xaxis.set_major_formatter(lambda value, _: number_text(value, 6))

    # Replace the ticks by the numbers themselves if there is space for their texts.
    positions = np.log(numbers) if logarithmic else np.array(numbers)
    texts = number_texts(numbers)
    # The axis is about 36 letters wide.
    needed = np.ptp(positions) * max(map(len, texts)) / 36
    if len(numbers) <= 5 and (np.diff(positions) > needed).all():
        axes.set_xticks(numbers, texts)


def log_ticks(axis: Any) -> None:
    """At most six plain numbers along a log axis: 1, 2 and 5 times powers of ten, or fewer."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    # Use the densest of these sets of ticks that has at most six of them in view.
    low, high = sorted(axis.get_view_interval())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5)):
        ticks = []
        for power in powers:
            if power % every == 0:
                ticks += [factor * 10.0**power for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break

    # Label them, and hide those between.
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value, 3)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def abbreviate(axis: Any) -> None:
    """Large numbers in short, such as 10 k and 2 M."""

    def short(value: float, _: int) -> str:
        for power, letter in ((9, " G"), (6, " M"), (3, " k")):
            if abs(value) >= 10**power:
                return number_text(value / 10**power, 6) + letter
        return number_text(value, 6)

    axis.set_major_formatter(short)


def number_text(value: float, digits: int) -> str:
    """A number with this many significant digits, as in 0.00123 and 3e-5; integers with all."""
    if abs(value) < 1e9:
        if float(value).is_integer():
            return f"{value:.0f}"
        digits = max(digits, len(f"{abs(value):.0f}"))
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def number_texts(values: list[Any]) -> list[str]:
    """Settings as texts; fractions have three significant digits, or more to tell them apart."""
    # Add digits until different values have different texts.
    different = len(set(map(str, values)))
    for digits in range(3, 18):
        texts = []
        for value in values:
            if isinstance(value, float) and math.isfinite(value):
                texts.append(number_text(value, digits))
            elif isinstance(value, list):
                texts.append(" ".join(map(str, value)))
            else:
                texts.append(as_word(value))
        if len(set(texts)) >= different:
            break
    return texts


def short_text(text: str, longest: int = 20) -> str:
    """A long text without its middle."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[: half - 1]}…{text[-half:]}"
