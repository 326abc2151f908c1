"""Writes that are whole or absent: a temporary name, fsync, rename, fsync of the folder.

The one place that puts lasting files on a disk. What has its final name is complete, whatever was
killed while it was being made.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"  # names that start so are leftovers of a kill, never read


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes `final`, else it is removed.

    If `final` came into being meanwhile (another process made the same), that one stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{final.name}-", dir=final.parent))
    try:
        partial.chmod(0o755)
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():
                raise
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(final: Path, content: bytes) -> None:
    """Write or replace one file."""
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f"{PARTIAL}{final.name}-", dir=final.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, final)
        sync(final.parent)
    finally:
        Path(partial).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Ask the system to put a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
