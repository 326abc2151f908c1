"""Open compressed files as streams of their content, in bounded memory. Every error names the file.

Knows bytes; knows no text.
"""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from optional import import_optional

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

# What Python's readers raise for damaged files.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)

# zstd and xz decompress all of their input at once, and 4 bytes can stand for 128 KB.
# This many bytes at a time decompress to 16 MB at most. bzip2 takes a limit of the output instead.
INPUT_BYTES, OUTPUT_BYTES = 512, 2**20

# zstd and xz keep a window of the last text in memory. The smallest limit is the default of the
# `zstd` command; large files may need up to 2 GB (`zstd --long=31`).
LEAST_WINDOW, LARGEST_WINDOW = 2**27, 2**31
WINDOW_PER_BYTE = 16


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn read errors into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
        # zstandard is optional, so its exception class cannot be named here.
        if not isinstance(error, DAMAGE) and type(error).__name__ != "ZstdError":
            raise
        reason = str(error)
        if "too much memory" in reason or "emory usage limit" in reason:
            raise ValueError(f"{path} is damaged, or needs more memory than is allowed for its "
                             f"size: compress it again with default settings.") from None
        raise ValueError(f"{path} is damaged or truncated ({reason}).") from None


def plain_name(path: Path) -> str:
    """The file name in lower case, without the suffix of a compression format."""
    name = path.name.lower()
    stem, ending = os.path.splitext(name)
    return stem if ending in COMPRESSIONS else name


def decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """A stream of the decompressed content of `path`, which is open as `raw`.

    Raises ValueError if this needs a package that is not installed.
    """
    # .xz and .zst need as much memory as the file says, up to a limit.
    window = WINDOW_PER_BYTE * os.fstat(raw.fileno()).st_size
    window = min(max(window, LEAST_WINDOW), LARGEST_WINDOW)
    match path.suffix.lower():
        case ".gz":
            # Python's own stream needs little memory. That for bzip2 ignores damage after a frame.
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            new_decompressor = bz2.BZ2Decompressor
        case ".xz":
            new_decompressor = partial(lzma.LZMADecompressor, memlimit=window)
        case ".zst":
            zstandard = import_optional("zstandard", f"{path} needs zstandard", "zstandard")
            new_decompressor = zstandard.ZstdDecompressor(max_window_size=window).decompressobj
        case _:
            return raw
    frames = decompress_frames(raw, new_decompressor)
    return io.BufferedReader(BlockStream(frames), buffer_size=2**16)


def decompress_frames(raw: BinaryIO, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """The content of one compressed frame after the other.

    Raises EOFError if the last one is truncated.
    """
    frame = new_decompressor()
    limit = [OUTPUT_BYTES] if isinstance(frame, bz2.BZ2Decompressor) else []
    while block := raw.read(INPUT_BYTES):
        while block:
            if not frame.eof:
                yield frame.decompress(block, *limit)
                while limit and not (frame.needs_input or frame.eof):
                    yield frame.decompress(b"", *limit)
                block = frame.unused_data
                continue
            # Another frame follows. Zeros between frames are padding.
            block = block.lstrip(b"\0")
            if block:
                frame = new_decompressor()
    if not frame.eof:
        raise EOFError("its last frame has no end")


class BlockStream(io.RawIOBase):
    """An unbuffered stream of the bytes that an iterator yields."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks = blocks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        # An empty block is not the end.
        if not self.rest:
            self.rest = memoryview(next(filter(None, self.blocks), b""))
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size
