"""A page and a picture of attention weights. Knows arrays and labels only, no model."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from report.figures import as_image, new_figure
from report.labels import short_text
from terminal import escaped

TEMPLATE = Path(__file__).with_suffix(".html")
# The part of the style that all pages share.
BASE_STYLE = Path(__file__).with_name("base.css")
PLACEHOLDER = '{"this": "is replaced"}'  # of the data in the template
MIN_POINTS, MAX_POINTS = 5, 8  # font size of labels in a picture
MAX_WEIGHTS = 2**24  # on a page: 45 MB, which a browser opens in some seconds


def max_tokens(n_layer: int, n_head: int) -> int:
    """The number of tokens whose attention fits on a page."""
    return math.isqrt(MAX_WEIGHTS // (n_layer * n_head))


def template() -> str:
    """The page with its style, and PLACEHOLDER for its data."""
    style = BASE_STYLE.read_text(encoding="utf-8")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{base}}", style)


def page(name: str, labels: list[str], weights: np.ndarray,
         following: list[list[tuple[str, float]]]) -> str:
    """The page of the weights `[L, H, T, T]`."""
    # A token could end the script that it is in.
    text = json.dumps(page_data(name, labels, weights, following)).replace("<", "\\u003c")
    return template().replace(PLACEHOLDER, text)


def page_data(name: str, labels: list[str], weights: np.ndarray,
              following: list[list[tuple[str, float]]]) -> dict[str, Any]:
    """What the page shows. Weights are 16-bit fractions, in a fifth of JSON's space."""
    fractions = (weights * 65535).round().astype("<u2")
    content = base64.b64encode(fractions.tobytes()).decode()
    return {"name": escaped(name, keep=""), "words": labels, "next": following, "weights": content,
            "layers": len(weights), "heads": weights.shape[1]}


def draw(name: str, labels: list[str], weights: np.ndarray) -> bytes:
    """The grid of all layers and heads, as PNG. Raises ValueError if matplotlib is missing."""
    # Choose the size of a panel, and the size and number of its labels.
    layers, heads = weights.shape[:2]
    inches = 2.4 if layers * heads <= 24 else 1.6
    row_points = 72 * 0.9 * inches / len(labels)
    every = math.ceil(MIN_POINTS / row_points)
    points = max(MIN_POINTS, min(MAX_POINTS, 0.85 * row_points))
    ticks, texts = range(0, len(labels), every), [short_text(label) for label in labels[::every]]

    # Draw the weights of each head.
    with new_figure(1.5 + inches * heads, 1.5 + inches * layers, "attention") as figure:
        grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
        for place, axes in np.ndenumerate(grid):
            # Small weights are visible in their square roots.
            axes.imshow(np.sqrt(weights[place]), cmap="cividis", vmin=0, vmax=1)
            axes.grid(False)
            axes.tick_params(length=0)

        # Label the tokens at the left and at the bottom, the heads at the top.
        grid[0][0].set_yticks(ticks, texts)
        grid[0][0].set_xticks(ticks, texts)
        for head, axes in enumerate(grid[0]):
            axes.set_title(f"head {head}", fontsize=9)
        for axes in grid[-1]:
            axes.tick_params(axis="x", labelrotation=90, labelsize=points)
        for layer, axes in enumerate(grid[:, 0]):
            axes.set_ylabel(f"layer {layer}", fontsize=9)
            axes.tick_params(axis="y", labelsize=points)

        title = "Each row is a token, and shows which tokens it attends to"
        figure.suptitle(f"{escaped(name, keep='')}\n{title}", fontsize=9)
        return as_image(figure, "png", dpi=120)
