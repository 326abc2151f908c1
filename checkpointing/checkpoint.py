"""The checkpoint format: a folder of safetensors and JSON files, checked by checksum when read.

    RUN/checkpoints/step_00000300/
        model.safetensors      the weights
        optimizer.safetensors  the state of the optimizers
        state.json             counters, settings, shape of the model, environment
        tokenizer.json         the tokenizer
        manifest.json          size and SHA-256 of each file above, and of itself

A checkpoint may come from a stranger, who can also write matching checksums: docs/runs.md states
what is checked. Knows nothing about models and optimizers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import atomic
from terminal import readable_size
from training.device import available_memory

FORMAT = 3
READABLE = (2, FORMAT)  # format 2 named optimizer state by position; see state.py
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, TOKENIZER, MANIFEST = "state.json", "tokenizer.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE, TOKENIZER)

# More than the JSON files ever need.
MAX_BYTES = {MANIFEST: 2**20, STATE: 2**20, TOKENIZER: 2**24}
MAX_NESTING = 4
# The header of a safetensors file: 1,000 bytes, and 400 for each tensor.
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 1000, 400

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.float64: "F64", torch.int64: "I64"}
# 35 years of one-millisecond steps. Times the sequences of a step, it still fits 63 bits.
MAX_COUNT = 2**40
COUNT = (int, 0, MAX_COUNT)
LOSS = (float | None, 0, sys.float_info.max)
# The fields of state.json: type, and the lowest and highest value of a number.
STATE_FIELDS: dict[str, tuple[Any, ...]] = {
    "step": COUNT,
    "max_steps": (int, 1, 2**63 - 1),
    "replanned": (bool,),
    "seconds": (float, 0, MAX_COUNT),
    "batches_skipped": COUNT,
    "nonfinite": COUNT,
    "scheduled": (bool,),
    "val_loss": LOSS,
    "settings": (dict,),
    "model": (dict,),
    "environment": (dict,),
    "scaler": (dict,),
    "best_val_loss": LOSS,
    "stale_evaluations": COUNT,
}
# Values for checkpoints of earlier versions, which lack these fields.
NEW_FIELDS = {"best_val_loss": None, "stale_evaluations": 0}
# The system errors that are caused by the content of a folder. All others may be temporary.
CONTENT_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedCheckpoint(ValueError):
    """A checkpoint whose content is not as written; the message names the file and the problem."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint; `state` has the fields of STATE_FIELDS."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    tokenizer: dict[str, Any]
    state: dict[str, Any]

    def nbytes(self) -> int:
        """The size of the tensors; the rest is small."""
        return sum(tensor.nbytes for tensor in (*self.model.values(), *self.optimizer.values()))

    def copy(self) -> Snapshot:
        """A copy on the CPU that shares no memory with the model and the optimizers."""
        def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        return Snapshot(copied(self.model), copied(self.optimizer), self.tokenizer, self.state)


@dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint. Opening reads only the small files; `verify` checks the large ones."""

    folder: Path
    manifest: dict[str, dict[str, Any]]  # "bytes" and "sha256" of each file
    state: dict[str, Any]
    format: int = FORMAT

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the manifest and the state.

        Raises DamagedCheckpoint if one of these, or the size of any file, is wrong.
        """
        if folder.is_symlink():
            raise DamagedCheckpoint(f"{folder} is a link")
        manifest = parse_json(folder / MANIFEST, read_small(folder / MANIFEST))
        if manifest.pop("sha256", None) != checksum(manifest):
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not match its own checksum")
        version = manifest.get("format")
        if version not in READABLE:
            raise ValueError(f"{folder} has checkpoint format {ascii(version)[:40]}; this version "
                             f"of nanohydra reads format {FORMAT}. Use the version that wrote it.")
        files = manifest.get("files")
        if not isinstance(files, dict) or sorted(files) != sorted(FILES):
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not list the files of a checkpoint")
        for name, entry in files.items():
            if not isinstance(entry, dict) or file_size(folder / name) != entry.get("bytes"):
                raise DamagedCheckpoint(f"{folder / name} does not have the size in the manifest")
        content = read_small(folder / STATE)
        if hashlib.sha256(content).hexdigest() != files[STATE].get("sha256"):
            raise DamagedCheckpoint(f"{folder / STATE} does not match its checksum")
        state = NEW_FIELDS | parse_json(folder / STATE, content)
        problem = find_problem(state)
        if problem:
            raise DamagedCheckpoint(f"{folder / STATE} {problem}")
        if folder.name != step_name(state["step"]):
            raise DamagedCheckpoint(f"{folder / STATE} is of step {state['step']}")
        return cls(folder, files, state, version)

    @property
    def step(self) -> int:
        return self.state["step"]

    def verify(self, names: Iterable[str] = FILES, max_bytes: float = math.inf) -> None:
        """Raise DamagedCheckpoint if a file exceeds `max_bytes` or does not match its checksum."""
        for name in names:
            path = self.folder / name
            if file_size(path) > max_bytes:
                raise DamagedCheckpoint(f"{path} is larger than these settings allow")
            with read_errors(path), os.fdopen(atomic.open_regular(path), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.manifest[name].get("sha256"):
                raise DamagedCheckpoint(f"{path} does not match its checksum")

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        self.verify([TOKENIZER])
        return parse_json(self.folder / TOKENIZER, read_small(self.folder / TOKENIZER))

    def load_tensors(self, name: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Read model.safetensors or optimizer.safetensors.

        Raises DamagedCheckpoint unless it has the names, shapes and dtypes of `like`, and
        ValueError if they do not fit in memory. Both come before any memory is allocated.
        """
        path = self.folder / name
        nbytes = sum(tensor.nbytes for tensor in like.values())
        if file_size(path) > nbytes + HEADER_BYTES + HEADER_BYTES_PER_TENSOR * len(like):
            raise DamagedCheckpoint(f"{path} is larger than the settings ask for")
        free = available_memory()
        if nbytes > free:
            raise ValueError(f"{path} needs {readable_size(nbytes)} of memory, "
                             f"{readable_size(free)} are free.")
        self.verify([name])
        wanted = {key: (DTYPES[value.dtype], tuple(value.shape)) for key, value in like.items()}
        try:
            with read_errors(path), safe_open(path, "pt") as file:
                found = {}
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_slice(key)
                    found[key] = (tensor.get_dtype(), tuple(tensor.get_shape()))
                for key in sorted(found.keys() | wanted.keys()):
                    if found.get(key) != wanted.get(key):
                        raise DamagedCheckpoint(
                            f"{path} has {ascii(key)[:80]} as {found.get(key)}, but the settings "
                            f"ask for {wanted.get(key)}")
                # Without the copy, the tensors would be views of the mapped file.
                return {key: file.get_tensor(key).clone() for key in wanted}
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None


def step_name(step: int) -> str:
    """The folder name of a checkpoint."""
    return f"step_{step:08d}"


def find_problem(state: dict[str, Any]) -> str:
    """What is wrong with the content of state.json; empty if it is valid."""
    if state.keys() != STATE_FIELDS.keys():
        return f"must have exactly the fields {', '.join(STATE_FIELDS)}"
    for key, (kind, *bounds) in STATE_FIELDS.items():
        value = state[key]
        valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if valid and bounds and value is not None:
            valid = bounds[0] <= value <= bounds[1]
        if not valid:
            return f"has {key}={ascii(value)[:40]}, which is invalid"
    return ""


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise DamagedCheckpoint for damage, and OSError for errors such as too many open files."""
    try:
        yield
    except atomic.NotRegularFile:
        raise DamagedCheckpoint(f"{path} is not a regular file") from None
    except (OSError, RuntimeError) as error:
        # safetensors and torch report failures to map a file as RuntimeError, in several lines.
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        missing = isinstance(error, FileNotFoundError) and not path.exists()
        if missing or getattr(error, "errno", None) in CONTENT_ERRORS:
            raise DamagedCheckpoint(f"{path} cannot be read ({reason})") from None
        raise OSError(
            f"{path} cannot be read now ({reason}). Nothing was changed: run the command again. If "
            f"the error stays, move {path.parent} away to use the checkpoint before it."
        ) from None


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


def checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(checkpoints: Path, snapshot: Snapshot,
         before_write: Callable[[], None] = lambda: None) -> None:
    """Write `checkpoints/step_XXXXXXXX`, completely or not at all.

    Calls `before_write` first, and again before the folder gets its final name. Raises OSError
    with the space that is needed if the checkpoint cannot be written.
    """
    folder = checkpoints / step_name(snapshot.state["step"])
    needed = int(1.01 * snapshot.nbytes()) + 2**20
    problem = find_problem(snapshot.state)
    assert not problem, problem
    try:
        before_write()
        if folder.exists():
            raise OSError("it already exists")
        if shutil.disk_usage(checkpoints).free < needed:
            raise OSError("the disk is full")
        with atomic.new_folder(folder) as partial:
            write_files(partial, snapshot)
            before_write()
    except OSError as error:
        raise OSError(
            f"{folder} could not be written ({error.strerror or error}). It needs "
            f"{readable_size(needed)} of free disk space. Earlier checkpoints are kept."
        ) from None


def write_files(folder: Path, snapshot: Snapshot) -> None:
    contents = {
        MODEL: safetensors_chunks(snapshot.model),
        OPTIMIZER: safetensors_chunks(snapshot.optimizer),
        TOKENIZER: [json.dumps(snapshot.tokenizer).encode()],
        STATE: [json.dumps(snapshot.state, indent=2, allow_nan=False).encode()],
    }
    files = {}
    for name, chunks in contents.items():
        sha256 = atomic.write_file(folder / name, chunks)
        files[name] = {"bytes": file_size(folder / name), "sha256": sha256}
    manifest = {"format": FORMAT, "files": files}
    manifest["sha256"] = checksum(manifest)
    atomic.write_file(folder / MANIFEST, [json.dumps(manifest, indent=2).encode()])


def safetensors_chunks(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: a JSON header, then the tensors.

    The library would copy all tensors of an accelerator to the CPU at once, and would need a second
    pass for the checksum. The format: https://huggingface.co/docs/safetensors
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
