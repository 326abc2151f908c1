"""Decompress files as they are read, in bounded memory. Every error names the file.

Knows bytes; knows no text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK = 2**16

# zstd and xz unpack whatever they are given at once, and 4 bytes can stand for 128 KB.
# So they are given this many bytes at a time, which unpack to 16 MB at most.
INPUT_BYTES = 512

# zstd and xz refer back to text that is kept in memory: what `zstd` itself accepts by default, and
# up to 2 GB (`zstd --long=31`) for files that are themselves large.
LEAST_WINDOW, LARGEST_WINDOW = 2**27, 2**31
WINDOW_PER_BYTE = 16


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading into a ValueError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
        raise damaged(path, error) from None
    except Exception as error:
        # zstandard is optional, so its error cannot be named here.
        if type(error).__name__ != "ZstdError":
            raise
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error)
    if "too much memory" in reason or "emory usage limit" in reason:
        return ValueError(
            f"{path} is damaged, or needs more memory to be decompressed than a file of "
            f"its size may take: compress it again with default settings."
        )
    return ValueError(f"{path} is damaged or cut short ({reason}).")


def plain_name(path: Path) -> str:
    """The lower-case name of a file without the ending of its compression."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def decompressed(raw: BinaryIO, path: Path) -> Any:
    """The content of a file that is open as `raw`. It is decompressed as it is read.

    Raises ValueError if that takes a package that is not installed.
    """
    window = min(
        LARGEST_WINDOW, max(LEAST_WINDOW, WINDOW_PER_BYTE * os.fstat(raw.fileno()).st_size)
    )
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".bz2":
        return bz2.BZ2File(raw)
    if ending == ".xz":
        return io.BufferedReader(Frames(raw, lambda: lzma.LZMADecompressor(memlimit=window)), BLOCK)
    if ending == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(
                f"{path}: reading .zst needs zstandard: pip install zstandard."
            ) from None
        zstd = zstandard.ZstdDecompressor(max_window_size=window)
        return io.BufferedReader(Frames(raw, zstd.decompressobj), BLOCK)
    return raw


class Frames(io.RawIOBase):
    """The content of compressed frames, one after the other.

    Raises EOFError if the last one is cut short. `new` makes a decompressor for a
    frame, such as lzma.LZMADecompressor.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self.raw, self.new = raw, new
        self.frame = new()
        self.begun = False
        self.left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.left:
            block = self.raw.read(INPUT_BYTES)
            if self.frame.eof:
                # Zeros between frames are padding.
                block = (self.frame.unused_data + block).lstrip(b"\0")
                if block:
                    self.frame = self.new()
            elif not block:
                raise EOFError("its last frame has no end")
            if not block and not self.raw.peek(1):
                return 0
            if block:
                self.left = memoryview(self.frame.decompress(block))
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size
