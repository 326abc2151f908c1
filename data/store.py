"""Where prepared data lies: folders that are made once, and the SHA-256 of files, which is remembered.

Knows nothing of what is in them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import atomic
from progress import ProgressBar
from terminal import say

BUILDING = ".building-"  # how the names of folders begin that are not whole yet
BLOCK = 2**20
LARGE = 2**24  # bytes; smaller files are read each time, which takes no time
# A file that changed less than this before it was hashed might have changed again under the same times: some file
# systems keep them in steps of one or two seconds.
SETTLED = 3.0  # seconds


def data_root() -> Path:
    """The folder for prepared tokens and downloads: `data/prepared`, or where NANOHYDRA_DATA says."""
    chosen = os.environ.get("NANOHYDRA_DATA")
    return Path(os.path.expanduser(chosen)) if chosen else Path(__file__).parent / "prepared"


def folder_for(name: str, recipe: dict[str, Any]) -> Path:
    """Where what a recipe makes lies: the name carries a fingerprint of everything in the recipe."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return data_root() / f"{name}-{digest[:12]}"


def sha256_of(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file. Raises OSError naming one that cannot be read."""
    memory = data_root() / "digests.json"
    known = read_digests(memory)
    before = dict(known)
    digests = []
    total = sum(path.stat().st_size for path in paths)
    with ProgressBar(desc="Checking files", total=total, unit="B", unit_scale=True, leave=False, delay=2) as bar:
        for path in paths:
            status, now = path.stat(), time.time()
            key = key_of(path, status)
            if key not in known or not settled(status, known[key][1]):
                digest = hash_file(path, bar)
                if status.st_size >= LARGE and settled(status, now) and key_of(path, path.stat()) == key:
                    known[key] = (digest, now)
            else:
                digest = known[key][0]
            digests.append(digest)
    if known != before:
        with suppress(OSError):  # not to remember costs time only
            atomic.write_bytes(memory, json.dumps(known, indent=0).encode())
    return digests


def key_of(path: Path, status: os.stat_result) -> str:
    """What changes when a file does, as far as the file system tells."""
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def settled(status: os.stat_result, hashed_at: float) -> bool:
    """Whether a later change of the file must show in its times: git's rule for its index."""
    return hashed_at - max(status.st_mtime, status.st_ctime) > SETTLED


def hash_file(path: Path, bar: ProgressBar) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:  # one from reading does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return digest.hexdigest()


def read_digests(memory: Path) -> dict[str, tuple[str, float]]:
    """The digests of files that are still there, and when they were computed; none where that cannot be read."""
    try:
        saved = json.loads(memory.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    known = {}
    for key, value in saved.items() if isinstance(saved, dict) else ():
        match value:
            case [str(digest), float(hashed_at)] if Path(key.rsplit(" ", 4)[0]).exists():
                known[key] = (digest, hashed_at)
    return known


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Where `folder` is not there, let `make` fill what becomes it, in one process at a time; the others wait.

    What is filled has the same name each time, so that `make` can go on with what it finds there. Raises OSError saying
    what to do where the disk is full or cannot be written.
    """
    if folder.is_dir():
        return
    with saying_what_to_do(folder.parent):
        lock_path = folder.with_name(f".lock-{folder.name}")
        lock = wait_for(lock_path)
        try:
            if not folder.is_dir():
                fill(folder, make)
        finally:
            lock_path.unlink(missing_ok=True)
            lock.release()


def in_use(building: Path) -> bool:
    """Whether a process is filling the folder."""
    return is_held(building.with_name(f".lock-{building.name.removeprefix(BUILDING)}"))


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    if not lock.exists():
        return False
    try:
        atomic.Lock(lock, "nobody").release()
    except BlockingIOError:
        return True
    return False


def fill(folder: Path, make: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{BUILDING}{folder.name}")
    partial.mkdir(exist_ok=True)
    sweep(partial)
    try:
        make(partial)
    except BaseException as failure:
        sweep(partial)
        if isinstance(failure, ValueError) or not any(partial.glob("*.json")):  # nothing to go on with
            atomic.remove(partial)
        raise
    atomic.publish_folder(partial, folder)


def sweep(folder: Path) -> None:
    """Remove files that a failure left unfinished: they take room, and nothing else comes of them."""
    for leftover in folder.glob(f"{atomic.PARTIAL}*"):
        leftover.unlink()


def wait_for(path: Path) -> atomic.Lock:
    waiting = False
    while True:
        try:
            return atomic.Lock(path, f"process {os.getpid()}")
        except BlockingIOError as error:
            if not waiting:
                say(f"Waiting for {error.strerror}, which prepares the same tokens.")
            waiting = True
            time.sleep(0.2)


@contextmanager
def saying_what_to_do(root: Path) -> Iterator[None]:
    """Turn what the system says when it refuses to write into a sentence with the way out."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(root)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{root} takes no more ({os.strerror(error.errno)}): free some disk, and the same command goes on "
                          f"with what is whole; or set NANOHYDRA_DATA to a folder with more room.") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and ours:
            raise OSError(f"{root} cannot be written ({os.strerror(error.errno)}): set NANOHYDRA_DATA to a folder "
                          f"that can.") from None
        raise
