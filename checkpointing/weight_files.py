"""Read the files of other programs: JSON, safetensors, and what torch.save wrote.

Files may come from a stranger. Nothing in them is run: a pickle is only opened with
`weights_only=True`, which loads tensors and plain values. Each error is a ValueError with one
sentence about the file. Knows no names of tensors.
"""

import codecs
import errno
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import atomic
from terminal import first_line

# The largest header of a safetensors file: that of GPT-2 XL has 0.1 MB.
MAX_HEADER_BYTES = 2**24
# What `git clone` writes in place of a large file, if Git LFS is not installed.
LFS_POINTER = b"version https://git-lfs"


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """The regular file that `path` is, or links to. Errors become one sentence about the file."""
    try:
        # The cache of the Hugging Face Hub consists of links.
        found = Path(os.path.realpath(path))
        if not found.exists():
            raise FileNotFoundError(errno.ENOENT, "it does not exist")
        if not atomic.is_regular(found):
            raise ValueError(f"{path} is not a regular file.")
        if first_bytes(found).startswith(LFS_POINTER):
            raise ValueError(f"{path} is a pointer of Git LFS, without the content of the file: "
                             "run git lfs pull there, or download it.")
        yield found
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from None


def first_bytes(path: Path, count: int = 1000) -> bytes:
    """The beginning of a file."""
    with path.open("rb") as file:
        return file.read(count)


def other_kind(path: Path) -> str:
    """What a file is that torch.save cannot have written, by its beginning; else empty."""
    with reading(path) as found:
        head = first_bytes(found)
    # A zip, or from versions before 1.6 a pickle.
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return ""
    if not head:
        return "an empty file"
    try:
        # Incremental, since the last character may be cut off.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "not a file of torch.save"
    return "not a file of torch.save" if b"\0" in head else "a text file"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    with reading(path) as found:
        try:
            value = atomic.read_json(found)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: download it again.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as views of the mapped file."""
    damaged = f"{path} is not a complete safetensors file: download it again"
    with reading(path) as found:
        # The file begins with the length of its header, which the library would allocate.
        head = first_bytes(found, 8)
        if len(head) < 8 or struct.unpack("<Q", head)[0] > MAX_HEADER_BYTES:
            raise ValueError(f"{damaged}.")
        try:
            with safe_open(found, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{damaged} ({first_line(error)}).") from None


def read_pickled(path: Path) -> dict[Any, Any]:
    """The tensors and plain values that `torch.save` wrote."""
    kind = other_kind(path)
    if kind:
        raise ValueError(f"{path} is {kind}: copy or download it again.")
    with reading(path) as found, warnings.catch_warnings(action="ignore"):
        try:
            is_zip = zipfile.is_zipfile(found)
            if is_zip:
                refuse_compressed(found)
            content = torch.load(found, map_location="cpu", weights_only=True, mmap=is_zip)
        except OSError:
            raise
        except Exception as error:
            # The content decides which error this is.
            if type(error).__name__ == "UnpicklingError":
                raise ValueError(f"{path} holds more than tensors and plain values, which could "
                                 "run code when it is loaded: use a safetensors file.") from None
            raise ValueError(f"{path} is not a complete file of torch.save: copy or download it "
                             "again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no tensors by name.")
    return content


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip with compressed entries: unpacked, they could fill the memory."""
    with zipfile.ZipFile(path) as entries:
        for entry in entries.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("torch.save compresses nothing")
