"""What tests share that type into a program on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parent.parent


def type_into(words: list[str], prompt: bytes, lines: list[bytes]) -> tuple[bytes, int]:
    """What a Python program says if each line is typed after its prompt, and its exit code."""
    master, slave = os.openpty()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    said = b""
    for typed in lines:
        while not said.endswith(prompt):
            said += os.read(master, 1000)
        os.write(master, typed)
        said += typed
    with contextlib.suppress(OSError):  # as Linux reports that the other side is closed
        while piece := read_or_interrupt(master):
            said += piece
    return said, process.wait()


def read_or_interrupt(terminal: int) -> bytes:
    """What is written next; Ctrl-C once more if nothing is.

    A signal that comes after the prompt, and before input() waits for the answer, is not noticed.
    """
    while not select.select([terminal], [], [], 10)[0]:
        os.write(terminal, b"\x03")
    return os.read(terminal, 1000)
