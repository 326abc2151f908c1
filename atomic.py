"""Atomic writes of files and folders, and files that grow by lines. All writes use them.

A file is written under a temporary name, synced, renamed, and its folder synced: a file that has
its final name is complete, even if a process was killed while writing it. Write errors raise
OSError and keep the existing file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# The prefix of temporary names. After a kill such files are left over; they are never read.
PARTIAL = ".partial-"
# The largest single write, so that other threads can run in between.
CHUNK_BYTES = 2**24
MAX_JSON_BYTES = 2**26


class NotRegularFile(OSError):
    """The path belongs to a link, a FIFO, a device or a folder instead of a regular file."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is not a regular file, but a link, a folder or a device: "
                         f"use another name, or move it away.")


def open_regular(path: Path, flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """Open a regular file and return its descriptor, without following links or waiting for FIFOs.

    `folder` is the descriptor of the folder to open it in, if that must be a certain one.
    Raises NotRegularFile for anything else, and OSError if it cannot be opened.
    """
    try:
        name = path if folder is None else path.name
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=folder)
    except OSError as error:
        if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
            raise NotRegularFile(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularFile(path)
    return descriptor


def is_regular(path: Path) -> bool:
    """Whether a path leads to a regular file on a disk.

    Those of /proc and /sys, whose size is mostly 0, call themselves regular, but reading may block.
    """
    if not path.is_file():
        return False
    return path.stat().st_size > 0 or path.resolve().parts[1] not in ("proc", "sys")


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file. Raises ValueError, reading nothing, if it exceeds `max_bytes`."""
    with os.fdopen(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise ValueError(f"{path} is larger than {max_bytes:,} bytes")
        return file.read()


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError if it cannot be read, and ValueError if it is not JSON."""
    return parse_json(read_regular(path, MAX_JSON_BYTES))


def parse_json(content: bytes | str) -> Any:
    """Parse JSON. Raises ValueError if it is invalid or nested too deeply for Python."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `final` at the end of the block.

    After an exception it is removed. A `final` that another process created meanwhile is kept. The
    parent must exist: if it was removed, it is not created again.
    """
    partial = temporary_name(final)
    partial.mkdir()
    try:
        yield partial
        publish_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, unless another process has created that folder."""
    sync(partial)
    try:
        os.rename(partial, final)
    except OSError:
        if not final.is_dir():
            raise
    sync(final.parent)


def temporary_name(final: Path) -> Path:
    return final.with_name(f"{PARTIAL}{final.name}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Delete a file or a folder. A folder is renamed first: a kill leaves no incomplete one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith(PARTIAL):
        renamed = temporary_name(path)
        os.rename(path, renamed)
        path = renamed
    shutil.rmtree(path, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left in a folder under temporary names."""
    for partial in folder.glob(f"{PARTIAL}*"):
        remove(partial)


def unused_name(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` and so on that does not exist, even as a link."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def write_bytes(final: Path, content: bytes) -> None:
    """Write or replace a file."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(final) as file:
        file.write(content)


def write_json(final: Path, value: Any, indent: int | None = None) -> None:
    """Write or replace a JSON file."""
    write_bytes(final, json.dumps(value, indent=indent).encode())


class NewFile:
    """A file with a temporary name, which gets its final name at the end of the `with` block.

    After an exception it is removed. Raises NotRegularFile for the name of a folder or a device.
    """

    def __init__(self, final: Path) -> None:
        # A rename would replace a device, even /dev/null.
        if final.exists() and not final.is_file():
            raise NotRegularFile(final)
        self.final = final
        self.partial = temporary_name(final)
        try:
            self.descriptor = create(self.partial)
        except OSError as error:
            error.filename = str(final)
            raise

    def write(self, chunk: bytes | memoryview) -> None:
        with errors_of(self.final):
            write_all(self.descriptor, chunk)

    def replace_head(self, head: bytes) -> None:
        """Overwrite the first bytes of the file."""
        with errors_of(self.final):
            os.pwrite(self.descriptor, head, 0)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, failure: type | None, *rest: object) -> None:
        try:
            # The content reaches the disk before the name does.
            try:
                if not failure:
                    with errors_of(self.final):
                        os.fsync(self.descriptor)
            finally:
                os.close(self.descriptor)
            if not failure:
                os.replace(self.partial, self.final)
                sync(self.final.parent)
        finally:
            self.partial.unlink(missing_ok=True)


def create(path: Path) -> int:
    """Create a file for writing and return its descriptor. Raises FileExistsError if it exists."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write and sync a file in a `new_folder`; return the SHA-256 of its content. Not atomic."""
    digest = hashlib.sha256()
    descriptor = create(path)
    try:
        for chunk in chunks:
            digest.update(chunk)
            with errors_of(path):
                write_all(descriptor, chunk)
        with errors_of(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    """Write a chunk, of which a single write may take only a part."""
    left = memoryview(chunk).cast("B")
    while left:
        left = left[os.write(descriptor, left[:CHUNK_BYTES]):]


def truncate(path: Path, kept: bytes) -> None:
    """Replace a file by a part of its lines. If these are its beginning, that needs no space."""
    with os.fdopen(open_regular(path, os.O_RDWR), "rb") as file:
        # Cutting off the end also works on a full disk.
        if file.read(len(kept)) == kept:
            os.ftruncate(file.fileno(), len(kept))
            return
    write_bytes(path, kept)


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """A file to append lines to. Thread-safe.

    A line that cannot be written, as on a full disk, is kept in memory until the next one. A line
    that a kill left incomplete is removed when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        # Remove an incomplete last line.
        self.size = os.fstat(self.descriptor).st_size
        if self.size and os.pread(self.descriptor, 1, self.size - 1) != b"\n":
            self.size = read_regular(path, self.size).rfind(b"\n") + 1
            os.ftruncate(self.descriptor, self.size)
        # Lines that could not be written yet.
        self.waiting = b""
        self.mutex = threading.Lock()

    def add(self, line: str) -> None:
        """Append a line, or keep it in memory."""
        with self.mutex, suppress(OSError):
            self.waiting += line.encode() + b"\n"
            self._flush()

    def sync(self) -> None:
        """Bring all lines to the disk. Raises OSError if that fails."""
        with self.mutex:
            self._flush()
        with errors_of(self.path):
            os.fsync(self.descriptor)

    def _flush(self) -> None:
        if not self.waiting:
            return
        try:
            write_all(self.descriptor, self.waiting)
        except OSError as error:
            # A part that was written will be written again with the rest.
            os.ftruncate(self.descriptor, self.size)
            raise OSError(f"{self.path} takes no more lines ({error.strerror})") from None
        self.size += len(self.waiting)
        self.waiting = b""

    def close(self) -> None:
        os.close(self.descriptor)
