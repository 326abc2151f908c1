"""The folder of a run: find it by name, lock it for one process, rename it but never delete it."""

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
import locks
from terminal import say

LOCK = "lock"
FILES = (LOCK, "config.yaml", "metrics.jsonl", "log.txt", "environment.jsonl", "report.html",
         "wandb.json")
FOLDERS = ("checkpoints", "nonfinite", "wandb")


class Run:
    """The locked folder of a run. A context manager, which removes the folder if it is empty.

    Raises ValueError if another process trains in the folder, if one run would be inside another,
    and if a name that runs use belongs to anything but a regular file or folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # No run inside another: both would own the files of the inner one.
        outer = first_run(folder.parents)
        if outer:
            raise ValueError(f"{folder} is inside the run {outer}: use another name=.")
        if not is_run(folder):
            inner = first_run(lock.parent for lock in folder.glob(f"*/**/{LOCK}"))
            if inner:
                raise ValueError(f"{folder} contains runs, such as {inner.relative_to(folder)}: "
                                 f"use another name=.")
        check_file_types(folder)
        # Only one process trains in the folder.
        try:
            self.lock = locks.Lock(folder / LOCK, describe_process())
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being trained by {error.strerror}: wait for it, stop "
                             f"it, or use another name=.") from None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def remove_partial(self) -> None:
        """Delete the partial files of a killed process."""
        for folder in (self.folder, self.checkpoints, self.folder / "nonfinite"):
            for partial in folder.glob(f"{atomic.PARTIAL}*"):
                atomic.remove(partial)

    def has_checkpoints(self) -> bool:
        """Whether anything was saved, damaged or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def check_not_moved(self) -> None:
        """Raise ValueError if the folder was moved, removed or replaced since it was locked."""
        if not self.lock.in_place():
            raise ValueError(
                f"{self.folder} was moved, removed or replaced during training. The run stops, and "
                f"the steps since the last checkpoint are lost. To resume, move the folder back, "
                f"or pass its new name=.")

    def rename_to_old(self) -> None:
        """Rename the folder to NAME.old, or NAME.old-2 and so on; it stays locked."""
        old = atomic.unused_name(self.folder.with_name(f"{self.folder.name}.old"))
        self.folder = self.folder.rename(old)
        self.lock.follow(self.folder / LOCK)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *failure: object) -> None:
        lock_files = {LOCK, f"{LOCK}{locks.MARKER_SUFFIX}"}
        empty = False
        # Another process may remove the folder at the same time, or start to train in it.
        with suppress(OSError):
            empty = self.lock.in_place() and set(os.listdir(self.folder)) <= lock_files
            if empty:
                (self.folder / LOCK).unlink()
        self.lock.release()
        if empty:
            with suppress(OSError):
                self.folder.rmdir()


def describe_process() -> str:
    """The content of a lock file: which process holds it."""
    now = datetime.now()
    return f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S}"


def check_file_types(folder: Path) -> None:
    """Raise ValueError if a name that runs use belongs to a link, a FIFO or the like.

    A run from a stranger could otherwise make us read, write or delete files elsewhere. The run
    folder itself and its parents may be links, for instance to a larger disk.
    """
    for name in (*FILES, *FOLDERS):
        path = folder / name
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        right = stat.S_ISDIR(mode) if name in FOLDERS else stat.S_ISREG(mode)
        if not right:
            kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file",
                     stat.S_IFIFO: "a pipe"}
            found = kinds.get(stat.S_IFMT(mode), "a socket or a device")
            wanted = "folder" if name in FOLDERS else "regular file"
            raise ValueError(f"{path} is {found}, but a run needs a {wanted} of its own there: "
                             f"move it away.")


def is_run(folder: Path) -> bool:
    return (folder / LOCK).exists() and (folder / "config.yaml").exists()


def first_run(folders: Iterable[Path]) -> Path | None:
    """The first of these folders that is a run."""
    return next(filter(is_run, folders), None)


