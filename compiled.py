"""Compiles C for this machine when it is first used, and keeps the library for the next process.

A kept library is damaged or planted until proven otherwise: it is read from a folder that only its
user can change, compared with its checksum, and loaded from memory that nobody else can change.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import atomic

COMPILE = "-O3 -march=native -fno-strict-aliasing -fPIC -c {source} -o {made}.o"
LINK = "-shared {made}.o -o {made}.so"  # torch has loaded the OpenMP library that the code calls
COMPILERS = ("gcc", "clang", "cc")
CHECKSUM_BYTES = hashlib.sha256().digest_size


def library(path: str) -> ctypes.CDLL:
    """The C file at `path` as a library, compiled by CC with the flags of NANOHYDRA_CFLAGS.

    Raises OSError, with the reason, where it cannot be compiled.
    """
    source, flags = Path(path), os.environ.get("NANOHYDRA_CFLAGS", "")
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), COMPILERS[0])
    made_of = repr((source.read_bytes(), compiler, COMPILE, flags, LINK, processor()))
    kept = cache_folder() / f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    with suppress(OSError):
        return load(read(kept))
    content = compiled(source, shlex.split(compiler), shlex.split(flags))
    with suppress(OSError):  # a folder that cannot be used, a full disk: the next process compiles
        keep(kept, content)
    return load(content)


def cache_folder() -> Path:
    """The user's folder for compiled code; a relative path, which is not used, without a home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "nanohydra"


def private(folder: Path) -> int:
    """An open handle of a folder that only its user can change from now on.

    Raises OSError if it is missing, a relative path, a symbolic link, or belongs to another user.
    """
    if not folder.is_absolute():
        raise OSError("There is no home folder.")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(handle)
        if found.st_uid != os.getuid():
            raise OSError(f"{folder} belongs to another user.")
        if found.st_mode & 0o077:
            os.fchmod(handle, 0o700)
        return handle
    except OSError:
        os.close(handle)
        raise


def own_bytes(path: str, folder: int | None = None) -> bytes:
    """The content of a file, which may be in an open folder.

    Raises OSError if it is missing, or not a plain file of this user.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a plain file of this user.")
        return file.read()


def read(kept: Path) -> bytes:
    """A kept library. Raises OSError if there is none that can be trusted."""
    folder = private(kept.parent)
    try:
        content = own_bytes(kept.name, folder)
    finally:
        os.close(folder)
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        raise OSError(f"{kept} is damaged.")
    return content


def keep(kept: Path, content: bytes) -> None:
    """Write a library, behind its checksum, for the next process."""
    if kept.is_absolute():
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(private(kept.parent))
    atomic.write_bytes(kept, hashlib.sha256(content).digest() + content)


def load(content: bytes) -> ctypes.CDLL:
    """Load a library from a private copy, which no other process can change or shorten."""
    try:
        handle = os.memfd_create("library")
    except (AttributeError, OSError):  # not Linux, or forbidden here
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "library.so")
            atomic.write_bytes(copy, content)
            return ctypes.CDLL(str(copy))
    try:
        atomic.write_all(handle, content)
        # The handle stays open: the loader would take another file of the same name for this one.
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise


def compiled(source: Path, compiler: list[str], flags: list[str]) -> bytes:
    """The library that the compiler makes of `source`. Raises OSError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, source.stem)
        for step, more in ((COMPILE, flags), (LINK, [])):
            words = [word.format(source=source, made=made) for word in step.split()]
            run([*compiler, *words, *more])
        return own_bytes(f"{made}.so")


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except (FileNotFoundError, PermissionError):
        raise OSError(f"There is no C compiler here ({command[0]}): install gcc, "
                      "or name one in CC.") from None
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()[:300]}")


def processor() -> str:
    """Tells processors apart that may not run each other's code, as machines share home folders."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = ("model name", "flags", "Features")
        return "\n".join(sorted({line for line in lines if line.startswith(described)}))
    return platform.machine() + platform.processor()
