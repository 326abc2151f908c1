"""The format of prepared tokens: a folder with `.npy` shards, `tokenizer.json` and `meta.json`.

Tokens are uint16 if the vocabulary allows, else uint32, and are read through memory maps.
`meta.json` lists the length and checksum of each shard, so that a missing, truncated or changed
shard is detected.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import atomic
from data.store import sha256_of

SPLITS = ("train", "val")
CHUNK = 2**22  # tokens that are counted or compared at a time


class ShardWriter:
    """Write a shard of one split. The file gets its name only when it is closed."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.file: atomic.NewFile | None = None
        self.n_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Append tokens. Raises ValueError for an id that is not in the vocabulary."""
        if not len(ids):
            return
        largest = int(ids.max())
        if largest >= self.vocab_size:
            raise ValueError(f"{self.path}: the id {largest} is not below {self.vocab_size}.")
        # Without tokens there is no file. The length in the header is set when it is closed.
        if self.file is None:
            self.file = atomic.NewFile(self.path)
            self.file.write(self.header())
        self.file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.n_tokens += len(ids)

    def header(self) -> bytes:
        """The header of a .npy file. NumPy pads it, so its size is the same for every length."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {
            "descr": self.dtype.str, "fortran_order": False, "shape": (self.n_tokens,)})
        return header.getvalue()

    def close(self) -> list[dict[str, Any]]:
        """The entry of the shard in `meta.json`; none, and no file, for a shard without tokens."""
        if self.file is None:
            return []
        with self.file as file:
            file.replace_head(self.header())
        return [{"file": self.path.name, "offset": len(self.header()), "dtype": self.dtype.name,
                 "tokens": self.n_tokens, "sha256": sha256_of([self.path])[0]}]


