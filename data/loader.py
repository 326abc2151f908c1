"""Batches as a pure function of (seed, step, micro-step, rank), so resuming is exact.

The order of sequences is frozen: another order would change the batches of resumed runs.

The split is cut into windows of `block_size` tokens. Each epoch reads every window once, in the
order of a keyed permutation, and cuts at another offset (the split is read as a ring), so that no
token stays at the edge of its window. The parts of a mixture are cut and shuffled separately, and
interleaved by weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.mixture import Interleaving
from data.shards import Tokens

FEISTEL_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a permutation of `range(n)` to `index`. Each element has its own key.

    A Feistel network permutes the next power of four. Results of n or more are permuted again
    (cycle walking, Black and Rogaway 2002). O(1) per element, without a table.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)

    def feistel(x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(keys + np.uint64(r))) & low)
        return left << half | right

    result = feistel(index.astype(np.uint64), keys)
    outside = result >= n
    while outside.any():
        result[outside] = feistel(result[outside], keys[outside])
        outside = result >= n
    return result.astype(np.int64)


class Windows:
    """The windows of a split in an endless shuffled order, `[block_size + 1]` tokens each."""

    def __init__(self, tokens: Tokens, block_size: int, seed: np.ndarray) -> None:
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.count = (len(tokens) - 1) // block_size

    def starts(self, index: np.ndarray) -> np.ndarray:
        """The first positions of the windows at `index`, counted from the start of the run."""
        epoch, in_epoch = np.divmod(index, self.count)
        keys = mix(self.seed ^ mix(epoch.astype(np.uint64)))
        offset = (mix(keys ^ np.uint64(0xFF)) % np.uint64(self.block_size)).astype(np.int64)
        first = offset + permute(in_epoch, self.count, keys) * self.block_size
        return first % len(self.tokens)

    def read(self, index: np.ndarray) -> np.ndarray:
        positions = self.starts(index)[:, None] + np.arange(self.block_size + 1)
        return self.tokens.read(positions % len(self.tokens))


class Loader:
    """Training batches from the parts of a mixture, interleaved by `weights`.

    In a step, each of `world_size` ranks has `micro_steps` batches of `batch_size` sequences, a
    contiguous piece of the step: micro-step m of a rank is micro-step `rank * micro_steps + m` of
    the same step on one rank. Raises ValueError for a split shorter than one context.
    """

    def __init__(self, tokens: list[Tokens], block_size: int, batch_size: int, micro_steps: int = 1,
                 seed: int = 0, world_size: int = 1, weights: list[int] | None = None) -> None:
        self.block_size, self.batch_size = block_size, batch_size
        self.micro_steps, self.world_size = micro_steps, world_size
        check_lengths("training", tokens, block_size, "use more text or a smaller model.block_size")
        self.parts = []
        for part, split in enumerate(tokens):
            part_seed = mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(part)
            self.parts.append(Windows(split, block_size, part_seed))
        self.interleaving = Interleaving(weights or [1] * len(tokens))

    @property
    def tokens_per_step(self) -> int:
        return self.world_size * self.micro_steps * self.batch_size * self.block_size

    def steps_an_epoch(self) -> list[float]:
        """The number of steps in which each part is read once."""
        steps = []
        for part, weight in zip(self.parts, self.interleaving.weights, strict=True):
            share = weight / self.interleaving.period
            steps.append(part.count * self.block_size / (self.tokens_per_step * share))
        return steps

    def sequences(self, step: int) -> list[int]:
        """The first positions of all sequences of a step, each in the split of its part."""
        count = self.tokens_per_step // self.block_size
        part, index = self.interleaving.at(step * count + np.arange(count, dtype=np.int64))
        starts = np.empty(count, dtype=np.int64)
        for number in np.unique(part):
            starts[part == number] = self.parts[number].starts(index[part == number])
        return starts.tolist()

    def batch(self, step: int, micro_step: int = 0, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 `[batch_size, block_size]`."""
        micro_batch = (step * self.world_size + rank) * self.micro_steps + micro_step
        sequences = micro_batch * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        part, index = self.interleaving.at(sequences)
        windows = np.empty((self.batch_size, self.block_size + 1), dtype=np.int64)
        for number in np.unique(part):
            windows[part == number] = self.parts[number].read(index[part == number])
        return as_batch(windows)


