"""Draw the loss of a run against its steps. Needs matplotlib (pip install matplotlib).

  python -m scripts.plot run=pydocs out=loss.png

Settings, each with its default:
  run=NAME         the run's name or folder; without it, the run that was trained last
  out=FILE         the picture, .png or .svg; without it, loss.png in the run's folder
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: torch takes a second or more, which --help and a mistake need not wait for.
    launch("scripts.plot:main", "scripts.plot:PlotSettings", __doc__)

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import atomic
from conf.schema import FilePath
from terminal import say
from training.run import find_run


@dataclass(frozen=True)
class PlotSettings:
    """Everything about a picture of a run."""

    run: FilePath = ""  # the run's name, or the path of its folder; empty: the run that was trained last
    runs_dir: FilePath = "runs"
    out: FilePath = ""  # empty: loss.png in the run's folder

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        yield from picture_problems(self.out)


def main(settings: PlotSettings) -> int:
    run = find_run(Path(settings.runs_dir), settings.run)
    out = Path(settings.out) if settings.out else run / "loss.png"
    atomic.write_bytes(out, draw(run, out.suffix.lstrip(".") or "png"))
    say(f"Drew {out}")
    return 0


def picture_problems(out: str) -> Iterator[str]:
    """One sentence where `out` names a file of a type that cannot be drawn; empty, it names none."""
    if out and Path(out).suffix not in (".png", ".svg", ".pdf"):
        yield f"out={out} must end in .png, .svg or .pdf."


def pyplot() -> ModuleType:
    """matplotlib's, which draws without a screen. Raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("Drawing needs matplotlib: pip install matplotlib.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as drawing
    return drawing


def draw(run: Path, kind: str) -> bytes:
    """A picture of the file type `kind`. Raises ValueError if matplotlib is missing."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    validated = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    figure, axes = pyplot().subplots(figsize=(7, 4), dpi=120, layout="constrained")
    if trained:
        axes.plot(*zip(*trained, strict=True), color="#9ecae1", linewidth=1, label="training, each step")
    if validated:
        axes.plot(*zip(*validated, strict=True), color="#d94801", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save(figure, kind)


def save(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as the content of a file of the type `kind`."""
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()
