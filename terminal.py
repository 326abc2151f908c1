"""Messages and results on a terminal or in a log, and errors, counts and sizes in words.

Models, files, folders and JSON contain text from strangers: an escape sequence in it could set the
window's title, fill the clipboard or clear the screen. Everything that may contain such text is
printed by `say` or `output`, which escape control characters. Like atomic.py, this module imports
no other module of the project, so that all of them can use it.
"""

import os
import sys
import unicodedata
from typing import TextIO

# Unicode categories: control, format and surrogate characters, line and paragraph separators. The
# format characters include those that reverse the direction of a line.
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Two format characters that only join letters: Persian, Hindi and many emoji need them.
JOINERS = "\u200c\u200d"


def escaped(text: str, keep: str = "\n\t") -> str:
    """`text` with each control character escaped, as in `\\x1b`, except those in `keep`."""
    if text.isprintable():
        return text
    made = []
    for letter in text:
        if unicodedata.category(letter) in ESCAPED and letter not in keep + JOINERS:
            letter = ascii(letter)[1:-1]
        made.append(letter)
    return "".join(made)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a message for people to standard output or to `file`."""
    _print(escaped(text), "\n", file or sys.stdout)


def output(text: str, end: str = "\n") -> None:
    """Print a result: exactly into a file or a pipe, escaped on a terminal."""
    if sys.stdout and sys.stdout.isatty():
        text = escaped(text)
    _print(text, end, sys.stdout)


def _print(text: str, end: str, stream: TextIO) -> None:
    """Print and flush. An OSError, as of a full disk, names the stream (<stdout>)."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        error.filename = str(getattr(stream, "name", "the output"))
        raise


def can_redraw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which a line can be overwritten."""
    try:
        return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    except (AttributeError, ValueError, OSError):
        # The stream is replaced, closed or gone.
        return False


def has_colors(stream: TextIO) -> bool:
    """Whether `stream` shows colors and the user wants them (https://no-color.org)."""
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop; else the name of its type.

    The further lines of libraries' errors are advice.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def counted(number: int, noun: str) -> str:
    """A number and its noun, as in "1 step" and "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def readable_time(seconds: float) -> str:
    """A duration in a fitting unit: "40 seconds", "2.1 minutes", "3.5 hours", "12.0 days"."""
    if seconds < 90:
        return counted(round(seconds), "second")
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    if seconds < 3 * 86400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"


def readable_size(nbytes: float) -> str:
    """A number of bytes in the largest fitting unit: "0 bytes", "367 bytes", "1.4 MB", "128 GB"."""
    if nbytes < 1000:
        return counted(round(nbytes), "byte")
    # Three digits at most: 1000 of a unit are shown as 0.98 of the next.
    nbytes, unit = nbytes / 1024, "KB"
    for larger in ("MB", "GB", "TB"):
        if nbytes >= 1000:
            nbytes, unit = nbytes / 1024, larger
    number = f"{nbytes:,.0f}" if nbytes >= 99.95 else f"{nbytes:.1f}".removesuffix(".0")
    return f"{number} {unit}"
