"""Figures of matplotlib in the style of the reports: as SVG for a page, or as image files.

Knows nothing about runs.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import atomic
from optional import import_optional
from terminal import say

# An SVG on a page takes the colors of the page instead of these two.
INK, LINE = "#1b1f24", "#d0d6dc"
STYLE = {
    "font.size": 9, "svg.fonttype": "none", "legend.frameon": False, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False}
PICTURES = (".png", ".svg", ".pdf")


def picture_problems(out: str) -> Iterator[str]:
    """One sentence if the file `out` has a type that cannot be drawn."""
    if out and Path(out).suffix.lower() not in PICTURES:
        yield f"out={out} must end in .png, .svg or .pdf."


def write_picture(out: str, draw: Callable[[str], bytes]) -> None:
    """Write to the file `out` what `draw` returns for its type, and say so."""
    path = Path(out)
    atomic.write_bytes(path, draw(path.suffix.lower().lstrip(".")))
    say(f"Drew {path}")


@contextmanager
def new_figure(width: float, height: float, name: str) -> Iterator[Any]:
    """A figure in inches, to be drawn and written inside the block, in the style of reports.

    Raises ValueError without matplotlib.
    """
    matplotlib = import_optional("matplotlib", "Curves need matplotlib", "matplotlib")
    # Not pyplot, which keeps every figure.
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        yield Figure(figsize=(width, height), layout="constrained")


def as_image(figure: Any, kind: str, dpi: int = 110, **settings: Any) -> bytes:
    """The figure as a file of the type `kind`: png, svg or pdf."""
    picture = io.BytesIO()
    # Letters of run names that the font lacks are drawn as boxes, without a warning.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        figure.savefig(picture, format=kind, dpi=dpi, **settings)
    return picture.getvalue()


def svg_element(draw: Callable[[Any], None], names: list[str], title: str,
                size: tuple[float, float]) -> str:
    """What `draw` draws on its axes, as an <svg> element of a page, without a background.

    Lines of the run with the rank n, whose id is "run-n", get the class "run", data-run="n" and
    the name of the run as their title.
    """
    with new_figure(*size, title) as figure:
        draw(figure.subplots())
        svg = as_image(figure, "svg", transparent=True, metadata={"Date": None}).decode()

    # The <svg> element, without the XML declaration, in the colors of the page.
    svg = svg[svg.index("<svg ") :].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)

    # The names of the runs. A tenth of a point is finer than a screen.
    def with_name(group: re.Match[str]) -> str:
        return f'<g class="run" data-run="{group[1]}"><title>{escape(names[int(group[1])])}</title>'

    svg = re.sub(r'<g id="run-(\d+)">', with_name, svg)
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
