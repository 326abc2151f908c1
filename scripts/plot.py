"""Draw training and validation loss of a run in one picture. Needs matplotlib (pip install matplotlib).

  python -m scripts.plot run=pydocs out=loss.png

Settings, each with its default:
  run=NAME         the run's name or folder; without it, the run that was trained last
  out=FILE         the picture, .png, .svg or .pdf; without it, loss.png in the run's folder
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.plot:main", "scripts.plot:PlotSettings", __doc__)

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import atomic
from checkpointing.run_folder import find_run
from conf.schema import FilePath
from report.curves import loss_picture
from report.history import open_history
from terminal import say


@dataclass(frozen=True)
class PlotSettings:
    """Everything about a picture of a run."""

    run: FilePath = ""  # the run's name, or its folder; empty: the run that was trained last
    runs_dir: FilePath = "runs"
    out: FilePath = ""  # empty: loss.png in the run's folder

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        yield from picture_problems(self.out)


def main(settings: PlotSettings) -> int:
    run = find_run(Path(settings.runs_dir), settings.run)
    out = Path(settings.out) if settings.out else run / "loss.png"
    atomic.write_bytes(out, loss_picture(open_history(run, run.name), out.suffix.lower().lstrip(".")))
    say(f"Drew {out}")
    return 0


def picture_problems(out: str) -> Iterator[str]:
    """One sentence where `out` names a file of a type that cannot be drawn; empty, it names none."""
    if out and Path(out).suffix.lower() not in (".png", ".svg", ".pdf"):
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


def save(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as the content of a file of the type `kind`."""
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()
