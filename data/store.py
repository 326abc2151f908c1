"""The folder for prepared data: subfolders that are made once, and checksums that are cached.

Knows nothing about their content.
"""

import errno
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import atomic
import locks
from progress import ProgressBar
from setting import expanded
from terminal import say

BUILDING = ".building-"  # the prefix of unfinished folders
BLOCK = 2**20  # bytes
LARGE = 2**24  # bytes; smaller files are hashed each time
# A file that changed shortly before it was hashed may change again with the same time stamps, which
# some file systems keep in steps of one or two seconds.
SETTLED = 3.0  # seconds


def data_root() -> Path:
    """The folder for prepared tokens and downloads: $NANOHYDRA_DATA, or `data/prepared`."""
    chosen = os.environ.get("NANOHYDRA_DATA")
    if not chosen:
        return Path(__file__).parent / "prepared"
    try:
        return Path(expanded(chosen))
    except ValueError as error:
        raise ValueError(f"NANOHYDRA_DATA={chosen} {error}.") from None


def folder_for(name: str, recipe: dict[str, Any]) -> Path:
    """The folder for the result of a recipe. Its name ends with a hash of the recipe."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return data_root() / f"{name}-{digest[:12]}"


def sha256_of(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file. Raises OSError naming a file that cannot be read."""
    # The digests of earlier calls, by path, size, times and inode.
    cache = data_root() / "digests.json"
    known = read_digests(cache)
    before = dict(known)

    # Hash the files that are new or have changed.
    digests, total = [], sum(path.stat().st_size for path in paths)
    with ProgressBar(desc="Checking files", total=total, unit="B", unit_scale=True, leave=False,
                     delay=2) as bar:
        for path in paths:
            status, now = path.stat(), time.time()
            key = key_of(path, status)
            if key in known and settled(status, known[key][1]):
                digests.append(known[key][0])
                continue
            digests.append(hash_file(path, bar))
            unchanged = settled(status, now) and key_of(path, path.stat()) == key
            if status.st_size >= LARGE and unchanged:
                known[key] = (digests[-1], now)

    # Keep the digests for the next call.
    if known != before:
        # Without the cache, the files are hashed again.
        with suppress(OSError):
            atomic.write_json(cache, known, indent=0)
    return digests


def key_of(path: Path, status: os.stat_result) -> str:
    """A key that changes when the file changes, as far as the file system can tell."""
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path.resolve()} {status.st_size} {times} {status.st_ino}"


def settled(status: os.stat_result, hashed_at: float) -> bool:
    """Whether every later change will show in the time stamps, as in git's index."""
    return hashed_at - max(status.st_mtime, status.st_ctime) > SETTLED


def hash_file(path: Path, bar: ProgressBar) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        # An error from reading does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from None
    return digest.hexdigest()


def read_digests(cache: Path) -> dict[str, tuple[str, float]]:
    """The cached digests of files that still exist, with the times when they were computed."""
    known = {}
    # If the cache is damaged, the files are hashed again.
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        for key, (digest, hashed_at) in json.loads(cache.read_text()).items():
            if Path(key.rsplit(" ", 4)[0]).exists():
                known[key] = (str(digest), float(hashed_at))
    return known


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """If `folder` does not exist, let `make` fill it under another name, and then rename it.

    One process makes it while others wait. The other name is always the same, so `make` can resume.
    Raises OSError with advice if the disk is full or read-only.
    """
    if folder.is_dir():
        return
    with advice_on_disk_errors(folder.parent):
        lock = wait_for(lock_of(folder))
        try:
            # The process that had the lock before may have made it.
            if not folder.is_dir():
                fill(folder, make)
        finally:
            lock_of(folder).unlink(missing_ok=True)
            lock.release()


def lock_of(folder: Path) -> Path:
    """The lock of a folder, which has the same one while it is unfinished."""
    return folder.with_name(f".lock-{folder.name.removeprefix(BUILDING)}")


def fill(folder: Path, make: Callable[[Path], None]) -> None:
    # It exists after a kill, and `make` then resumes.
    building = folder.with_name(f"{BUILDING}{folder.name}")
    building.mkdir(exist_ok=True)
    atomic.remove_partial(building)
    try:
        make(building)
    except BaseException as failure:
        atomic.remove_partial(building)
        # After a ValueError, the repaired source has another folder.
        if isinstance(failure, ValueError) or not any(building.glob("*.json")):
            atomic.remove(building)
        raise
    atomic.publish_folder(building, folder)


def wait_for(path: Path) -> locks.Lock:
    for attempt in itertools.count():
        try:
            return locks.Lock(path, f"process {os.getpid()}")
        except BlockingIOError as error:
            if attempt == 0:
                say(f"Waiting for {error.strerror}, which prepares the same tokens.")
            time.sleep(0.2)


@contextmanager
def advice_on_disk_errors(root: Path) -> Iterator[None]:
    """Turn write errors in `root` into messages that say what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{root} is full ({reason}): free some space, and the same command "
                          f"resumes; or set NANOHYDRA_DATA to a folder on another disk.") from None
        # Reading a source can fail, too: an error about another path keeps its message.
        inside = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(root)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and inside:
            raise OSError(f"{root} is not writable ({reason}): set NANOHYDRA_DATA to another "
                          f"folder.") from None
        raise