class ShardFile:
    """The file of an open shard, to detect that it is overwritten during training.

    It may be replaced or deleted: the memory map keeps the old file.
    """

    def __init__(self, folder: Path, shard: dict[str, Any]) -> None:
        self.path, self.sha256 = folder / shard["file"], shard["sha256"]
        self.status = self.path.stat()

    def check(self) -> None:
        """Raise ValueError if the file was changed. Reading beyond its end kills the process."""
        try:
            now, before = self.path.stat(), self.status
        except FileNotFoundError:
            return
        # A replaced file does no harm, and an unchanged one needs no checksum.
        is_changed = (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
        if not is_changed or not os.path.samestat(now, before):
            return
        if now.st_size != before.st_size or sha256_of([self.path]) != [self.sha256]:
            raise ValueError(f"{self.path} was overwritten while it was being read: restore the "
                             f"file, and the same command resumes from the last checkpoint.")
        self.status = now


class Tokens:
    """Shards as one long read-only sequence, in constant memory."""

    def __init__(self, shards: list[np.ndarray], files: list[ShardFile] | None = None) -> None:
        self.shards, self.files = shards, files or []
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    @classmethod
    def open(cls, folder: Path, split: str, part: int = 0) -> Tokens:
        """One split of a part of prepared tokens. Raises ValueError naming a damaged shard."""
        shards = read_meta(folder)["parts"][part][split]["shards"]
        return cls([map_shard(folder, shard) for shard in shards],
                   [ShardFile(folder, shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def positions_of(self, token: int) -> np.ndarray:
        """The positions of a token, in ascending order."""
        found = [np.zeros(0, dtype=np.int64)]
        for start, chunk in self.chunks():
            found.append(start + np.flatnonzero(chunk == token))
        return np.concatenate(found)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All tokens in order, CHUNK or fewer at a time, each chunk with its position."""
        position = 0
        for shard in self.shards:
            for start in range(0, len(shard), CHUNK):
                chunk = shard[start : start + CHUNK]
                yield position, chunk
                position += len(chunk)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at `positions` (any shape), as int64. One gather for each shard.

        Raises ValueError if a shard was overwritten.
        """
        # The shard of each position is the first one that ends after it.
        shard_of = np.searchsorted(self.ends, positions, side="right")
        tokens = np.empty(positions.shape, dtype=np.int64)
        for shard in np.unique(shard_of):
            if self.files:
                self.files[shard].check()
            here = shard_of == shard
            # The position of the shard's first token.
            start = self.ends[shard] - len(self.shards[shard])
            tokens[here] = self.shards[shard][positions[here] - start]
        return tokens


def open_parts(folder: Path, split: str) -> list[Tokens]:
    """One split of prepared tokens, for each part of a mixture."""
    return [Tokens.open(folder, split, part) for part in range(len(read_meta(folder)["parts"]))]


def map_shard(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    # The path is absolute if the file belongs to another program and lies elsewhere.
    path = folder / shard["file"]
    expected = shard["offset"] + shard["tokens"] * np.dtype(shard["dtype"]).itemsize
    if not path.is_file():
        raise ValueError(f"{path} is missing: {prepare_again(folder)}")
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {expected:,}: "
                         f"{prepare_again(folder)}")
    return np.memmap(path, shard["dtype"], "r", shard["offset"], (shard["tokens"],))


def check(folder: Path, recipe: dict[str, Any]) -> None:
    """Raise ValueError for tokens that do not match `meta.json`, or were made by another recipe."""
    # They were made from the same text, with the same settings and tokenizer.
    meta = read_meta(folder)
    for name, value in recipe.items():
        if meta.get(name) != value:
            raise ValueError(f"{folder / 'meta.json'} describes other tokens ({name} is "
                             f"{meta.get(name)} instead of {value}): {prepare_again(folder)}")

    # All shards are intact, and no entry of meta.json was edited.
    shards = []
    for part in meta["parts"]:
        for split in SPLITS:
            shards += part[split]["shards"]
    check_shards(folder, shards)
    fingerprint = fingerprint_of(meta["tokenizer_fingerprint"], meta["parts"])
    checksum = checksum_of(meta)
    # Older tokens have no checksum.
    if meta["fingerprint"] != fingerprint or meta.get("checksum", checksum) != checksum:
        raise ValueError(f"{folder / 'meta.json'} was changed: {prepare_again(folder)}")


def check_shards(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Raise ValueError naming a shard that is missing, truncated or changed."""
    for shard in shards:
        map_shard(folder, shard)
    digests = sha256_of([folder / shard["file"] for shard in shards])
    for shard, sha256 in zip(shards, digests, strict=True):
        if sha256 != shard["sha256"]:
            raise ValueError(f"{folder / shard['file']} was changed (its SHA-256 is not that in "
                             f"meta.json, {shard['sha256'][:12]}...): {prepare_again(folder)}")


def fingerprint_of(tokenizer_fingerprint: str, parts: list[dict[str, Any]]) -> str:
    """The fingerprint of tokens: the same for the same ids, order and tokenizer."""

    def content_of(shard: dict[str, Any]) -> str:
        # The checksum, and the type if no header in the file states it.
        has_header = shard["offset"] or shard["dtype"] == "uint16"
        return shard["sha256"] if has_header else f"{shard['sha256']} {shard['dtype']}"

    shards = []
    for part in parts:
        shards.append([list(map(content_of, part[split]["shards"])) for split in SPLITS])
    return hashlib.sha256(json.dumps([tokenizer_fingerprint, shards]).encode()).hexdigest()


def checksum_of(content: dict[str, Any]) -> str:
    """A hash of all entries of a JSON object but the checksum itself."""
    entries = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def prepare_again(folder: Path) -> str:
    """The end of a message about damaged tokens."""
    return f"delete {folder}, and the same command prepares it again."


def write_meta(folder: Path, recipe: dict[str, Any], tokenizer_fingerprint: str, vocab_size: int,
               tokens: dict[str, Any]) -> None:
    """Write `meta.json`: the recipe, the tokenizer, the tokens, their fingerprint, a checksum."""
    meta = recipe | {"tokenizer_fingerprint": tokenizer_fingerprint, "vocab_size": vocab_size,
                     "fingerprint": fingerprint_of(tokenizer_fingerprint, tokens["parts"])} | tokens
    atomic.write_json(folder / "meta.json", meta | {"checksum": checksum_of(meta)}, indent=2)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read `meta.json`. Raises ValueError if it is missing or damaged, else OSError."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        check_fields(meta)
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{path} cannot be read: {prepare_again(folder)}") from None
    return meta


def check_fields(meta: dict[str, Any]) -> None:
    """Raise ValueError, LookupError or TypeError for missing fields or fields of wrong types."""
    # Collect the fields by type. A missing one raises LookupError.
    texts = [meta["fingerprint"], meta["tokenizer_fingerprint"]]
    counts = [meta["vocab_size"]]
    for split in SPLITS:
        if not isinstance(meta["splits"][split], dict):
            raise TypeError("a split is not an object")
        for part in meta["parts"]:
            for shard in part[split]["shards"]:
                texts += [shard["file"], shard["sha256"]]
                counts += [shard["offset"], shard["tokens"]]
                if np.dtype(shard["dtype"]).kind not in "ui":
                    raise ValueError(f"{shard['dtype']} is not an integer type")
    # Check the types.
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    if not are_counts or not all(isinstance(text, str) for text in texts):
        raise TypeError("a field is not a string, or not a non-negative integer")
