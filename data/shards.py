"""The format on disk: a folder of `.npy` shards, a `tokenizer.json`, and a `meta.json` about them.

Tokens are uint16 where the vocabulary allows, else uint32; shards are read through memory maps. `meta.json` lists
each shard with its length and checksum, so that what is missing, cut short or altered is found and named.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

import atomic
from data.store import sha256_of

SPLITS = ("train", "val")


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ShardWriter:
    """A shard of one split, which grows as tokens come and gets its name when it is closed."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self.vocab_size, self.dtype = path, vocab_size, token_dtype(vocab_size)
        self.file: atomic.NewFile | None = None
        self.n_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Raises ValueError for an id that the vocabulary does not have."""
        if not len(ids):
            return
        if (largest := int(ids.max())) >= self.vocab_size:
            raise ValueError(f"{self.path}: the id {largest} is beyond the vocabulary of {self.vocab_size}.")
        if self.file is None:
            self.file = atomic.NewFile(self.path)
            self.file.write(self.header())
        self.file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.n_tokens += len(ids)

    def header(self) -> bytes:
        """What a .npy file begins with; NumPy leaves room in it, so that its size does not depend on the length."""
        written = io.BytesIO()
        np.lib.format.write_array_header_1_0(written, {
            "descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": (self.n_tokens,)})
        return written.getvalue()

    def close(self) -> list[dict[str, Any]]:
        """What `meta.json` says about the shard; of one without tokens, there is no file and nothing to say."""
        if self.file is None:
            return []
        with self.file as file:
            file.replace_head(self.header())
        return [{"file": self.path.name, "offset": len(self.header()), "dtype": np.dtype(self.dtype).name,
                 "tokens": self.n_tokens, "sha256": sha256_of([self.path])[0]}]


class ShardFile:
    """The file of a shard as it was when it was opened, so that a change of it during training is noticed.

    A file that is replaced or deleted is no change: what is mapped stays.
    """

    def __init__(self, folder: Path, shard: dict[str, Any]) -> None:
        self.path, self.sha256 = folder / shard["file"], shard["sha256"]
        self.status = self.path.stat()

    def check(self) -> None:
        """Raises ValueError where the file was written to. Reading one that was cut short would kill the process."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return
        before = self.status
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            return
        if (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
            return
        if now.st_size != before.st_size or sha256_of([self.path]) != [self.sha256]:
            raise ValueError(f"{self.path} was overwritten while its tokens were being read: put the file back that was "
                             f"there, and the same command resumes from the last checkpoint.")
        self.status = now


class Tokens:
    """Shards as one long sequence, read-only, in constant memory."""

    def __init__(self, shards: list[np.ndarray], files: list[ShardFile] | None = None) -> None:
        self.shards, self.files = shards, files or []
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    @classmethod
    def open(cls, folder: Path, split: str, part: int = 0) -> Tokens:
        """One split of prepared tokens; of a mixture, the split of one of its parts.

        Raises ValueError naming a shard that is missing or cut short.
        """
        shards = read_meta(folder)["parts"][part][split]["shards"]
        return cls([map_shard(folder, shard) for shard in shards], [ShardFile(folder, shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at `positions` (any shape), as int64. One gather a shard that is touched.

        Raises ValueError where the file of one was overwritten since it was opened.
        """
        which = np.searchsorted(self.ends, positions, side="right")
        tokens = np.empty(positions.shape, dtype=np.int64)
        for shard in np.unique(which):
            if self.files:
                self.files[shard].check()
            here = which == shard
            start = self.ends[shard] - len(self.shards[shard])
            tokens[here] = self.shards[shard][positions[here] - start]
        return tokens


def open_parts(folder: Path, split: str) -> list[Tokens]:
    """One split of prepared tokens, of each part where they are a mixture."""
    return [Tokens.open(folder, split, part) for part in range(len(read_meta(folder)["parts"]))]


def map_shard(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    path = folder / shard["file"]  # a path of its own where tokens are used where they lie
    expected = shard["offset"] + shard["tokens"] * np.dtype(shard["dtype"]).itemsize
    if not path.is_file() or path.stat().st_size != expected:
        found = f"has {path.stat().st_size:,} bytes, not {expected:,}" if path.is_file() else "is missing"
        raise ValueError(f"{path} {found}: {again(folder)}")
    return np.memmap(path, shard["dtype"], "r", shard["offset"], (shard["tokens"],))


def check(folder: Path, recipe: dict[str, Any]) -> None:
    """Raises ValueError naming what is not as `meta.json` says it was written, or not what `recipe` asks for."""
    meta = read_meta(folder)
    if differs := [name for name in recipe if meta.get(name) != recipe[name]]:
        name = differs[0]
        raise ValueError(f"{folder / 'meta.json'} is of other tokens ({name} is {meta.get(name)}, not {recipe[name]}): "
                         f"{again(folder)}")
    for part in meta["parts"]:
        check_shards(folder, [shard for split in SPLITS for shard in part[split]["shards"]])
    if meta["fingerprint"] != fingerprint_of(meta["tokenizer_fingerprint"], meta["parts"]):
        raise ValueError(f"{folder / 'meta.json'} was altered: {again(folder)}")


def check_shards(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Raises ValueError naming a shard that is missing, cut short or altered."""
    for shard in shards:
        map_shard(folder, shard)
    for shard, sha256 in zip(shards, sha256_of([folder / shard["file"] for shard in shards]), strict=True):
        if sha256 != shard["sha256"]:
            raise ValueError(f"{folder / shard['file']} does not belong to {folder / 'meta.json'} or was altered: its "
                             f"SHA-256 is {sha256[:12]}..., not {shard['sha256'][:12]}...; {again(folder)}")


def fingerprint_of(made_with: str, parts: list[dict[str, Any]]) -> str:
    """Of tokens: the same for the same ids in the same order, by the same tokenizer."""
    shards = []
    for part in parts:
        shards.append([[content_of(shard) for shard in part[split]["shards"]] for split in SPLITS])
    return hashlib.sha256(json.dumps([made_with, shards]).encode()).hexdigest()


def content_of(shard: dict[str, Any]) -> str:
    """The same for the same tokens: bytes without a header do not say which type they have."""
    if shard["offset"] or shard["dtype"] == "uint16":
        return shard["sha256"]
    return f"{shard['sha256']} {shard['dtype']}"


def again(folder: Path) -> str:
    return f"delete {folder}, and the same command prepares it again."


def write_meta(folder: Path, recipe: dict[str, Any], made_with: str, vocab_size: int, tokens: dict[str, Any]) -> None:
    """Describe prepared tokens; their fingerprint says which tokens they are, and of which tokenizer (`made_with`)."""
    meta = recipe | {"tokenizer_fingerprint": made_with, "vocab_size": vocab_size,
                     "fingerprint": fingerprint_of(made_with, tokens["parts"])} | tokens
    atomic.write_bytes(folder / "meta.json", json.dumps(meta, indent=2).encode())


def read_meta(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a `meta.json` that is missing or is none."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        check_fields(meta)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{path} cannot be read: {again(folder)}") from None
    return meta


def check_fields(meta: dict[str, Any]) -> None:
    """Raises ValueError, LookupError or TypeError for a meta file with missing fields or fields of wrong types."""
    texts = [meta["fingerprint"], meta["tokenizer_fingerprint"]]
    counts = [meta["vocab_size"]]
    for split in SPLITS:
        if not isinstance(meta["splits"][split], dict):
            raise TypeError("a split that should be an object is not")
        for part in meta["parts"]:
            for shard in part[split]["shards"]:
                texts += [shard["file"], shard["sha256"]]
                counts += [shard["offset"], shard["tokens"]]
                if np.dtype(shard["dtype"]).kind not in "ui":
                    raise ValueError(f"{shard['dtype']} is no type of tokens")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a field that should be text is not")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise TypeError("a field that should be a number is not")
