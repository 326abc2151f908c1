"""Every write of the project: files, folders and lines that are whole or absent, and locks.

A temporary name, fsync, rename, fsync of the folder: what has its final name is complete, whatever was
killed while it was being made. Raises OSError where the disk refuses, leaving what was there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # names that start so are leftovers of a kill, never read
PIECE_BYTES = 2**24  # the most that one system call is given: another thread gets its turn between two
MAX_JSON_BYTES = 2**28  # more than any JSON file of ours holds
MARKER_SUFFIX = ".held"  # how the name of a file ends that stands for a lock
# How a file system says that it has no locks, such as Lustre mounted without them.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class NotRegularFile(OSError):
    """Something else lies where a plain file of ours belongs: a link, a FIFO, a device, a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is not a plain file, but a link, a folder or something that is not stored: "
                         f"move it away.")


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a plain file and return its descriptor. Follows no link, waits for no FIFO.

    Raises NotRegularFile where the path leads to anything else, and OSError where it cannot be opened.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
            raise NotRegularFile(path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRegularFile(path)
    return handle


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a plain file. Raises ValueError, reading nothing, where it is larger than `max_bytes`."""
    with os.fdopen(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise ValueError(f"{path} is larger than {max_bytes:,} bytes")
        return file.read()


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Raises OSError where it cannot be read, ValueError where it is not JSON."""
    return parse_json(read_regular(path, MAX_JSON_BYTES))


def parse_json(content: bytes | str) -> Any:
    """What JSON stands for. Raises ValueError where it is not JSON, or nested too deeply for Python."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill with `write_file`; when the block ends well it becomes `final`, else it is removed.

    If `final` came into being meanwhile (another process made the same), that one stays. The folder around it must be
    there: where a run's folder was removed, no part of it comes back.
    """
    partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{final.name}-", dir=final.parent))
    try:
        partial.chmod(0o755)
        yield partial
        publish_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, final: Path) -> None:
    """Give a folder that is whole its final name, unless another process has made that one."""
    sync(partial)
    try:
        os.rename(partial, final)
    except OSError:
        if not final.is_dir():
            raise
    sync(final.parent)


def remove(path: Path) -> None:
    """Delete a file, or a folder, which loses its name first: a kill leaves no half of it behind that looks whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith(PARTIAL):
        doomed = path.with_name(f"{PARTIAL}{path.name}-{secrets.token_hex(4)}")
        os.rename(path, doomed)
        path = doomed
    shutil.rmtree(path, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """`path`, or `path` with the first number from 2 that makes it a new name. A dangling link counts as existing."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def write_bytes(final: Path, content: bytes) -> None:
    """Write or replace one file."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(final) as file:
        file.write(content)


class NewFile:
    """A file that grows under a temporary name; when the `with` block ends well it gets its own, else it is removed."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.partial = final.parent / f"{PARTIAL}{final.name}-{secrets.token_hex(4)}"
        self.handle = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, piece: bytes | memoryview) -> None:
        write_all(self.handle, piece)

    def replace_head(self, head: bytes) -> None:
        """Put `head` in place of as many bytes at the file's beginning."""
        os.pwrite(self.handle, head, 0)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, failure: type | None, *rest: object) -> None:
        try:
            try:
                if not failure:
                    os.fsync(self.handle)
            finally:
                os.close(self.handle)
            if not failure:
                os.replace(self.partial, self.final)
                sync(self.final.parent)
        finally:
            self.partial.unlink(missing_ok=True)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a new file and bring it to the disk; return the SHA-256 of its content. Not atomic in itself."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            digest.update(piece)
            write_all(handle, piece)
        os.fsync(handle)
    finally:
        os.close(handle)
    return digest.hexdigest()


def write_all(handle: int, piece: bytes | memoryview) -> None:
    left = memoryview(piece).cast("B")
    while left:
        left = left[os.write(handle, left[:PIECE_BYTES]):]


def truncate(path: Path, kept: bytes) -> None:
    """Leave `kept` of a file: a part of its lines. Its beginning needs no room on the disk for that."""
    with os.fdopen(open_regular(path, os.O_RDWR), "rb") as file:
        if file.read(len(kept)) == kept:
            os.ftruncate(file.fileno(), len(kept))
            return
    write_bytes(path, kept)


