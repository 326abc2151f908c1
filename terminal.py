"""What people read: messages and results on a terminal or in a log, and counts and sizes in them.

Models, files, folders and JSON hold text that we did not write: an escape sequence in it could set
the window's title, fill the clipboard or clear the screen. Everything that may contain such text
is printed by `say` or `output`, which write control characters out. This module imports nothing of
ours, like atomic.py, so that every other module can use it.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TextIO

# Control, format and surrogate characters, line and paragraph separators (Unicode categories).
# The format characters include those that reverse the direction of a line.
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Two format characters that only join letters: Persian, Hindi and many emoji are written with them.
JOINERS = "\u200c\u200d"


def escaped(text: str, keep: str = "\n\t") -> str:
    """`text` with each control character written out, as in `\\x1b`; those in `keep` stay."""
    if text.isprintable():
        return text
    kept = keep + JOINERS
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in ESCAPED and letter not in kept else letter
        for letter in text
    )


def say(text: str, file: TextIO | None = None) -> None:
    """Print a message for people: a line or more, to standard output or to `file`."""
    print(escaped(text), file=file, flush=True)


def output(text: str, end: str = "\n") -> None:
    """Print a result: as it is into a file or a pipe, escaped on a terminal."""
    print(escaped(text) if sys.stdout.isatty() else text, end=end, flush=True)


def can_redraw(stream: TextIO) -> bool:
    """Whether a line on `stream` can be drawn over: it is a terminal, and one that moves its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    except (AttributeError, ValueError, OSError):  # replaced, closed, or gone
        return False


def has_colors(stream: TextIO) -> bool:
    """Whether colours show on `stream` and are wanted (https://no-color.org)."""
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def counted(number: int, noun: str) -> str:
    """As in "1 step" and "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def readable_time(seconds: float) -> str:
    """A duration in the unit that fits: "40 seconds", "2.1 minutes", "3.5 hours", "12.0 days"."""
    if seconds < 90:
        return counted(round(seconds), "second")
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 3 * 86400 else f"{seconds / 86400:.1f} days"


def readable_size(nbytes: float) -> str:
    """A number of bytes in the largest unit that fits: "0 bytes", "367 bytes", "1.4 MB", "128 GB"."""
    if nbytes < 1000:
        return counted(round(nbytes), "byte")
    for unit in ("KB", "MB", "GB", "TB"):
        nbytes /= 1024
        if nbytes < 1000 or unit == "TB":
            break
    digits = f"{nbytes:.1f}".removesuffix(".0") if nbytes < 99.95 else f"{nbytes:,.0f}"
    return f"{digits} {unit}"
