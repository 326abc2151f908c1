"""The folder of a run: lock it for one process, check what is in it, rename it, never delete it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import atomic
import locks

LOCK = "lock"
FILES = (LOCK, "config.yaml", "metrics.jsonl", "log.txt", "environment.jsonl", "report.html",
         "wandb.json")
FOLDERS = ("checkpoints", "nonfinite", "wandb")
# Names of what `lstat` finds.
KINDS = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file",
         stat.S_IFIFO: "a pipe"}


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
            atomic.remove_partial(folder)

    def has_checkpoints(self) -> bool:
        """Whether anything was saved, damaged or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def check_not_moved(self) -> None:
        """Raise ValueError if the folder was moved, removed or replaced since it was locked."""
        if not self.lock.in_place():
            raise ValueError(
                f"{self.folder} was moved, removed or replaced during training: the steps since "
                "the last checkpoint are lost. Move it back, or pass its new name=, to resume.")

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
        # What a run does not have yet, it will create.
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        kind, wanted = stat.S_IFREG, "regular file"
        if name in FOLDERS:
            kind, wanted = stat.S_IFDIR, "folder"
        if stat.S_IFMT(mode) != kind:
            found = KINDS.get(stat.S_IFMT(mode), "a socket or a device")
            raise ValueError(f"{path} is {found}, but a run needs a {wanted} of its own there: "
                             "move it away.")


def is_run(folder: Path) -> bool:
    return (folder / LOCK).exists() and (folder / "config.yaml").exists()


def first_run(folders: Iterable[Path]) -> Path | None:
    """The first of these folders that is a run."""
    return next(filter(is_run, folders), None)
