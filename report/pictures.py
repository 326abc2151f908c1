"""The pictures of a report: as <svg> elements of the page, and as image files.

Lists of runs are sorted, the best first.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from report.colors import COLORS
from report.curves import DIAGNOSTICS, draw_diagnostic, draw_losses, draw_slice, loss_kinds
from report.figures import as_image, new_figure, svg_element
from report.history import AXES, History


def losses_svg(runs: list[History], axis: str) -> str:
    """<svg> elements of the losses: one picture for one run, two for several."""
    names = [run.name for run in runs]
    size = (5.4, 3.2) if len(runs) == 1 else (4.8, 3.2)
    pictures = ""
    for which in loss_kinds(runs):
        draw = partial(draw_losses, runs=runs, which=which, axis=axis)
        pictures += svg_element(draw, names, f"{which} loss against {axis}", size)
    return pictures


def diagnostic_svg(runs: list[History], name: str) -> str:
    draw = partial(draw_diagnostic, runs=runs, name=name)
    return svg_element(draw, [run.name for run in runs], f"{name} against steps", (3.8, 2.5))


def slice_svg(runs: list[History], key: str, ranked: list[History]) -> str:
    draw = partial(draw_slice, runs=runs, key=key, ranked=ranked)
    names = [run.name for run in ranked]
    return svg_element(draw, names, f"{runs[0].measure} against {key}", (3.6, 2.7))


def curves_png(runs: list[History]) -> bytes:
    """All pictures of losses and diagnostics, against steps, tokens and seconds."""
    # A row or two of losses, and one of diagnostics.
    kinds = loss_kinds(runs)
    with new_figure(16, 4 * len(kinds) + 4, "curves") as figure:
        grid = figure.subplots(len(kinds) + 1, 3, squeeze=False)
        for row, which in enumerate(kinds):
            for axes, axis in zip(grid[row], AXES, strict=True):
                draw_losses(axes, runs, which, axis)
        for axes, name in zip(grid[-1], DIAGNOSTICS, strict=True):
            draw_diagnostic(axes, runs, name)
        # One legend of the runs for all pictures.
        add_names(figure, grid.flat, runs)
        return as_image(figure, "png")


def slices_png(runs: list[History], keys: list[str], ranked: list[History]) -> bytes:
    """The slices of all `keys`."""
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    with new_figure(4 * columns, 3.2 * rows, "slices") as figure:
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
    with new_figure(7, 4, "loss") as figure:
        axes = figure.subplots()
        draw_losses(axes, runs, loss_kinds(runs)[0], "steps")
        add_names(figure, [axes], runs)
        return as_image(figure, kind)


def add_names(figure: Any, panels: Iterable[Any], runs: list[History]) -> None:
    """The name of one run or a legend of several above a figure; of many, only the best's name.

    The legend names the runs that are drawn in any of the panels.
    """
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    elif len(runs) <= len(COLORS):
        drawn = {}
        for axes in panels:
            drawn |= {line.get_gid(): line for line in axes.get_legend_handles_labels()[0]}
        lines = [drawn[gid] for gid in map("run-{}".format, range(len(runs))) if gid in drawn]
        columns = min(3, len(runs))
        figure.legend(handles=lines, loc="outside upper center", ncols=columns)
    else:
        figure.suptitle(f"{len(runs)} runs; the best is orange: {runs[0].name}")
