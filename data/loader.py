"""Batches as a pure function of (seed, step, rank).

There is no cursor and no shuffled list: where a training run stands is its step number, so resuming is exact
and every world size reads the same global batches. The definition is frozen: changing it would change
what each resumed run reads next.

The split is cut into windows of `block_size` tokens. Epoch e visits each window once, in the order of a keyed
permutation that is computed at any index. From epoch to epoch the cut itself moves by a drawn offset (the
sequence is read as a ring), so that no token stays at the edge of its window. The parts of a mixture are cut
and shuffled each on its own, and take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.mixture import Turns
from data.shards import Tokens

FEISTEL_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of `range(n)` sends `index`; `keys`, one an element, choose the permutation.

    A Feistel network permutes the next power of four; what falls outside n is sent on until it is inside,
    which keeps it a permutation (cycle walking, Black and Rogaway 2002). O(1) an element, no table.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)

    def feistel(x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(keys + np.uint64(r))) & low)
        return left << half | right

    result = feistel(index.astype(np.uint64), keys)
    while (outside := result >= n).any():
        result[outside] = feistel(result[outside], keys[outside])
    return result.astype(np.int64)


class Windows:
    """The windows of a split, `[block_size + 1]` tokens each, in an endless order that depends on `seed` alone."""

    def __init__(self, tokens: Tokens, block_size: int, seed: np.ndarray, of: str = "") -> None:
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.count = (len(tokens) - 1) // block_size
        if self.count < 1:
            raise ValueError(f"The training split{of} has {len(tokens)} tokens, one context needs "
                             f"{block_size + 1}: use more text or a smaller model.block_size.")

    def starts(self, index: np.ndarray) -> np.ndarray:
        """Where the windows begin that are read as the `index`-th since the run began."""
        epoch, within = np.divmod(index, self.count)
        keys = mix(self.seed ^ mix(epoch.astype(np.uint64)))
        offset = (mix(keys ^ np.uint64(0xFF)) % np.uint64(self.block_size)).astype(np.int64)
        return (offset + permute(within, self.count, keys) * self.block_size) % len(self.tokens)

    def read(self, index: np.ndarray) -> np.ndarray:
        positions = self.starts(index)[:, None] + np.arange(self.block_size + 1)
        return self.tokens.read(positions % len(self.tokens))


class Loader:
    """Training batches: inputs and, one position on, targets.

    `tokens` are a training split, or those of the parts of a mixture, which take turns by their `weights`.
    `batch_size` sequences a micro-step and rank; `micro_steps` and `world_size` of those make a step.
    Raises ValueError for a split that is shorter than one context.
    """

    def __init__(self, tokens: list[Tokens], block_size: int, batch_size: int, micro_steps: int = 1,
                 seed: int = 0, world_size: int = 1, weights: list[int] | None = None) -> None:
        self.block_size = block_size
        self.batch_size, self.micro_steps, self.world_size = batch_size, micro_steps, world_size
        seeds = [mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(part) for part in range(len(tokens))]
        self.parts = [Windows(split, block_size, seed, part_of(tokens, part))
                      for part, (split, seed) in enumerate(zip(tokens, seeds, strict=True))]
        self.turns = Turns(weights or [1] * len(tokens))

    @property
    def tokens_per_step(self) -> int:
        return self.world_size * self.micro_steps * self.batch_size * self.block_size

    def steps_an_epoch(self) -> list[float]:
        """In how many steps each part has been read once."""
        shares = self.turns.counts / self.turns.period
        return [part.count * self.block_size / (self.tokens_per_step * share)
                for part, share in zip(self.parts, shares, strict=True)]

    def sequences(self, step: int) -> list[int]:
        """Where the sequences of a step, of all its ranks and micro-steps, begin in the training split of their part."""
        count = self.tokens_per_step // self.block_size
        source, index = self.turns.at(step * count + np.arange(count, dtype=np.int64))
        return [int(self.parts[part].starts(one[None])[0]) for part, one in zip(source, index, strict=True)]

    def batch(self, step: int, micro_step: int = 0, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 `[batch_size, block_size]`."""
        first = (step * self.micro_steps + micro_step) * self.world_size + rank
        source, index = self.turns.at(first * self.batch_size + np.arange(self.batch_size, dtype=np.int64))
        windows = np.empty((self.batch_size, self.block_size + 1), dtype=np.int64)
        for part in np.unique(source):
            windows[source == part] = self.parts[part].read(index[source == part])
        return as_batch(windows)


class Prefetch:
    """A loader for a device. While a GPU computes on a batch, a thread reads the next one.

    It reads into pinned memory, from which a GPU copies without holding anyone up. For other devices there is neither
    thread nor pinning: a batch is the loader's own. Any batch can be asked for at any time; what is not the next one, as
    after a rollback, is read when it is asked for. What goes wrong on the thread is raised where its batch is asked for.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device, self.micro_steps = loader, device, loader.micro_steps
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")  # which starts with the first batch to read
        self.next_place: tuple[int, int] | None = None
        self.next_batch: Future[list[Tensor]]

    def batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 `[batch_size, block_size]`; of a GPU, on it."""
        if self.device.type != "cuda":
            return self.loader.batch(step, micro_step)
        place = step, micro_step
        pinned = self.next_batch.result() if place == self.next_place else self.read(*place)
        self.next_place = (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
        self.next_batch = self.thread.submit(self.read, *self.next_place)
        inputs, targets = (ids.to(self.device, non_blocking=True) for ids in pinned)
        return inputs, targets

    def read(self, step: int, micro_step: int) -> list[Tensor]:
        """A batch in pinned memory; in one piece, because a copy of scattered rows would wait after all."""
        return [ids.contiguous().pin_memory() for ids in self.loader.batch(step, micro_step)]


class Validation:
    """The held-out windows, the same at every evaluation: in order, without overlap, up to `max_tokens`.

    The parts of a mixture have their shares of `max_tokens` and, however few tokens they hold, of the mean.
    """

    def __init__(self, tokens: list[Tokens], block_size: int, batch_size: int, max_tokens: int,
                 weights: list[int] | None = None) -> None:
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        weights = weights or [1] * len(tokens)
        self.shares = [weight / sum(weights) for weight in weights]
        self.n_windows = [min(len(split) - 1, max(int(max_tokens * share), block_size)) // block_size
                          for split, share in zip(tokens, self.shares, strict=True)]
        for part, (split, n_windows) in enumerate(zip(tokens, self.n_windows, strict=True)):
            if n_windows < 1:
                raise ValueError(f"The validation split{part_of(tokens, part)} has {len(split)} tokens, one context needs "
                                 f"{block_size + 1}: raise data.val_fraction, use more text, or lower model.block_size.")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Inputs and targets, each int64 `[batch_size or fewer, block_size]`, and what they weigh in the mean."""
        for split, n_windows, share in zip(self.tokens, self.n_windows, self.shares, strict=True):
            for first in range(0, n_windows, self.batch_size):
                starts = np.arange(first, min(first + self.batch_size, n_windows)) * self.block_size
                windows = split.read(starts[:, None] + np.arange(self.block_size + 1))
                yield *as_batch(windows), share * len(windows) / n_windows


def part_of(tokens: list[Tokens], part: int) -> str:
    """Which split is meant, where a mixture has several."""
    return f" of part {part + 1} of the mixture" if len(tokens) > 1 else ""


def as_batch(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Windows `[B, T + 1]` -> what the model reads and what it should say, each `[B, T]`."""
    ids = torch.from_numpy(windows)
    return ids[:, :-1], ids[:, 1:]
