"""Checkpoints: written whole or not at all, checked when read, found by looking, pruned. safetensors and JSON, never pickle.

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

import hashlib
import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import atomic
from training.device import available_memory

FORMAT = 2
Loaded = TypeVar("Loaded")
MODEL, OPTIMIZER, STATE, TOKENIZER = "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"
FILES = (MODEL, OPTIMIZER, STATE, TOKENIZER)
MANIFEST = "manifest.json"
MAX_BYTES = {MANIFEST: 2**20, STATE: 2**20, TOKENIZER: 2**24}  # more than these JSON files ever need
MAX_DEPTH = 4  # of what is inside what in them
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
STATE_TYPES = {  # what state.json holds; numbers are finite and at least 0
    "step": int, "max_steps": int, "replanned": bool, "seconds": float, "batches_skipped": int, "nonfinite": int,
    "scheduled": bool, "val_loss": (float, type(None)), "settings": dict, "model": dict, "environment": dict, "scaler": dict,
}


class Damaged(ValueError):
    """A checkpoint that is not what was written; the message names the file and what is wrong with it."""


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

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises Damaged unless the manifest, the sizes of all files, and the state are in order."""
        if folder.is_symlink():
            raise Damaged(f"{folder} is a link")
        manifest = parse(folder / MANIFEST, read_small(folder / MANIFEST))
        if manifest.pop("sha256", None) != digest(manifest):
            raise Damaged(f"{folder / MANIFEST} does not match its own checksum")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{folder} is of format {ascii(manifest.get('format'))[:40]}, this nanohydra reads {FORMAT}: "
                             f"use the version that wrote it.")
        files = manifest.get("files")
        if not isinstance(files, dict) or sorted(files) != sorted(FILES):
            raise Damaged(f"{folder / MANIFEST} does not list the files of a checkpoint")
        for name, entry in files.items():
            if not isinstance(entry, dict) or size(folder / name) != entry.get("bytes"):
                raise Damaged(f"{folder / name} is not of the size that the manifest says")
        content = read_small(folder / STATE)
        if hashlib.sha256(content).hexdigest() != files[STATE].get("sha256"):
            raise Damaged(f"{folder / STATE} does not match its checksum")
        state = parse(folder / STATE, content)
        if problem := problem_of(state):
            raise Damaged(f"{folder / STATE} {problem}")
        if folder.name != folder_name(state["step"]):
            raise Damaged(f"{folder / STATE} is of step {state['step']}")
        return cls(folder, files, state)

    @property
    def step(self) -> int:
        return self.state["step"]

    def verify(self, names: Iterable[str] = FILES, most_bytes: float = math.inf) -> None:
        """Read the files `names` and raise Damaged if one is not what was written, or larger than can be."""
        for name in names:
            path = self.folder / name
            if size(path) > most_bytes:
                raise Damaged(f"{path} is larger than any of these settings")
            try:
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise Damaged(f"{path} cannot be read ({error.strerror})") from None
            if found != self.manifest[name].get("sha256"):
                raise Damaged(f"{path} does not match its checksum")

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        self.verify([TOKENIZER])
        return parse(self.folder / TOKENIZER, read_small(self.folder / TOKENIZER))

    def tensors(self, name: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """What model.safetensors or optimizer.safetensors hold: just what `like` has, in its shapes and types.

        Takes no memory before size and header agree, so that no file can ask for more than `like` takes. Raises
        ValueError where that is more than there is.
        """
        path, nbytes = self.folder / name, sum(tensor.nbytes for tensor in like.values())
        with open(path, "rb") as file:
            start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if header_bytes > 1000 + 400 * len(like) or 8 + header_bytes + nbytes != size(path):
            raise Damaged(f"{path} is not of the size that the settings ask for")
        if nbytes > (free := available_memory()):
            raise ValueError(f"{path} takes {megabytes(nbytes)} of memory, {megabytes(free)} are free.")
        self.verify([name])
        try:
            with safe_open(path, "pt") as file:
                there = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                found = {key: (one.get_dtype(), tuple(one.get_shape())) for key, one in there.items()}
                wanted = {key: (DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in like.items()}
                for key in sorted(found.keys() | wanted.keys()):
                    if found.get(key) != wanted.get(key):
                        raise Damaged(f"{path} holds {ascii(key)[:80]} as {found.get(key)}, the settings ask for "
                                      f"{wanted.get(key)}")
                return {key: file.get_tensor(key).clone() for key in wanted}  # of its own memory, not the file's
        except SafetensorError as error:
            raise Damaged(f"{path} cannot be read ({error})") from None


def problem_of(state: dict[str, Any]) -> str:
    """What is wrong with the content of a state.json; empty if nothing is."""
    if state.keys() != STATE_TYPES.keys():
        return f"does not hold just {', '.join(STATE_TYPES)}"
    for key, kinds in STATE_TYPES.items():
        value = state[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool) or (
                number and not 0 <= value < (2**63 if isinstance(value, int) else math.inf)):
            return f"holds {key}={ascii(value)[:40]}, which cannot be"
    return ""


def read_small(path: Path) -> bytes:
    if size(path) > MAX_BYTES[path.name]:
        raise Damaged(f"{path} is larger than any that nanohydra writes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from None


def size(path: Path) -> int:
    """In bytes. Raises Damaged for what is missing and for what is no plain file of this folder, such as a link."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path} is no plain file")
    return status.st_size


def parse(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object. Raises Damaged for anything else, such as numbers that are none and nests that are too deep."""
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
        raise Damaged(f"{path} is not the JSON that nanohydra writes")
    return value


def digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def save(checkpoints: Path, snapshot: Snapshot, settle: Callable[[], None] = lambda: None) -> None:
    """Write `checkpoints/step_XXXXXXXX`, after `settle`, which brings to the disk what must be there by then.

    Raises OSError saying how much is needed if it cannot be, leaving no part of it.
    """
    folder = checkpoints / folder_name(snapshot.state["step"])
    needed = int(1.01 * snapshot.nbytes()) + 2**20
    assert not problem_of(snapshot.state), problem_of(snapshot.state)  # what cannot be read must not be written
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            raise OSError("it is there already")
        if shutil.disk_usage(checkpoints).free < needed:
            raise OSError("the disk is full")
        settle()
        contents = {MODEL: pieces(snapshot.model), OPTIMIZER: pieces(snapshot.optimizer),
                    TOKENIZER: [json.dumps(snapshot.tokenizer).encode()],
                    STATE: [json.dumps(snapshot.state, indent=2, allow_nan=False).encode()]}
        with atomic.new_folder(folder) as partial:
            files = {}
            for name, content in contents.items():
                checksum = atomic.write_file(partial / name, content)
                files[name] = {"bytes": size(partial / name), "sha256": checksum}
            manifest = {"format": FORMAT, "files": files}
            atomic.write_file(partial / MANIFEST, [json.dumps(manifest | {"sha256": digest(manifest)}, indent=2).encode()])
    except OSError as error:
        raise OSError(f"{folder} could not be written ({error.strerror or error}): it needs {megabytes(needed)} of free "
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


def look(checkpoints: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints that can be opened, oldest first, and what is wrong with the others."""
    found, damage = [], {}
    for folder in sorted(checkpoints.glob("step_*")):
        try:
            found.append(Checkpoint.open(folder))
        except Damaged as error:
            if folder.exists():  # else it was pruned just now
                damage[folder] = str(error)
    return found, damage


def find(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints that can be opened, oldest first."""
    return look(checkpoints)[0]


def choose(checkpoints: Path, which: str, load: Callable[[Checkpoint], Loaded], warn: Callable[[str], None],
           set_aside: bool = False) -> Loaded | None:
    """What `load` makes of the first checkpoint by ORDERS[which] that it can load; None where there is none at all.

    `load` raises Damaged to have the next one tried. What is damaged on the way is named in one warning, and loses its
    place with `set_aside`. Raises ValueError if nothing else is there.
    """
    found, damage = look(checkpoints)
    for one in sorted(found, key=ORDERS[which]):
        try:
            loaded = load(one)
        except Damaged as error:
            if not one.folder.exists():  # pruned by the training that goes on: look again
                return choose(checkpoints, which, load, warn, set_aside)
            damage[one.folder] = str(error)
            continue
        if damage:
            warn(f"Warning: {'; '.join(damage.values())}: using {one.folder.name} instead.")
        for folder in damage if set_aside else ():
            folder.rename(free_name(folder.with_name(f"damaged-{folder.name}")))
        return loaded
    if damage:
        raise ValueError(f"No checkpoint in {checkpoints} is whole: {'; '.join(damage.values())}. "
                         f"Put a copy back, or begin anew with restart=true.")
    return None


def whole(one: Checkpoint) -> Checkpoint:
    """The checkpoint itself, all of it verified: a `load` for `choose`."""
    one.verify()
    return one


def free_name(path: Path) -> Path:
    """`path`, or `path` with the first number that makes it a name of its own."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists())


def quality(one: Checkpoint) -> tuple[float, int]:
    """Sorts by validation loss; what was not evaluated comes last, the newest first."""
    val_loss = one.state["val_loss"]
    return (math.inf if val_loss is None else val_loss), -one.step


def age(one: Checkpoint) -> int:
    """Sorts the newest first."""
    return -one.step


def scheduled_age(one: Checkpoint) -> tuple[bool, int]:
    """Sorts the newest first that any run with these settings has; what an interruption left comes last."""
    return not one.state["scheduled"], -one.step


ORDERS = {"best": quality, "last": age, "scheduled": scheduled_age}


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the first of each order, and what a kill left half-written.

    What is damaged stays.
    """
    found = find(checkpoints)
    kept = {one.folder for one in found[-keep_last:]}
    kept |= {min(found, key=order).folder for order in ORDERS.values() if found}
    doomed = [one.folder for one in found if one.folder not in kept] + list(checkpoints.glob(f"{atomic.PARTIAL}*"))
    for folder in doomed:
        atomic.remove(folder)


def cut_back(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which will come to be in another way."""
    for one in find(checkpoints):
        if one.step > step:
            atomic.remove(one.folder)


def check_disk(checkpoints: Path, nbytes: int) -> None:
    """Raise ValueError unless the disk under `checkpoints` holds two checkpoints of this size."""
    needed = 2 * nbytes
    folder = checkpoints
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(f"{folder} has {megabytes(free)} free, two checkpoints need {megabytes(needed)}: "
                         f"free some, or choose another runs_dir.")


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MB"
