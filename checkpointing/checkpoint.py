"""Read a checkpoint, and check everything in it by sizes and checksums.

A checkpoint may come from a stranger, who can also write matching checksums: docs/runs.md states
what is checked. spec.py has the files. Knows nothing about models and optimizers.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

import atomic
from checkpointing import spec
from hardware import check_free
from terminal import first_line

# More than the JSON files ever need.
MAX_BYTES = {spec.MANIFEST: 2**20, spec.STATE: 2**20, spec.TOKENIZER: 2**24}
MAX_NESTING = 4
# The header of a safetensors file: 1,000 bytes, and 400 for each tensor.
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 1000, 400

# The system errors that are caused by the content of a folder. All others may be temporary.
CONTENT_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedCheckpoint(ValueError):
    """A checkpoint whose content is not as written; the message names the file and the problem."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint. Opening reads only the small files; `verify` checks the large ones.

    `verified` are the names of the files that were found to match their checksums. That takes
    seconds for a large model, so it is done once.
    """

    folder: Path
    manifest: dict[str, spec.FileEntry]
    state: dict[str, Any]
    verified: set[str] = field(default_factory=set, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the manifest and the state.

        Raises DamagedCheckpoint if one of these, or the size of any file, is wrong.
        """
        # The manifest: complete, in a format that is known, and of files with their sizes.
        if folder.is_symlink():
            raise DamagedCheckpoint(f"{folder} is a link")
        manifest = parse_json(folder / spec.MANIFEST, read_small(folder / spec.MANIFEST))
        if manifest.pop("sha256", None) != spec.checksum(manifest):
            raise DamagedCheckpoint(f"{folder / spec.MANIFEST} does not match its own checksum")
        # Another version's format is no damage: this ValueError ends the command.
        version = manifest.get("format")
        if version not in (spec.FORMAT, spec.FORMAT_IN_PARTS):
            raise ValueError(
                f"{folder} has checkpoint format {ascii(version)[:40]}; this version of nanohydra "
                f"reads format {spec.FORMAT}. Use the version that wrote it.")
        # All files are there, with the sizes that the manifest lists.
        files = manifest.get("files")
        if not isinstance(files, dict) or not spec.is_complete(files):
            raise DamagedCheckpoint(f"{folder / spec.MANIFEST} does not list the files of a "
                                    "checkpoint")
        for name, entry in files.items():
            if not isinstance(entry, dict) or file_size(folder / name) != entry.get("bytes"):
                raise DamagedCheckpoint(f"{folder / name} does not have the size in the manifest")

        # The state: as it was written, and of this step.
        content = read_small(folder / spec.STATE)
        if hashlib.sha256(content).hexdigest() != files[spec.STATE].get("sha256"):
            raise DamagedCheckpoint(f"{folder / spec.STATE} does not match its checksum")
        state = parse_json(folder / spec.STATE, content)
        problem = spec.find_problem(state)
        if problem:
            raise DamagedCheckpoint(f"{folder / spec.STATE} {problem}")
        if folder.name != spec.step_name(state["step"]):
            raise DamagedCheckpoint(f"{folder / spec.STATE} is of step {state['step']}")
        return cls(folder, files, state)

    @property
    def step(self) -> int:
        return self.state["step"]

    def files(self, name: str) -> list[str]:
        """The files that hold the content of one of FILES."""
        return [name] if name in self.manifest else spec.parts_of(name, self.manifest)

    def verify(self, names: Iterable[str] = spec.FILES, max_bytes: float = math.inf) -> None:
        """Raise DamagedCheckpoint if a file exceeds `max_bytes` or does not match its checksum."""
        for file_name in itertools.chain.from_iterable(map(self.files, names)):
            path = self.folder / file_name
            if file_size(path) > max_bytes:
                raise DamagedCheckpoint(f"{path} is larger than these settings allow")
            if file_name in self.verified:
                continue
            with read_errors(path), os.fdopen(atomic.open_regular(path), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.manifest[file_name].get("sha256"):
                raise DamagedCheckpoint(f"{path} does not match its checksum")
            self.verified.add(file_name)

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        self.verify([spec.TOKENIZER])
        path = self.folder / spec.TOKENIZER
        return parse_json(path, read_small(path))

    def load_tensors(self, name: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Read model.safetensors or optimizer.safetensors, checked as by `open_tensors`.

        Raises ValueError, before any memory is allocated, if the tensors do not fit in memory.
        """
        tensors = self.open_tensors(name, like)
        check_free(sum(tensor.nbytes for tensor in like.values()), self.folder / name)
        # Without the copy, they would still be views of the file.
        return {key: tensors[key].clone() for key in like}

    def open_tensors(self, name: str, like: spec.Tensors) -> Mapping[str, Tensor]:
        """The tensors of model.safetensors or optimizer.safetensors, as views of the mapped file.

        Raises DamagedCheckpoint unless it has the names, shapes and dtypes of `like`.
        """
        # Check sizes and checksums before the library reads anything.
        paths = [self.folder / one for one in self.files(name)]
        nbytes = sum(tensor.nbytes for tensor in like.values())
        headers = HEADER_BYTES * len(paths) + HEADER_BYTES_PER_TENSOR * len(like)
        if sum(map(file_size, paths)) > nbytes + headers:
            raise DamagedCheckpoint(f"{self.folder / name} is larger than the settings ask for")
        self.verify([name])

        # Compare the dtype and shape of each tensor with those of `like`.
        wanted = {key: (spec.DTYPES[value.dtype], list(value.shape))
                  for key, value in like.items()}
        found: dict[str, tuple[str, list[int]]] = {}
        path_of: dict[str, Path] = {}
        # The headers of the files have both; no tensor is read yet.
        for path in paths:
            with read_errors(path), safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    if key in found:
                        raise DamagedCheckpoint(f"{path} has tensors that another file has, too")
                    entry = file.get_slice(key)
                    found[key], path_of[key] = (entry.get_dtype(), entry.get_shape()), path
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise DamagedCheckpoint(
                    f"{self.folder / name} has {ascii(key)[:80]} as {found.get(key)}, but the "
                    f"settings ask for {wanted.get(key)}")
        return LazyTensors(path_of)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, read when they are asked for.

    The pages that are read of an open file stay in memory. So each tensor opens its file, which is
    closed when the tensor is freed.
    """

    def __init__(self, path_of: dict[str, Path]) -> None:
        self.path_of = path_of

    def __getitem__(self, key: str) -> Tensor:
        path = self.path_of[key]
        with read_errors(path), safe_open(path, "pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.path_of)

    def __len__(self) -> int:
        return len(self.path_of)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise DamagedCheckpoint for damage, and OSError for errors such as too many open files."""
    try:
        yield
    except atomic.NotRegularFile:
        raise DamagedCheckpoint(f"{path} is not a regular file") from None
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None
    except (OSError, RuntimeError) as error:
        # safetensors and torch report failures to map a file as RuntimeError, in several lines.
        reason = getattr(error, "strerror", None) or first_line(error)
        missing = isinstance(error, FileNotFoundError) and not path.exists()
        if missing or getattr(error, "errno", None) in CONTENT_ERRORS:
            raise DamagedCheckpoint(f"{path} cannot be read ({reason})") from None
        raise OSError(
            f"{path} cannot be read now ({reason}). Nothing was changed: run the command again. If "
            f"the error stays, move {path.parent} away to use the checkpoint before it.") from None


def read_small(path: Path) -> bytes:
    """The content of a JSON file, if it is not larger than it can be."""
    try:
        with read_errors(path):
            return atomic.read_regular(path, MAX_BYTES[path.name])
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from None


def file_size(path: Path) -> int:
    """The size in bytes. Raises DamagedCheckpoint unless `path` is a regular file, and no link."""
    with read_errors(path):
        status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpoint(f"{path} is not a regular file")
    return status.st_size


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The object in a JSON file. Raises DamagedCheckpoint for anything else."""
    try:
        value = atomic.parse_json(content)
    except ValueError:
        value = None
    if not isinstance(value, dict) or is_nested_deeper(value, MAX_NESTING):
        raise DamagedCheckpoint(f"{path} is not a JSON file of nanohydra")
    return value


def is_nested_deeper(value: Any, levels: int) -> bool:
    """Whether dicts and lists are nested in more levels. Settings are compared recursively."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_nested_deeper(child, levels - 1) for child in children)
