"""Writes a checkpoint: a folder that gets its name once everything in it is on the disk.

Of several processes, the first one writes the folder, and all write a part of the tensors where
they are large. Knows nothing about models and optimizers. spec.py has the files.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import atomic
from checkpointing import spec
from terminal import readable_size
from training.distributed import TIMEOUT, World
from training.sharding import Divided

T = TypeVar("T")
# Tensors of more bytes are written by several processes, where there are several.
MAX_BYTES_OF_ONE_WRITER = 8 * 2**30


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint; `state` has the fields of STATE_FIELDS.

    Of several processes, each has this process's parts of the tensors.
    """

    model: spec.Tensors
    optimizer: spec.Tensors
    tokenizer: dict[str, Any]
    state: dict[str, Any]

    def nbytes(self) -> int:
        """The size of the whole tensors; the rest is small."""
        return sum(tensor.nbytes for tensor in (*self.model.values(), *self.optimizer.values()))

    def own_nbytes(self) -> int:
        """The size of this process's parts."""
        tensors = (*self.model.values(), *self.optimizer.values())
        return sum(getattr(tensor, "own", tensor).nbytes for tensor in tensors)

    def copy(self) -> Snapshot:
        """A copy on the CPU that shares no memory with the model and the optimizers."""
        def on_cpu(tensor: Tensor | Divided) -> Tensor | Divided:
            if isinstance(tensor, Divided):
                return tensor.copy()
            return tensor.detach().to("cpu", copy=True)

        model = {name: on_cpu(tensor) for name, tensor in self.model.items()}
        optimizer = {name: on_cpu(tensor) for name, tensor in self.optimizer.items()}
        return Snapshot(model, optimizer, self.tokenizer, self.state)


class Peers:
    """The processes of `world`, which save a checkpoint together, tensor by tensor.

    All must call the same methods in the same order. They talk in a group of their own, so that
    saving can continue in a thread beside training. With one process, nothing is sent.
    """

    def __init__(self, world: World | None = None) -> None:
        world = world or World({})
        self.rank, self.size, self.is_first = world.rank, world.size, world.is_first
        self.group: Any = None
        if self.size > 1:
            # All have arrived here: a new group would not notice a process that has ended.
            world.agree(0.0, False)
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def tell(self, value: T | None = None) -> T:
        """The first process's value, in all processes."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the first one; an empty list in the others."""
        if self.size == 1:
            return [value]
        everyone = [None] * self.size if self.is_first else None
        dist.gather_object(value, everyone, dst=0, group=self.group)
        return everyone or []

    def own_share(self, tensors: Mapping[str, Tensor | Divided], writers: int) -> list[str]:
        """The names of the tensors that this process writes, if `writers` processes do."""
        # In each round, every writer takes one tensor.
        return in_rounds(tensors, writers)[self.rank :: writers] if self.rank < writers else []

    def collect(self, tensors: Mapping[str, Tensor | Divided], writers: int) -> Iterator[Tensor]:
        """Yield the tensors of `own_share`, whole.

        Each process has one whole tensor at a time. All must exhaust the iterator.
        """
        names = in_rounds(tensors, writers)
        for first in range(0, len(names), writers):
            # First all tensors of a round are sent, then they are written at the same time.
            own = None
            for writer, name in enumerate(names[first : first + writers]):
                tensor = tensors[name]
                if isinstance(tensor, Divided):
                    tensor = tensor.collect(writer, self.rank, self.group)
                if writer == self.rank:
                    own = tensor
            if own is not None:
                yield own


def in_rounds(tensors: Mapping[str, Tensor | Divided], writers: int) -> list[str]:
    """The names in the order in which `writers` processes take one each: of similar sizes."""
    if writers == 1:
        return list(tensors)
    return sorted(tensors, key=lambda name: -tensors[name].nbytes)


