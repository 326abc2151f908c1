"""Compile a C file into a library, and keep the library in the user's cache.

A file in the cache counts as damaged or planted until proven otherwise: its folder must belong to
the user alone, its checksum must agree, and it is loaded from a copy in memory that nobody else can
change.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import atomic
from hardware import cpu_info

# Without an OpenMP library: torch has loaded the one that the code calls.
OPTIONS = ("-O3", "-march=native", "-fno-strict-aliasing", "-fPIC", "-shared")
COMPILERS = ("gcc", "clang", "cc")
CHECKSUM_BYTES = hashlib.sha256().digest_size


def load_library(source: Path) -> ctypes.CDLL:
    """A C file as a library: the one kept in the cache, or compiled and kept.

    Environment: CC is the compiler, NANOHYDRA_CFLAGS are additional flags. Raises OSError, with
    the reason, where it cannot be compiled.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), COMPILERS[0])
    command = [*shlex.split(compiler), *OPTIONS,
               *shlex.split(os.environ.get("NANOHYDRA_CFLAGS", ""))]

    # All that decides the compiled code is in the name of the kept file. The processor is, since
    # machines of several kinds can share a home.
    processor = [platform.machine(), *map(cpu_info, ("model name", "flags", "Features"))]
    inputs = repr((source.read_bytes(), command, processor))
    name = f"{source.stem}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache_home):
        cache_home = os.path.expanduser("~/.cache")
    path = Path(cache_home, "nanohydra", name)

    # Load it from the cache, or else compile and keep it.
    with suppress(OSError):
        return load(read_cached(path))
    content = compile_source(source, command)
    # If the folder cannot be used or the disk is full, the next process compiles again.
    with suppress(OSError):
        write_cached(path, content)
    return load(content)


def compile_source(source: Path, command: list[str]) -> bytes:
    """The content of the compiled library. Raises OSError if compiling fails."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "library.so")
        command = [*command, str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except (FileNotFoundError, PermissionError):
            raise OSError(f"There is no C compiler here ({command[0]}): install gcc, "
                          "or name one in CC.") from None
        if done.returncode:
            raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()[:300]}")
        return made.read_bytes()


def open_private(folder: Path) -> int:
    """Open a folder, close it to other users, and return its descriptor.

    Raises OSError if it is missing, a relative path, a symbolic link, or belongs to another user.
    """
    if not folder.is_absolute():
        raise OSError("There is no home folder.")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        check_owner(handle)
        os.fchmod(handle, 0o700)
        return handle
    except OSError:
        os.close(handle)
        raise


def check_owner(handle: int) -> None:
    """Raise OSError if an open file or folder belongs to another user."""
    if os.fstat(handle).st_uid != os.getuid():
        raise OSError("The cache belongs to another user.")


def read_cached(path: Path) -> bytes:
    """A library from the cache. Raises OSError unless it can be trusted."""
    folder = open_private(path.parent)
    try:
        # From the folder that was checked, whatever its path names by now.
        with open(atomic.open_regular(path, folder=folder), "rb") as file:
            check_owner(file.fileno())
            content = file.read()
    finally:
        os.close(folder)
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        raise OSError(f"{path} is damaged.")
    return content


def write_cached(path: Path, content: bytes) -> None:
    """Write a library, after its checksum, for the next process."""
    if path.is_absolute():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(open_private(path.parent))
    atomic.write_bytes(path, hashlib.sha256(content).digest() + content)


def load(content: bytes) -> ctypes.CDLL:
    """Load a library from a private copy, which no other process can change or truncate."""
    try:
        handle = os.memfd_create("library")
    except (AttributeError, OSError):  # not Linux, or forbidden here
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "library.so")
            atomic.write_bytes(copy, content)
            return ctypes.CDLL(str(copy))
    atomic.write_all(handle, content)
    # The handle stays open: the loader would take another file of the same name for this one.
    return ctypes.CDLL(f"/proc/self/fd/{handle}")
