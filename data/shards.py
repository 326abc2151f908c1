"""The format on disk: a folder of `.npy` shards a split, a `tokenizer.json`, and a `meta.json` about them.

Tokens are uint16 where the vocabulary allows, else uint32; shards are read through memory maps.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

import atomic

SHARD_TOKENS = 2**26  # 64 M tokens: 128 MB of uint16


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ShardWriter:
    """Collects the tokens of one split and writes a shard each time enough have come."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split = folder, split
        self.shard_tokens = shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.waiting: list[np.ndarray] = []
        self.n_waiting = self.n_shards = self.n_tokens = 0

    def add(self, ids: list[int]) -> None:
        self.waiting.append(np.asarray(ids, dtype=self.dtype))
        self.n_waiting += len(ids)
        while self.n_waiting >= self.shard_tokens:
            self.flush(self.shard_tokens)

    def flush(self, n_tokens: int) -> None:
        tokens = np.concatenate(self.waiting)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens[:n_tokens]))
        path = self.folder / f"{self.split}_{self.n_shards:05d}.npy"
        atomic.write_file(path, [header.getvalue(), tokens[:n_tokens].data])
        self.waiting = [tokens[n_tokens:]]
        self.n_waiting -= n_tokens
        self.n_shards += 1
        self.n_tokens += n_tokens

    def close(self) -> None:
        if self.n_waiting:
            self.flush(self.n_waiting)


class Tokens:
    """One split's shards as one long sequence, read-only, in constant memory."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    @classmethod
    def open(cls, folder: Path, split: str) -> Tokens:
        paths = sorted(folder.glob(f"{split}_*.npy"))
        return cls([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at `positions` (any shape), as int64. One gather a shard that is touched."""
        which = np.searchsorted(self.ends, positions, side="right")
        tokens = np.empty(positions.shape, dtype=np.int64)
        for shard in np.unique(which):
            here = which == shard
            start = self.ends[shard] - len(self.shards[shard])
            tokens[here] = self.shards[shard][positions[here] - start]
        return tokens


def read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())