def save_checkpoint(checkpoints: Path, snapshot: Snapshot,
                    before_write: Callable[[], None] = lambda: None,
                    peers: Peers | None = None) -> None:
    """Write `checkpoints/step_XXXXXXXX`, completely or not at all.

    Calls `before_write` first, and again before the folder gets its final name. Raises OSError
    with the space that is needed if the checkpoint cannot be written. Of several processes, the
    first one calls this, and the others `join_save`.
    """
    # Check what can be checked before anything is written.
    peers = peers or Peers()
    folder = checkpoints / spec.step_name(snapshot.state["step"])
    # The tensors, and a bound on the rest.
    needed = int(1.01 * snapshot.nbytes()) + 2**20
    problem = spec.find_problem(snapshot.state)
    assert not problem, problem
    with ExitStack() as stack:
        # If this process fails before the others write, they are told.
        stack.callback(peers.tell, None)
        try:
            before_write()
            if folder.exists():
                raise OSError("it already exists")
            if shutil.disk_usage(checkpoints).free < needed:
                raise OSError("the disk is full")
            # The folder gets its name when all files are in it.
            with atomic.new_folder(folder) as partial:
                stack.pop_all()
                peers.tell(str(partial.absolute()))
                write_files(partial, snapshot, peers)
                before_write()
        except OSError as error:
            raise OSError(
                f"{folder} could not be written ({error.strerror or error}). It needs "
                f"{readable_size(needed)} of free disk space. Earlier checkpoints are "
                "kept.") from None


def join_save(snapshot: Snapshot, peers: Peers) -> None:
    """Send this process's parts to the processes that write them, and write its share."""
    folder = peers.tell()
    if folder is not None:
        peers.gather(write_tensors(Path(folder), snapshot, peers))


def write_files(folder: Path, snapshot: Snapshot, peers: Peers) -> None:
    # The tensors, of which other processes may write some.
    files = {}
    for written, error in peers.gather(write_tensors(folder, snapshot, peers)):
        if error:
            raise error
        files |= written
    # The JSON files, and last the manifest with the checksums of all.
    contents = {spec.TOKENIZER: json.dumps(snapshot.tokenizer),
                spec.STATE: json.dumps(snapshot.state, indent=2, allow_nan=False)}
    for name, content in contents.items():
        files[name] = write_file(folder / name, [content.encode()])
    version = spec.FORMAT if spec.MODEL in files else spec.FORMAT_IN_PARTS
    manifest = {"format": version, "files": files}
    manifest["sha256"] = spec.checksum(manifest)
    atomic.write_file(folder / spec.MANIFEST, [json.dumps(manifest, indent=2).encode()])


def write_tensors(folder: Path, snapshot: Snapshot,
                  peers: Peers) -> tuple[dict[str, spec.FileEntry], OSError | None]:
    """Write this process's share of the tensors; return the files, or the error."""
    # Model and optimizer in turn: the processes must collect the same tensors at the same time.
    files, error = {}, None
    for name, tensors in ((spec.MODEL, snapshot.model), (spec.OPTIMIZER, snapshot.optimizer)):
        # One process writes a small model, all write a large one.
        writers = 1
        if snapshot.nbytes() > MAX_BYTES_OF_ONE_WRITER:
            writers = min(peers.size, len(tensors))
        own = {key: tensors[key] for key in peers.own_share(tensors, writers)}
        # Whole tensors, which arrive from the other processes one by one.
        contents = peers.collect(tensors, writers)
        if peers.rank < writers and not error:
            file = spec.part_names(name, writers)[peers.rank] if writers > 1 else name
            try:
                files[file] = write_file(folder / file, safetensors_chunks(own, contents))
            except OSError as raised:
                error = raised
        # The other processes wait until their parts are received, even if they cannot be written.
        for _ in contents:
            pass
    return files, error


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> spec.FileEntry:
    """Write a file; return its entry in the manifest."""
    sha256 = atomic.write_file(path, chunks)
    return {"bytes": path.stat().st_size, "sha256": sha256}


def safetensors_chunks(tensors: Mapping[str, Tensor], contents: Iterable[Tensor] | None = None,
                       metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: a JSON header, then the tensors, or their whole `contents`.

    The library would copy all tensors of an accelerator to the CPU at once, and would need a second
    pass for the checksum. The format: https://huggingface.co/docs/safetensors
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entry = {"dtype": spec.DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    # The length of the header, the header, padded to 8 bytes, and the bytes of the tensors.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in contents if contents is not None else tensors.values():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
