"""Read prompts from a file or from standard input, with limits on what is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from terminal import readable_size

MAX_BYTES = 2**24


def read_text(name: str, path: str) -> str:
    """The text of a file, or of standard input for `-`; line endings stay as they are.

    `name` is the setting that named it. Raises ValueError if it is too large, not UTF-8, or not a
    file that can be read.
    """
    if path == "-":
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif Path(path).is_dir():
        raise ValueError(f"{name}={path} is a folder: name a file.")
    else:
        # Without O_NONBLOCK, opening a named pipe waits for a writer, perhaps forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(handle, True)
        with open(handle, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    if not content and Path(path).is_fifo():
        raise ValueError(f"{name}={path} is a pipe that nothing was written to: start its writer "
                         "first.")
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name}={path} holds more than {readable_size(MAX_BYTES)}: choose a "
                         "smaller file.")
    try:
        # Some editors write a byte order mark.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}={path} is not UTF-8 at offset {error.start}: save it as "
                         "UTF-8.") from None