def find_run(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`: inside `runs_dir`, or a path. Default: the run saved last.

    For a sweep it is the best run, also if the run saved last belongs to one. Raises ValueError,
    listing the runs, if there is none, and if there is a link inside the run.
    """
    run = search_run(runs_dir, name)
    check_file_types(run)
    return run


def find_runs(runs_dir: Path, names: str) -> list[Path]:
    """The folders of several runs, as `find_run`; their names are separated by commas."""
    # The names that are made from settings can contain commas.
    if (runs_dir / names).is_dir() or Path(names).is_dir():
        return [find_run(runs_dir, names)]
    return [find_run(runs_dir, name) for name in names.split(",")]


def search_run(runs_dir: Path, name: str) -> Path:
    # Without a name: the run saved last, or the best one of its sweep.
    runs = sorted(runs_below(runs_dir))
    if not name and runs:
        last = max(runs, key=saved_at)
        return best_run(last.parent) if is_sweep(last.parent) else last
    if not name:
        raise ValueError(f"{runs_dir} has no run with a checkpoint: train one with "
                         f"python train.py.")

    # The name of a run or of a sweep in `runs_dir`, or its path.
    places = (runs_dir / name, Path(name))
    for place in places:
        if has_checkpoint(place):
            return place
        if is_sweep(place) and any(runs_below(place)):
            return best_run(place)

    # There is none: say why, and which runs there are.
    if first_run(places):
        raise ValueError(f"run={name} has no checkpoint yet: the first is saved after "
                         f"training.checkpoint_every steps, or when you stop the run.")
    problem = "is not a run" if any(map(os.path.exists, places)) else "does not exist"
    if not runs:
        raise ValueError(f"run={name} {problem}, and {runs_dir} has no run with a checkpoint: "
                         f"train one with python train.py.")
    names = ", ".join(str(run.relative_to(runs_dir)) for run in runs)
    raise ValueError(f"run={name} {problem}. There are: {names}.")


def is_sweep(folder: Path) -> bool:
    """Whether the folder belongs to a grid or a search, which keep the output of their runs."""
    return (folder / "logs").is_dir() and not is_run(folder)


def best_run(sweep: Path) -> Path:
    """The run of a sweep with the fewest bits per byte, which is printed; else the last one."""
    runs = sorted(runs_below(sweep), key=saved_at, reverse=True)
    results = {run: lowest_bits_per_byte(run) for run in runs}
    best = min(runs, key=results.__getitem__)
    if len(runs) > 1 and math.isfinite(results[best]):
        result = f"{results[best]:.4f} bits per byte"
        say(f"The best of {len(runs)} runs in {sweep}: {best.name}, {result}", sys.stderr)
    return best


def lowest_bits_per_byte(run: Path) -> float:
    """The lowest validation result of a run, comparable for any tokenizers; inf without one."""
    lowest = math.inf
    with (suppress(OSError),
          os.fdopen(atomic.open_regular(run / "metrics.jsonl"), "rb") as lines):
        for line in lines:
            with suppress(ValueError, KeyError, TypeError, OverflowError):
                lowest = min(lowest, float(atomic.parse_json(line)["bits_per_byte"]))
    return lowest


def runs_below(runs_dir: Path) -> Iterator[Path]:
    """The runs with a checkpoint; other processes may create and delete folders meanwhile."""
    for folder, subfolders, _ in os.walk(runs_dir):
        if "checkpoints" in subfolders:
            subfolders.clear()
            if has_checkpoint(Path(folder)):
                yield Path(folder)


def has_checkpoint(run: Path) -> bool:
    try:
        return any(name.startswith("step_") for name in os.listdir(run / "checkpoints"))
    except (FileNotFoundError, NotADirectoryError):
        return False


def saved_at(run: Path) -> float:
    """The time at which the checkpoints last changed; 0 if there are none."""
    try:
        return (run / "checkpoints").stat().st_mtime
    except FileNotFoundError:
        return 0.0
