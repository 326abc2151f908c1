"""What tests share that type into a program on a pseudo-terminal."""

from __future__ import annotations

import os
import select


def read_or_interrupt(terminal: int) -> bytes:
    """What is written next; Ctrl-C once more if nothing is.

    A signal that comes after the prompt, and before input() waits for the answer, is not noticed.
    """
    while not select.select([terminal], [], [], 10)[0]:
        os.write(terminal, b"\x03")
    return os.read(terminal, 1000)