def sync(folder: Path) -> None:
    """Ask the system to put a folder's names on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LineFile:
    """The end of a text file that grows by whole lines.

    What a full disk refuses waits in memory for the next line's turn. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.size = os.fstat(self.handle).st_size
        if self.size and os.pread(self.handle, 1, self.size - 1) != b"\n":  # a kill cut its last line short
            self.size = read_regular(path, self.size).rfind(b"\n") + 1
            os.ftruncate(self.handle, self.size)
        self.waiting = b""
        self.turn = threading.Lock()

    def add(self, line: str) -> None:
        """Append a line, or keep it for later."""
        with self.turn, suppress(OSError):
            self.waiting += line.encode() + b"\n"
            self._flush()

    def sync(self) -> None:
        """Bring all lines to the disk, which keeps them through a loss of power. Raises OSError if it does not take them."""
        with self.turn:
            self._flush()
        os.fsync(self.handle)

    def _flush(self) -> None:
        if not self.waiting:
            return
        try:
            written = os.write(self.handle, self.waiting)
            if written < len(self.waiting):  # a disk that fills midway takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self.handle, self.size)
            raise OSError(f"{self.path} takes no more lines ({error.strerror})") from None
        self.size += written
        self.waiting = b""

    def close(self) -> None:
        os.close(self.handle)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Lock a plain file, which is made if missing, while the block lasts. Raises BlockingIOError if it is locked."""
    handle = open_regular(path, os.O_RDWR | os.O_CREAT)
    marker = None
    try:
        if not try_lock(handle):
            marker = Marker(path, f"process {os.getpid()}")
        yield
    except BlockingIOError:
        raise BlockingIOError(f"{path} is being written by another process: wait, or choose another file.") from None
    finally:
        if marker:
            marker.release()
        os.close(handle)


class Lock:
    """A file that one process holds until it releases it or ends in whatever way. The file says who holds it.

    On a file system without locks a Marker beside it takes their place. Raises BlockingIOError with the holder's
    description if another process has it.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.path, self.marker = path, None
        self.handle, attempts = None, 0
        while self.handle is None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = open_regular(path, os.O_RDWR | os.O_CREAT)
            except (FileNotFoundError, FileExistsError):  # its last holder removed the folder just now
                attempts += 1
                if attempts == 100:
                    raise
                continue
            try:
                if not try_lock(handle):
                    self.marker = Marker(path, holder)
                if is_same_file(path, handle):  # else it was moved away meanwhile
                    self.handle = handle
            except BlockingIOError as error:
                words = os.pread(handle, 1000, 0).decode(errors="replace") or "another process"
                advice = f" ({error.strerror})" if error.strerror else ""
                raise BlockingIOError(errno.EWOULDBLOCK, words + advice) from None
            finally:
                if self.handle is None:
                    if self.marker:
                        self.marker.release()
                        self.marker = None
                    os.close(handle)
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, holder.encode(), 0)

    def in_place(self) -> bool:
        """Whether the path still leads to the file that is locked: it may have been moved, removed or replaced."""
        return is_same_file(self.path, self.handle) and (self.marker is None or self.marker.in_place())

    def follow(self, path: Path) -> None:
        """Know the file by its new path, after its folder was renamed."""
        self.path = path
        if self.marker:
            self.marker.follow(path)

    def release(self) -> None:
        if self.marker:
            self.marker.release()
        os.close(self.handle)


def try_lock(handle: int) -> bool:
    """Lock an open file without waiting. False where its file system has no locks.

    Raises BlockingIOError, which says nothing, where another process has locked it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def is_same_file(path: Path, handle: int) -> bool:
    """Whether `path` is the open file. An error of the system, such as that of a network, answers nothing: True."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


class Marker:
    """The file `NAME.held`, which stands for a lock where the file system has none. It names a process and its host.

    What a process of this host left there, when it was killed, is replaced. Raises BlockingIOError, saying what to do,
    while the process lives, and where it ran on another host: nobody here knows whether it still does.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.follow(path)
        own = {"host": socket.gethostname(), "process": os.getpid(), "started": start_time(os.getpid()), "holder": holder}
        for attempt in range(100):
            try:
                self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                write_all(self.handle, json.dumps(own).encode())
                return
            except FileExistsError:
                found = read_marker(self.path)
            if found is None:
                continue
            if not found and attempt < 20:  # being written just now, unless a kill cut it short
                time.sleep(0.01)
                continue
            if found and found["host"] != own["host"]:
                raise BlockingIOError(errno.EWOULDBLOCK, f"if it has ended, delete {self.path}")
            if found and is_running(found["process"], found["started"]):
                raise BlockingIOError(errno.EWOULDBLOCK, "")
            self._discard(found)
        raise BlockingIOError(errno.EWOULDBLOCK, f"if it has ended, delete {self.path}")

    def follow(self, path: Path) -> None:
        """Know that it stands for the lock at `path`."""
        self.path = path.with_name(f"{path.name}{MARKER_SUFFIX}")

    def _discard(self, stale: dict[str, Any]) -> None:
        """Remove a stale marker. Of several processes that find it, one renames it; a newer one is put back."""
        doomed = self.path.with_name(f"{PARTIAL}{self.path.name}-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            os.rename(self.path, doomed)
            if read_marker(doomed) != stale:
                os.rename(doomed, self.path)
            doomed.unlink(missing_ok=True)

    def in_place(self) -> bool:
        return is_same_file(self.path, self.handle)

    def release(self) -> None:
        if self.in_place():
            self.path.unlink(missing_ok=True)
        os.close(self.handle)


def read_marker(path: Path) -> dict[str, Any] | None:
    """What a marker says: nothing where the file holds something else, None where it is gone."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    types = {"host": str, "process": int, "started": str}
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in types.items()):
        return {}
    return found if 0 < found["process"] < 2**31 else {}


def is_running(process: int, since: str) -> bool:
    """Whether the process that started then still runs. Its number alone may be another one's by now."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return start_time(process) == since


def start_time(process: int) -> str:
    """When a process started, as Linux tells it: the boot, and the clock ticks since then.

    Empty on other systems, and for a process that has ended and waits for its parent.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else f"{boot} {rest[18]}"
    except (OSError, ValueError, IndexError):
        return ""
