"""C compiled on the machine that runs it, for just this processor, when it is first used; and kept for the next process."""

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

# Where threads come from is not linked: torch has brought its own, and one pool of them is enough.
COMPILE, LINK = "-O3 -march=native -fopenmp -fPIC -c {source} -o {object}", "-shared {object} -o {library}"


def library(source: Path) -> ctypes.CDLL:
    """`source` as a library. Raises OSError, with the reason, where there is no compiler or it cannot do it."""
    compiler = os.environ.get("CC") or "cc"
    made_from = source.read_bytes(), compiler, COMPILE, LINK, processor()
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanohydra" / f"{source.stem}-{digest}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        names = {"source": str(source), "object": f"{scratch}/{source.stem}.o", "library": f"{scratch}/{source.stem}.so"}
        for step in (COMPILE, LINK):
            command = [*shlex.split(compiler), *(word.format(**names) for word in step.split())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{compiler} cannot compile {source.name}: {done.stderr.strip()[:500]}")
        made = ctypes.CDLL(names["library"])
        with suppress(OSError):  # a folder that cannot be written, a full disk: then for this process alone
            atomic.write_bytes(kept, Path(names["library"]).read_bytes())
        return made


def processor() -> str:
    """What tells processors apart that cannot run each other's code: a home folder may be shared by several machines."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    return platform.machine() + platform.processor()
