"""Locks between processes: a lock file, which names its holder.

On a file system without locks, a second file replaces the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from atomic import create, errors_of, open_regular, read_json, temporary_name, write_all

# The suffix of the file that replaces a lock on file systems without locks.
MARKER_SUFFIX = ".held"
# The holder of a lock that `is_locked` takes for a moment.
LOOKER = "a process that looks for locks"
# The tries, if another process is about to give up the lock or its folder.
MAX_TRIES = 100
# The errors of a file system without locks, such as Lustre mounted without them.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Lock a file, which is created if necessary. Raises BlockingIOError if it is locked."""
    with ExitStack() as stack:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, descriptor)
        try:
            marker = lock_descriptor(descriptor, path, f"process {os.getpid()}")
        except BlockingIOError:
            raise BlockingIOError(f"{path} is being written by another process: wait for it, or "
                                  "use another file.") from None
        if marker:
            stack.callback(marker.release)
        yield


class Lock:
    """A lock file. The lock ends with `release` or with the process, however that ends.

    The content of the file is `holder`. Raises BlockingIOError, with the other holder as its
    `strerror`, if another process has the lock.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.path = path
        tries = 0
        while True:
            tries += 1
            # Create the file, if necessary with its folder.
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
            except (FileNotFoundError, FileExistsError):
                # The previous holder has just removed the folder.
                if tries >= MAX_TRIES:
                    raise
                continue

            # Lock it, or raise an error that names the holder.
            try:
                self.marker = lock_descriptor(self.descriptor, path, holder)
            except OSError as error:
                found = os.pread(self.descriptor, 1000, 0).decode(errors="replace")
                os.close(self.descriptor)
                if not isinstance(error, BlockingIOError):
                    raise
                if found == LOOKER and tries < MAX_TRIES:
                    time.sleep(0.01)
                    continue
                advice = f" ({error.strerror})" if error.strerror else ""
                message = (found or "another process") + advice
                raise BlockingIOError(errno.EWOULDBLOCK, message) from None

            # Was the file moved before it was locked? Then try again.
            if is_same_file(path, self.descriptor):
                break
            self.release()
        with errors_of(path):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, holder.encode(), 0)

    def in_place(self) -> bool:
        """Whether the locked file still has this path: it was not moved, removed or replaced."""
        if self.marker and not is_same_file(self.marker.path, self.marker.descriptor):
            return False
        return is_same_file(self.path, self.descriptor)

    def follow(self, path: Path) -> None:
        """Set the new path after the folder was renamed."""
        self.path = path
        if self.marker:
            self.marker.path = marker_path(path)

    def release(self) -> None:
        if self.marker:
            self.marker.release()
        os.close(self.descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file."""
    try:
        if path.exists():
            Lock(path, LOOKER).release()
    except BlockingIOError:
        return True
    return False


def lock_descriptor(descriptor: int, path: Path, holder: str) -> Marker | None:
    """Lock an open file without waiting; a file system without locks uses a Marker, returned.

    Raises BlockingIOError if another process has the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return Marker(path, holder)
    return None


def is_same_file(path: Path, descriptor: int) -> bool:
    """Whether `path` is the open file; True if an error of a network prevents the check."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def marker_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{MARKER_SUFFIX}")


class Marker:
    """A file NAME.held that replaces the lock of NAME. It contains the process and its host.

    The marker of a process that was killed on this host is replaced. Raises BlockingIOError for
    the marker of a process that runs, and for that of another host, which cannot be checked.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.path = marker_path(path)
        process = os.getpid()
        own = {"host": socket.gethostname(), "process": process, "started": start_time(process),
               "holder": holder}
        for attempt in range(MAX_TRIES):
            # Only one process can create the file.
            try:
                self.descriptor = create(self.path)
            except FileExistsError:
                found = read_marker(self.path)
            else:
                with errors_of(self.path):
                    write_all(self.descriptor, json.dumps(own).encode())
                return

            # The file exists: does its process still run? If the file is gone by now, try again.
            if found is None:
                continue
            if found:
                if found["host"] != own["host"]:
                    break
                if is_running(found["process"], found["started"]):
                    raise BlockingIOError(errno.EWOULDBLOCK, "")
            elif attempt < 20:
                # Another process is writing it, or was killed while writing.
                time.sleep(0.01)
                continue
            self._remove_stale(found)
        raise BlockingIOError(errno.EWOULDBLOCK, f"if it has ended, delete {self.path}")

    def _remove_stale(self, stale: dict[str, Any]) -> None:
        """Remove a stale marker. If another process has just replaced it, that one is put back."""
        renamed = temporary_name(self.path)
        with suppress(FileNotFoundError):
            os.rename(self.path, renamed)
            if read_marker(renamed) != stale:
                os.rename(renamed, self.path)
            renamed.unlink(missing_ok=True)

    def release(self) -> None:
        if is_same_file(self.path, self.descriptor):
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def read_marker(path: Path) -> dict[str, Any] | None:
    """The content of a marker; empty if it is invalid, None if there is no such file."""
    try:
        found = read_json(path)
        valid = isinstance(found["host"], str) and isinstance(found["started"], str)
        return found if valid and 0 < found["process"] < 2**31 else {}
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        return {}


def is_running(process: int, started: str) -> bool:
    """Whether the process still runs; another one may have the same number by now."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It belongs to another user.
        pass
    return start_time(process) == started


def start_time(process: int) -> str:
    """When a process started, as the boot and the clock ticks since then; on Linux only.

    Empty on other systems and for a zombie.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The fields after the name of the program, which may contain spaces.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else f"{boot} {fields[18]}"
