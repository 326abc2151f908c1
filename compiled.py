"""C, compiled for just this machine when it is first used, and kept for the next process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import atomic

COMPILE = "-O3 -march=native -fopenmp -fPIC -c {source} -o {made}.o"
LINK = "-shared {made}.o -o {made}.so"  # without a library of threads: those of torch, which is there before, are enough


def library(path: str) -> ctypes.CDLL:
    """The source at `path` as a library. Raises OSError, with the reason, where it cannot be made."""
    source, compiler = Path(path), os.environ.get("CC") or "cc"
    made_of = repr((source.read_bytes(), compiler, COMPILE, LINK, processor()))
    name = f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanohydra", name)
    with suppress(OSError):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, source.stem)
        for step in (COMPILE, LINK):
            run([*shlex.split(compiler), *(word.format(source=source, made=made) for word in step.split())])
        found = ctypes.CDLL(f"{made}.so")
        if kept.is_absolute():  # there is a home folder
            with suppress(OSError):  # that cannot be written, or is full: then the next process compiles again
                atomic.write_bytes(kept, Path(f"{made}.so").read_bytes())
        return found


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
