"""Run serve.py in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAM = str(Path(__file__).parent.parent / "serve.py")


@contextmanager
def running_server(settings: Sequence[str], program: Sequence[str] = (PROGRAM,)) -> Iterator[str]:
    """The address of a server on a free port. `program` are the words for Python before `settings`.

    Raises ValueError if it does not start.
    """
    with subprocess.Popen([sys.executable, *program, *settings, "port=0"],
                          stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if " at http" not in line:
                raise ValueError("The server did not start: its message is above.")
            yield line.rpartition(" at ")[2].strip()
        finally:
            process.terminate()
