"""A checkpoint: written whole or not at all, checked when read. safetensors and JSON, never pickle.

    RUN/checkpoints/step_00000300/
        model.safetensors      the weights, by their plain names
        optimizer.safetensors  the optimizers' state
        state.json             where the run stands, its settings, the model's shape, what it was computed on
        tokenizer.json         what turns the ids back into text
        manifest.json          size and SHA-256 of each of these, and of itself

Opening one trusts nothing: not its checksums, which show accidents but not intent, and not its sizes. Knows tensors
by name and nothing of what they mean.
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
MODEL, OPTIMIZER, STATE, TOKENIZER = "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"
FILES = (MODEL, OPTIMIZER, STATE, TOKENIZER)
MANIFEST = "manifest.json"
MAX_BYTES = {MANIFEST: 2**20, STATE: 2**20, TOKENIZER: 2**24}  # more than these JSON files ever need
MAX_DEPTH = 4  # of what is inside what in them
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
STATE_TYPES = {  # what state.json holds
    "step": int, "max_steps": int, "replanned": bool, "seconds": float, "batches_skipped": int, "nonfinite": int,
    "scheduled": bool, "val_loss": (float, type(None)), "settings": dict, "model": dict, "environment": dict, "scaler": dict,
    "best_val_loss": (float, type(None)), "stale_evaluations": int,
}
NEW_FIELDS = {"best_val_loss": None, "stale_evaluations": 0}  # what checkpoints of earlier versions do not hold
MAX_COUNT = 2**40  # steps of a millisecond for 35 years; times the sequences of a step it still fits 63 bits
RANGES = {  # the lowest and the highest value of the numbers in it
    "step": (0, MAX_COUNT), "max_steps": (1, 2**63 - 1), "seconds": (0, MAX_COUNT), "batches_skipped": (0, MAX_COUNT),
    "nonfinite": (0, MAX_COUNT), "val_loss": (0, sys.float_info.max),
    "best_val_loss": (0, sys.float_info.max), "stale_evaluations": (0, MAX_COUNT),
}
# These errors tell what is in a checkpoint's folder; all others come from the system and may pass.
CONTENT_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message names the file and what is wrong with it."""


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Tell damage from errors of the system, such as too many open files: only the first raises DamagedCheckpoint."""
    try:
        yield
    except atomic.NotRegularFile:
        raise DamagedCheckpoint(f"{path} is not a plain file") from None
    except (OSError, RuntimeError) as error:  # torch maps files and reports its failures as RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        missing = isinstance(error, FileNotFoundError) and not path.exists()
        if missing or getattr(error, "errno", None) in CONTENT_ERRORS:
            raise DamagedCheckpoint(f"{path} cannot be read ({reason})") from None
        raise OSError(f"{path} cannot be read now ({reason}). Nothing was changed: run the command again. If the error "
                      f"stays, move {path.parent} away, and the checkpoint before it is used.") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint is made of. `state` holds what STATE_TYPES lists."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    tokenizer: dict[str, Any]
    state: dict[str, Any]

    def nbytes(self) -> int:
        """Of the tensors; the rest is small."""
        return sum(tensor.nbytes for tensor in (*self.model.values(), *self.optimizer.values()))

    def copy(self) -> Snapshot:
        """The same in memory of its own, which training does not change."""
        def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        return Snapshot(copied(self.model), copied(self.optimizer), self.tokenizer, self.state)


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run whose small files are whole; the large ones are checked when they are asked for."""

    folder: Path
    manifest: dict[str, dict[str, Any]]  # of each file: "bytes" and "sha256"
    state: dict[str, Any]
    format: int = FORMAT

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises DamagedCheckpoint unless the manifest, the sizes of all files, and the state are in order."""
        if folder.is_symlink():
            raise DamagedCheckpoint(f"{folder} is a link")
        manifest = parse_json(folder / MANIFEST, read_small(folder / MANIFEST))
        if manifest.pop("sha256", None) != checksum(manifest):
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not match its own checksum")
        if manifest.get("format") not in READABLE:
            raise ValueError(f"{folder} is of format {ascii(manifest.get('format'))[:40]}, this nanohydra reads {FORMAT}: "
                             f"use the version that wrote it.")
        files = manifest.get("files")
        if not isinstance(files, dict) or sorted(files) != sorted(FILES):
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not list the files of a checkpoint")
        for name, entry in files.items():
            if not isinstance(entry, dict) or file_size(folder / name) != entry.get("bytes"):
                raise DamagedCheckpoint(f"{folder / name} is not of the size that the manifest says")
        content = read_small(folder / STATE)
        if hashlib.sha256(content).hexdigest() != files[STATE].get("sha256"):
            raise DamagedCheckpoint(f"{folder / STATE} does not match its checksum")
        state = NEW_FIELDS | parse_json(folder / STATE, content)
        if problem := find_problem(state):
            raise DamagedCheckpoint(f"{folder / STATE} {problem}")
        if folder.name != step_name(state["step"]):
            raise DamagedCheckpoint(f"{folder / STATE} is of step {state['step']}")
        return cls(folder, files, state, manifest["format"])

    @property
    def step(self) -> int:
        return self.state["step"]

    def verify(self, names: Iterable[str] = FILES, most_bytes: float = math.inf) -> None:
        """Read the files `names` and raise DamagedCheckpoint if one is not what was written, or larger than can be."""
        for name in names:
            path = self.folder / name
            if file_size(path) > most_bytes:
                raise DamagedCheckpoint(f"{path} is larger than any of these settings")
            with read_errors(path), os.fdopen(atomic.open_regular(path), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.manifest[name].get("sha256"):
                raise DamagedCheckpoint(f"{path} does not match its checksum")

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        self.verify([TOKENIZER])
        return parse_json(self.folder / TOKENIZER, read_small(self.folder / TOKENIZER))

    def load_tensors(self, name: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """What model.safetensors or optimizer.safetensors hold: just what `like` has, in its shapes and types.

        Takes no memory before size and header agree, so that no file can ask for more than `like` takes. Raises
        ValueError where that is more than there is.
        """
        path, nbytes = self.folder / name, sum(tensor.nbytes for tensor in like.values())
        with read_errors(path), os.fdopen(atomic.open_regular(path), "rb") as file:
            start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if header_bytes > 1000 + 400 * len(like) or 8 + header_bytes + nbytes != file_size(path):
            raise DamagedCheckpoint(f"{path} is not of the size that the settings ask for")
        if nbytes > (free := available_memory()):
            raise ValueError(f"{path} takes {readable_size(nbytes)} of memory, {readable_size(free)} are free.")
        self.verify([name])
        try:
            with read_errors(path), safe_open(path, "pt") as file:
                there = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                found = {key: (one.get_dtype(), tuple(one.get_shape())) for key, one in there.items()}
                wanted = {key: (DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in like.items()}
                for key in sorted(found.keys() | wanted.keys()):
                    if found.get(key) != wanted.get(key):
                        raise DamagedCheckpoint(f"{path} holds {ascii(key)[:80]} as {found.get(key)}, the settings ask for "
                                      f"{wanted.get(key)}")
                return {key: file.get_tensor(key).clone() for key in wanted}  # of its own memory, not the file's
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None


def find_problem(state: dict[str, Any]) -> str:
    """What is wrong with the content of a state.json; empty if nothing is."""
    if state.keys() != STATE_TYPES.keys():
        return f"does not hold just {', '.join(STATE_TYPES)}"
    for key, kinds in STATE_TYPES.items():
        value = state[key]
        fits = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
        if fits and key in RANGES and value is not None:
            lowest, highest = RANGES[key]
            fits = lowest <= value <= highest
        if not fits:
            return f"holds {key}={ascii(value)[:40]}, which is invalid"
    return ""


def read_small(path: Path) -> bytes:
    if file_size(path) > MAX_BYTES[path.name]:
        raise DamagedCheckpoint(f"{path} is larger than any that nanohydra writes")
    with read_errors(path):
        return atomic.read_regular(path, MAX_BYTES[path.name])


def file_size(path: Path) -> int:
    """In bytes. Raises DamagedCheckpoint if it is missing or not a regular file, such as a link."""
    with read_errors(path):
        status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpoint(f"{path} is not a plain file")
    return status.st_size


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object. Raises DamagedCheckpoint for anything else, such as NaN or deep nesting."""
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        value = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError):
        value = None
    inside = [value]
    for _ in range(MAX_DEPTH):
        inside = [one for outer in inside if isinstance(outer, dict | list)
                  for one in (outer.values() if isinstance(outer, dict) else outer)]
    if not isinstance(value, dict) or inside:
        raise DamagedCheckpoint(f"{path} is not the JSON that nanohydra writes")
    return value


def checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def save(checkpoints: Path, snapshot: Snapshot, before_write: Callable[[], None] = lambda: None) -> None:
    """Write `checkpoints/step_XXXXXXXX`, after `before_write`, which brings to the disk what must be there by then.

    Raises OSError saying how much is needed if it cannot be, leaving no part of it.
    """
    folder = checkpoints / step_name(snapshot.state["step"])
    needed = int(1.01 * snapshot.nbytes()) + 2**20
    assert not find_problem(snapshot.state), find_problem(snapshot.state)  # what cannot be read must not be written
    try:
        before_write()
        if folder.exists():
            raise OSError("it is there already")
        if shutil.disk_usage(checkpoints).free < needed:
            raise OSError("the disk is full")
        contents = {MODEL: pieces(snapshot.model), OPTIMIZER: pieces(snapshot.optimizer),
                    TOKENIZER: [json.dumps(snapshot.tokenizer).encode()],
                    STATE: [json.dumps(snapshot.state, indent=2, allow_nan=False).encode()]}
        with atomic.new_folder(folder) as partial:
            files = {}
            for name, content in contents.items():
                written = atomic.write_file(partial / name, content)
                files[name] = {"bytes": file_size(partial / name), "sha256": written}
            manifest = {"format": FORMAT, "files": files}
            atomic.write_file(partial / MANIFEST, [json.dumps(manifest | {"sha256": checksum(manifest)}, indent=2).encode()])
            before_write()  # once more: writing takes a while, and the folder gets its name next
    except OSError as error:
        raise OSError(f"{folder} could not be written ({error.strerror or error}): it needs {readable_size(needed)} of free "
                      f"disk. Earlier checkpoints are as they were.") from None


def pieces(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece, without another copy of the tensors (huggingface.co/docs/safetensors)."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
