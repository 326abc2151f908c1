"""C, compiled for just this machine when it is first used, and kept for the next process."""

from __future__ import annotations

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

COMPILE = "-O3 -march=native -fno-strict-aliasing -fopenmp -fPIC -c {source} -o {made}.o"
LINK = "-shared {made}.o -o {made}.so"  # without a library of threads: those of torch, which is there before, are enough


def library(path: str) -> ctypes.CDLL:
    """The source at `path` as a library. Raises OSError, with the reason, where it cannot be made."""
    source, compiler = Path(path), os.environ.get("CC") or "gcc"
    made_of = repr((source.read_bytes(), compiler, COMPILE, LINK, processor()))
    kept = kept_in() / f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    with suppress(OSError):
        return load(kept)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, source.stem)
        for step in (COMPILE, LINK):
            run([*shlex.split(compiler), *(word.format(source=source, made=made) for word in step.split())])
        with suppress(OSError):  # a folder that cannot be written, a full disk: then the next process compiles again
            keep(Path(f"{made}.so"), kept)
            return load(kept)
        return load(Path(f"{made}.so"))


def kept_in() -> Path:
    """The user's folder for such things; a relative one where nobody has a home, which is none."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "nanohydra"


def keep(made: Path, kept: Path) -> None:
    """Copy a library to where it is kept: by its own means, since it is a cache that can be made again, and no record."""
    if not kept.is_absolute():
        raise OSError("Nobody's home.")
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f".partial-{kept.name}-{os.getpid()}")
    try:
        shutil.copyfile(made, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, kept)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> ctypes.CDLL:
    if not path.is_absolute() or path.stat().st_uid not in (0, os.getuid()):
        raise OSError(f"{path} may be somebody else's.")
    return ctypes.CDLL(str(path))


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise OSError(f"There is no C compiler here ({command[0]}): install gcc, or name one in CC.") from None
    if done.returncode:
        raise OSError(f"{command[0]} cannot compile {command[-3]}: {done.stderr.strip()[:300]}")


def processor() -> str:
    """What tells processors apart that cannot run each other's code: several machines may share a home folder."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.machine() + platform.processor()
