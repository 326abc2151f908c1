"""A run's folder: found by its name, held by one process at a time, moved aside but never deleted."""

from __future__ import annotations

import math
import os
import socket
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import atomic
from terminal import say

LOCK = "lock"
FILES = (LOCK, "config.yaml", "metrics.jsonl", "log.txt", "environment.jsonl", "report.html", "wandb.json")
FOLDERS = ("checkpoints", "nonfinite", "wandb")


class Run:
    """The folder of a run, held by this process while the context lasts; a folder that got no content is removed.

    Raises ValueError naming the holder if another process trains in it, where one run would lie inside another, and
    where something that is not a plain file or folder has a name that runs use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if outer := first_run(folder.parents):
            raise ValueError(f"{folder} lies inside the run {outer}: choose another name=.")
        if not is_run(folder) and (inner := first_run(lock.parent for lock in folder.glob(f"*/**/{LOCK}"))):
            raise ValueError(f"{folder} holds runs, such as {inner.relative_to(folder)}: choose another name=.")
        check_file_types(folder)
        try:
            self.lock = atomic.Lock(folder / LOCK, describe_process())
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being trained by {error.strerror}: wait for it, stop it, "
                             f"or choose another name=.") from None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def remove_partial(self) -> None:
        """Remove what a kill left half-written, so that it takes no room."""
        for place in (self.folder, self.checkpoints, self.folder / "nonfinite"):
            for leftover in place.glob(f"{atomic.PARTIAL}*"):
                atomic.remove(leftover)

    def has_content(self) -> bool:
        own = (LOCK, f"{LOCK}{atomic.MARKER_SUFFIX}")
        return any(path.name not in own for path in self.folder.iterdir())

    def has_checkpoints(self) -> bool:
        """Whether anything was saved, damaged or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def check_not_moved(self) -> None:
        """Raise ValueError if the folder was moved or removed since this process took it."""
        if not self.lock.in_place():
            raise ValueError(f"{self.folder} was moved, removed or replaced during training, which stops: the steps since "
                             f"the last checkpoint are not saved. To resume, move the folder back or use its new name=.")

    def rename_to_old(self) -> None:
        """Give the folder, which stays locked, another name."""
        self.folder = self.folder.rename(atomic.unused_name(self.folder.with_name(f"{self.folder.name}.old")))
        self.lock.follow(self.folder / LOCK)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            empty = self.lock.in_place() and not self.has_content()
            if empty:
                (self.folder / LOCK).unlink()
        except OSError:  # someone else removed it
            empty = False
        self.lock.release()
        if empty:
            with suppress(OSError):  # another process begins there already
                self.folder.rmdir()


def describe_process() -> str:
    """What a lock's file says of its holder."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"


def check_file_types(folder: Path) -> None:
    """Raise ValueError where a name that runs use is taken by a link, a FIFO or the like.

    Whoever hands on a run's folder could have files outside it read, written or deleted by that. The folder itself,
    and those around it, may be links, as to a larger disk.
    """
    for names, is_right, wanted in ((FILES, stat.S_ISREG, "plain file"), (FOLDERS, stat.S_ISDIR, "folder")):
        for path in (folder / name for name in names):
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not is_right(mode):
                found = "a link" if stat.S_ISLNK(mode) else "something else"
                raise ValueError(f"{path} is {found}, and a run needs a {wanted} of its own there: move it away.")


def is_run(folder: Path) -> bool:
    return (folder / LOCK).exists() and (folder / "config.yaml").exists()


def first_run(folders: Iterable[Path]) -> Path | None:
    """The first of these folders that is a run's."""
    return next(filter(is_run, folders), None)


def find_run(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`: below `runs_dir`, or a path; without a name, the run that was saved last.

    Of a sweep it is the best run, also where the run that was saved last is one of a sweep. Raises
    ValueError naming the runs there are, and where a link lies in the run.
    """
    run = named_run(runs_dir, name)
    check_file_types(run)
    return run


def named_run(runs_dir: Path, name: str) -> Path:
    runs = sorted(runs_below(runs_dir))
    if not name and runs:
        last = max(runs, key=saved_at)
        return best_run(last.parent) if is_sweep(last.parent) else last
    places = (runs_dir / name, Path(name))
    for place in places:
        if name and has_checkpoint(place):
            return place
        if name and is_sweep(place) and any(runs_below(place)):
            return best_run(place)
    if name and first_run(places):
        raise ValueError(f"run={name} has no checkpoint yet: while it is trained, the first comes after "
                         "training.checkpoint_every steps, or when you stop it.")
    there = f"There are: {', '.join(str(run.relative_to(runs_dir)) for run in runs)}." if runs else (
        f"{runs_dir} holds no run with a checkpoint: train one with python train.py.")
    raise ValueError(f"run={name} is not there. {there}" if name else there)


def is_sweep(folder: Path) -> bool:
    """Whether a grid or a search trained the runs in this folder: it keeps what they printed."""
    return (folder / "logs").is_dir() and not is_run(folder)


def best_run(sweep: Path) -> Path:
    """The run of a sweep with the fewest bits per byte, which is said; the last if none has any."""
    runs = sorted(runs_below(sweep), key=saved_at, reverse=True)
    results = {run: lowest_bits_per_byte(run) for run in runs}
    best = min(runs, key=results.__getitem__)
    if len(runs) > 1 and math.isfinite(results[best]):
        result = f"{results[best]:.4f} bits per byte"
        say(f"The best of {len(runs)} runs in {sweep}: {best.name}, {result}", sys.stderr)
    return best


def lowest_bits_per_byte(run: Path) -> float:
    """The lowest of the run's validations, which compares any tokenizers; infinite for none."""
    lowest = math.inf
    with suppress(OSError), os.fdopen(atomic.open_regular(run / "metrics.jsonl"), "rb") as lines:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                lowest = min(lowest, float(atomic.parse_json(line)["bits_per_byte"]))
    return lowest


def runs_below(runs_dir: Path) -> Iterator[Path]:
    """The runs with a checkpoint, also while trainings make and delete folders."""
    for folder, inner, _ in os.walk(runs_dir):
        if "checkpoints" in inner:
            inner.clear()
            if has_checkpoint(Path(folder)):
                yield Path(folder)


def has_checkpoint(run: Path) -> bool:
    try:
        return any(name.startswith("step_") for name in os.listdir(run / "checkpoints"))
    except (FileNotFoundError, NotADirectoryError):
        return False


def saved_at(run: Path) -> float:
    """When the run's checkpoints last changed; 0 if they are gone."""
    try:
        return (run / "checkpoints").stat().st_mtime
    except FileNotFoundError:
        return 0.0