class Prefetch:
    """The batches of one rank on its device. While a GPU computes, a thread reads the next batch.

    It reads into pinned memory, from which a GPU copies asynchronously. Batches may be requested in
    any order, as after a rollback. An error on the thread is raised when its batch is requested.
    """

    def __init__(self, loader: Loader, device: torch.device, rank: int = 0) -> None:
        self.loader, self.device, self.rank = loader, device, rank
        self.micro_steps, self.world_size = loader.micro_steps, loader.world_size
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.next_key: tuple[int, int] | None = None  # (step, micro-step)
        self.next_batch: Future[list[Tensor]]

    def batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the device, each int64 `[batch_size, block_size]`."""
        if self.device.type != "cuda":
            return self.loader.batch(step, micro_step, self.rank)
        prefetched = (step, micro_step) == self.next_key
        pinned = self.next_batch.result() if prefetched else self.read(step, micro_step)
        is_last = micro_step + 1 == self.micro_steps
        self.next_key = (step + 1, 0) if is_last else (step, micro_step + 1)
        self.next_batch = self.executor.submit(self.read, *self.next_key)
        inputs, targets = (ids.to(self.device, non_blocking=True) for ids in pinned)
        return inputs, targets

    def read(self, step: int, micro_step: int) -> list[Tensor]:
        """A batch in pinned memory; contiguous, because strided copies are synchronous."""
        batch = self.loader.batch(step, micro_step, self.rank)
        return [ids.contiguous().pin_memory() for ids in batch]


class Validation:
    """The validation windows, the same in each evaluation: in order, up to `max_tokens`.

    In a mixture, `weights` are the parts' shares of `max_tokens` and, even if a part has fewer
    tokens, of the mean. Rank r reads the batches r, r + world_size, ... with unchanged weights, so
    the sum over the ranks is the mean of all batches. All ranks read equally many: where one has
    no batch left, it reads the first one again, with a weight of 0.
    """

    def __init__(self, tokens: list[Tokens], block_size: int, batch_size: int, max_tokens: int,
                 weights: list[int] | None = None, rank: int = 0, world_size: int = 1) -> None:
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.rank, self.world_size = rank, world_size
        check_lengths("validation", tokens, block_size,
                      "raise data.val_fraction, use more text, or lower model.block_size")
        weights = weights or [1] * len(tokens)
        self.shares = [weight / sum(weights) for weight in weights]
        self.n_windows = []
        for split, share in zip(tokens, self.shares, strict=True):
            n_tokens = min(len(split) - 1, max(int(max_tokens * share), block_size))
            self.n_windows.append(n_tokens // block_size)

    @property
    def n_batches(self) -> int:
        """The number of batches of all ranks."""
        return sum(-(-n_windows // self.batch_size) for n_windows in self.n_windows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Inputs and targets, int64 `[batch_size or fewer, block_size]`; weight in the mean."""
        batches = []
        for part, n_windows in enumerate(self.n_windows):
            for first in range(0, n_windows, self.batch_size):
                batches.append((part, first))
        turns = -(-len(batches) // self.world_size)
        for number in range(self.rank, turns * self.world_size, self.world_size):
            is_own = number < len(batches)
            part, first = batches[number if is_own else 0]
            n_windows = self.n_windows[part]
            last = min(first + self.batch_size, n_windows)
            positions = np.arange(first, last)[:, None] * self.block_size
            windows = self.tokens[part].read(positions + np.arange(self.block_size + 1))
            weight = self.shares[part] * len(windows) / n_windows if is_own else 0.0
            yield *as_batch(windows), weight


def check_lengths(split: str, tokens: list[Tokens], block_size: int, advice: str) -> None:
    """Raise ValueError if the split of a part is shorter than one context."""
    for part, part_tokens in enumerate(tokens, start=1):
        which = f" of part {part} of the mixture" if len(tokens) > 1 else ""
        if len(part_tokens) <= block_size:
            raise ValueError(f"The {split} split{which} has {len(part_tokens)} tokens, one context "
                             f"needs {block_size + 1}: {advice}.")


def as_batch(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Windows `[B, T + 1]` -> inputs and targets, each `[B, T]`."""
    ids = torch.from_numpy(windows)
    return ids[:, :-1], ids[:, 1:]
