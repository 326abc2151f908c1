"""One page about runs that opens from disk without a network: curves, tables, samples."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import atomic
from progress import ProgressBar
from report import sections, tables
from report.attention import BASE_STYLE
from report.history import History, open_history
from report.importance import MIN_RUNS
from report.pictures import curves_png, slices_png
from report.runs import best_first, comparable
from terminal import escaped

TEMPLATE = Path(__file__).with_suffix(".html")
FEW = 20  # runs that are read without a progress bar
NEEDS_MATPLOTLIB = ", without curves: they need matplotlib (pip install matplotlib)"


def after_training(run: Path) -> str:
    """Write the report of a run that has just ended; return the sentence to tell the user."""
    try:
        write([(run, run.name)], run / "report.html", run.name, pictures=False)
    except Exception as error:
        # Training must not fail because a report does.
        return f"No report was written: {error}"
    missing = "" if find_spec("matplotlib") else NEEDS_MATPLOTLIB
    return f"Report: {run / 'report.html'}{missing}"


def is_current(run: Path) -> bool:
    """Whether the run's report was written after its last metrics."""
    try:
        written = (run / "report.html").stat().st_mtime_ns
        return written >= (run / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return False


def write(chosen: list[tuple[Path, str]], out: Path, title: str,
          pictures: bool = True) -> list[Path]:
    """Write the page about the chosen runs, and beside it pictures as PNG; return their paths.

    Raises ValueError for a folder that is not a run, and if matplotlib is missing for pictures.
    """
    runs = open_runs(chosen)
    # Nothing is written before all of it has been drawn.
    contents = {out: page(runs, escaped(title, keep="")).encode()}
    if pictures:
        contents[out.with_name(f"{out.stem}-curves.png")] = curves_png(runs)
        compared, keys = comparable(runs)
        if len(compared) >= MIN_RUNS and keys:
            slices = slices_png(compared, keys[: sections.MAX_SLICES], runs)
            contents[out.with_name(f"{out.stem}-slices.png")] = slices
    for path, content in contents.items():
        atomic.write_bytes(path, content)
    return list(contents)


def open_runs(chosen: list[tuple[Path, str]]) -> list[History]:
    """The histories of the chosen runs, the best first."""
    progress = ProgressBar(chosen, "Reading", unit="runs", leave=False, disable=len(chosen) < FEW)
    return best_first([open_history(folder, name) for folder, name in progress])


def page(runs: list[History], title: str) -> str:
    """The page about `runs`, the best first."""
    parts = [
        *sections.summary(runs, title), *sections.losses(runs), *sections.diagnostics(runs),
        *tables.leaderboard(runs), *tables.evaluations(runs), *sections.comparisons(runs),
        *sections.importance_of_settings(runs), *sections.samples(runs),
        *tables.side_by_side("Settings", [run.settings for run in runs], runs),
        *tables.side_by_side("Environment", [run.environment for run in runs], runs)]
    template = TEMPLATE.read_text(encoding="utf-8")
    template = template.replace("{{base}}", BASE_STYLE.read_text(encoding="utf-8"))
    template = template.replace("{{title}}", tables.escape(f"Report: {title}"))
    return template.replace("{{body}}", "\n".join(parts))
