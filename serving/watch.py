"""Watch the runs in a folder: their list, new metrics, leaderboards of sweeps, and reports.

Knows no HTTP. A request names a run, a sweep or a report that was listed, never a path.
"""

import hashlib
import math
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpointing.find_runs import is_sweep
from report.history import PRUNED, History, open_history
from report.metrics import read_new_rows
from report.runs import best_first, runs_in
from report.tables import leaderboard_rows
from serving.answers import Json
from serving.fields import Fields, Refused

MAX_BYTES = 2**22  # of metrics in one answer
# What the page draws of a line of metrics.
KEYS = ("step", "tokens", "seconds", "loss", "val_loss", "sample")


class Runs:
    """The runs below `runs_dir`, by their paths in it."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.opened: dict[Path, tuple[list[float], History]] = {}
        # The reports that were listed, by names that cannot be guessed: a link sends no API key.
        self.reports: dict[str, Path] = {}
        self.secret = secrets.token_bytes()

    def folders(self) -> dict[str, Path]:
        if not self.runs_dir.is_dir():
            return {}
        return {str(run.relative_to(self.runs_dir)): run for run in runs_in(self.runs_dir)}

    def list(self) -> Json:
        """All runs, each with its state and its results, and the names of the sweeps."""
        folders = self.folders()
        sweeps = {str(run.parent.relative_to(self.runs_dir)) for run in folders.values()
                  if is_sweep(run.parent)}
        return {"runs": [self.summary(name, run) for name, run in folders.items()],
                "sweeps": sorted(sweeps), "runs_dir": str(self.runs_dir)}

    def summary(self, name: str, run: Path) -> Json:
        try:
            history = self.open(run)
        except (ValueError, OSError) as error:
            return {"name": name, "problem": str(error), "age_s": None}
        changed = modified(run / "metrics.jsonl")
        return {"name": name, "state": history.state, "finished": history.finished,
                "age_s": time.time() - changed / 1e9 if changed else None,
                "val_loss": plain(history.best_loss), "report": self.report_of(run),
                "bits_per_byte": plain(history.bits_per_byte)}

    def open(self, run: Path) -> History:
        """The history of a run, read again only after it has changed."""
        times = [modified(run / file) for file in ("config.yaml", "metrics.jsonl", PRUNED)]
        known = self.opened.get(run)
        if known is None or known[0] != times:
            known = times, open_history(run, run.name)
            self.opened[run] = known
        return known[1]

    def report_of(self, run: Path) -> str | None:
        """The address of a run's report; None without one."""
        path = run / "report.html"
        if path.is_symlink() or not path.is_file():
            return None
        key = hashlib.blake2b(bytes(path), key=self.secret).hexdigest()
        self.reports[key] = path
        return f"reports/{key}"

    def metrics(self, fields: Fields) -> Json:
        """The lines of metrics of `run` after byte `offset`."""
        name = fields.take("run", "")
        folder = self.folders().get(name)
        if folder is None:
            raise not_listed("run", name)
        offset = fields.integer("offset", 0, 0, 2**62)
        rows, start, end = read_new_rows(folder / "metrics.jsonl", offset, MAX_BYTES)
        chosen = [{key: plain(row[key]) for key in KEYS if key in row} for row in rows]
        return {"rows": chosen, "start": start, "end": end}

    def sweep(self, fields: Fields) -> Json:
        """The leaderboard of `sweep`: for each run and column the value to sort by and the text."""
        name = fields.take("sweep", "")
        histories = []
        for run in self.folders().values():
            if is_sweep(run.parent) and str(run.parent.relative_to(self.runs_dir)) == name:
                # A run that cannot be read is in the list of runs, with the reason.
                with suppress(ValueError, OSError):
                    histories.append(self.open(run))
        if not histories:
            raise not_listed("sweep", name)
        histories = best_first(histories)
        rows = [{column: (plain(value), text) for column, (value, text) in row.items()}
                for row in leaderboard_rows(histories)]
        return {"rows": rows, "sorted_by": histories[0].measure}


def not_listed(field: str, name: str) -> Refused:
    return Refused(f"{field}={name[:100]} is not one that was listed.", field, status=404)


def plain(value: Any) -> str | float | None:
    """A value for JSON: a text or a finite number. A stranger's file can hold anything."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def modified(path: Path) -> float:
    """When a file changed, in nanoseconds; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
