"""Batches as a pure function of (seed, step, micro-step, rank), so resuming is exact.

The order of sequences is frozen: another order would change the batches of resumed runs.

The split is cut into windows of `block_size` tokens. Each epoch reads every window once, in the
order of a keyed permutation, and cuts at another offset (the split is read as a ring), so that no
token stays at the edge of its window. The parts of a mixture are cut and shuffled separately, and
interleaved by weight. Sequences of conversations hold whole ones instead (data/examples.py).
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.chat import Markers
from data.examples import Examples
from data.order import Interleaving, mix, permute
from data.shards import Tokens
from terminal import counted


class Windows:
    """The windows of a split in an endless shuffled order, `[block_size + 1]` tokens each."""

    def __init__(self, tokens: Tokens, block_size: int, seed: np.ndarray) -> None:
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.count = (len(tokens) - 1) // block_size

    def shuffled(self, index: np.ndarray) -> np.ndarray:
        """The first positions of the windows at `index`, counted from the start of the run."""
        # Each epoch has its own order, and its own offset of all windows.
        epoch, in_epoch = np.divmod(index, self.count)
        keys = mix(self.seed ^ mix(epoch.astype(np.uint64)))
        offset = (mix(keys ^ np.uint64(0xFF)) % np.uint64(self.block_size)).astype(np.int64)
        first = offset + permute(in_epoch, self.count, keys) * self.block_size
        return first % len(self.tokens)

    def in_order(self, index: np.ndarray) -> np.ndarray:
        """The first positions of the windows in the order of the split, without an offset."""
        return index * self.block_size

    def starts(self, places: np.ndarray) -> np.ndarray:
        """The first positions of windows; `places` are the result of `shuffled` or `in_order`."""
        return places

    def n_targets(self, places: np.ndarray) -> np.ndarray:
        """The number of targets in each window."""
        return np.full(len(places), self.block_size)

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of windows, each `[N, block_size]`."""
        positions = places[:, None] + np.arange(self.block_size + 1)
        # [N, block_size + 1]; a window that reaches the end continues at the start.
        ids = self.tokens.read(positions % len(self.tokens))
        return ids[:, :-1], ids[:, 1:]

    def count_within(self, max_tokens: int) -> int:
        """The number of windows with at most `max_tokens` tokens, at least one."""
        return min(self.count, max(max_tokens, self.block_size) // self.block_size)


class Loader:
    """Training batches from the parts of a mixture, interleaved by `weights`.

    In a step, each of `world_size` ranks has `micro_steps` batches of `batch_size` sequences, a
    contiguous piece of the step: micro-step m of a rank is micro-step `rank * micro_steps + m` of
    the same step on one rank. With the `markers` of conversations, sequences are whole ones, and
    only answers are targets. Raises ValueError for a split shorter than one context.
    """

    def __init__(self, tokens: list[Tokens], block_size: int, batch_size: int, micro_steps: int = 1,
                 seed: int = 0, world_size: int = 1, weights: list[int] | None = None,
                 markers: Markers | None = None) -> None:
        self.block_size, self.batch_size = block_size, batch_size
        self.micro_steps, self.world_size = micro_steps, world_size
        self.parts = open_sequences(tokens, block_size, markers, seed, "training",
                                    "use more text or a smaller model.block_size")
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

    def notes(self) -> str:
        """What is left out of the sequences of conversations; empty for text."""
        return " and ".join(part.describe() for part in self.parts if isinstance(part, Examples))

    def sequences(self, step: int) -> list[int]:
        """The first positions of all sequences of a step, each in the split of its part."""
        return self.of_step(step, lambda part, places: part.starts(places)).tolist()

    def n_targets(self, step: int) -> list[int]:
        """The number of targets in each micro-step of a step, of all ranks."""
        counts = self.of_step(step, lambda part, places: part.n_targets(places))
        return counts.reshape(-1, self.batch_size).sum(axis=1).tolist()

    def of_step(self, step: int, value: Callable[..., np.ndarray]) -> np.ndarray:
        """A value of each sequence of a step, of all ranks, given its part and its place there."""
        count = self.tokens_per_step // self.block_size
        values = np.empty(count, dtype=np.int64)
        sequences = step * count + np.arange(count, dtype=np.int64)
        for here, part, places in self.by_part(sequences):
            values[here] = value(part, places)
        return values

    def by_part(self, sequences: np.ndarray) -> Iterator[tuple[Any, Windows | Examples, Any]]:
        """For each part of the mixture: which of the sequences it has, and their places there."""
        numbers, index = self.interleaving.at(sequences)
        for number in np.unique(numbers):
            here, part = numbers == number, self.parts[number]
            yield here, part, part.shuffled(index[here])

    def batch(self, step: int, micro_step: int = 0, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 `[batch_size, block_size]`."""
        # Counted through all steps, ranks and micro-steps, so that N ranks with one micro-step read
        # the same as one rank with N.
        micro_batch = (step * self.world_size + rank) * self.micro_steps + micro_step
        sequences = micro_batch * self.batch_size + np.arange(self.batch_size, dtype=np.int64)

        # One read for each part of the mixture.
        inputs = np.empty((self.batch_size, self.block_size), dtype=np.int64)
        targets = np.empty_like(inputs)
        for here, part, places in self.by_part(sequences):
            inputs[here], targets[here] = part.read(places)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


class Prefetch:
    """The batches of one rank. While a GPU computes, a thread reads the next batch.

    It reads into pinned memory, from which a GPU copies asynchronously. Batches may be requested in
    any order, as after a rollback. An error on the thread is raised when its batch is requested.
    """

    def __init__(self, loader: Loader, device: torch.device, rank: int = 0) -> None:
        self.loader, self.device, self.rank = loader, device, rank
        self.micro_steps, self.world_size = loader.micro_steps, loader.world_size
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.next_key: tuple[int, int] | None = None  # (step, micro-step)
        self.next_batch: Future[tuple[Tensor, Tensor]]

    def batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets in the CPU's memory, each int64 `[batch_size, block_size]`."""
        if self.device.type != "cuda":
            return self.loader.batch(step, micro_step, self.rank)
        # Usually the batch that was asked for is the next one; after a rollback it is not.
        prefetched = (step, micro_step) == self.next_key
        batch = self.next_batch.result() if prefetched else self.read(step, micro_step)

        # Start to read the one after it.
        is_last = micro_step + 1 == self.micro_steps
        self.next_key = (step + 1, 0) if is_last else (step, micro_step + 1)
        self.next_batch = self.executor.submit(self.read, *self.next_key)
        return batch

    def n_targets(self, step: int) -> list[int]:
        """The number of targets in each micro-step of a step, of all ranks."""
        return self.loader.n_targets(step)

    def read(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """A batch in pinned memory."""
        inputs, targets = self.loader.batch(step, micro_step, self.rank)
        return inputs.pin_memory(), targets.pin_memory()


class Validation:
    """The validation sequences, the same in each evaluation: in order, up to `max_tokens`.

    In a mixture, `weights` are the parts' shares of `max_tokens` and, even if a part has fewer
    tokens, of the mean. `markers` are those of the `Loader`. Rank r reads the batches r, r +
    world_size, ... with unchanged weights, so the sum over the ranks is the mean of all batches.
    All ranks read equally many: where one has no batch left, it reads the first one again, with a
    weight of 0.
    """

    def __init__(self, tokens: list[Tokens], block_size: int, batch_size: int, max_tokens: int,
                 weights: list[int] | None = None, rank: int = 0, world_size: int = 1,
                 markers: Markers | None = None) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        weights = weights or [1] * len(tokens)
        self.shares = [weight / sum(weights) for weight in weights]
        self.parts = open_sequences(
            tokens, block_size, markers, 0, "validation",
            "use more text, a larger data.val_fraction (where that decides), or a smaller "
            "model.block_size")
        self.n_windows = []
        for part, share in zip(self.parts, self.shares, strict=True):
            self.n_windows.append(part.count_within(int(max_tokens * share)))

    @property
    def n_batches(self) -> int:
        """The number of batches of all ranks."""
        return sum(math.ceil(n_windows / self.batch_size) for n_windows in self.n_windows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Inputs and targets, int64 `[batch_size or fewer, block_size]`; weight in the mean."""
        # The batches of all ranks, and the number of targets of each part.
        batches, totals = [], []
        for part, n_windows in enumerate(self.n_windows):
            places = self.parts[part].in_order(np.arange(n_windows))
            totals.append(int(self.parts[part].n_targets(places).sum()))
            for first in range(0, n_windows, self.batch_size):
                batches.append((part, first))

        # This rank's batches: every world_size-th one, as many as the other ranks have.
        turns = math.ceil(len(batches) / self.world_size)
        for number in range(self.rank, turns * self.world_size, self.world_size):
            is_own = number < len(batches)
            part, first = batches[number if is_own else 0]
            last = min(first + self.batch_size, self.n_windows[part])
            places = self.parts[part].in_order(np.arange(first, last))
            inputs, targets = self.parts[part].read(places)
            # A batch counts by its share of the targets of its part.
            n_targets = int(self.parts[part].n_targets(places).sum())
            weight = self.shares[part] * n_targets / totals[part] if is_own else 0.0
            yield torch.from_numpy(inputs), torch.from_numpy(targets), weight


def open_sequences(splits: list[Tokens], block_size: int, markers: Markers | None, seed: int,
                   name: str, advice: str) -> list[Windows | Examples]:
    """The sequences of each part of a mixture: windows of text, or conversations with `markers`.

    Raises ValueError, which calls the splits `name`, if one is shorter than one context.
    """
    parts: list[Windows | Examples] = []
    for number, tokens in enumerate(splits):
        # Each part has its own order.
        part_seed = mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(number)
        if markers:
            parts.append(Examples(tokens, block_size, markers, name, part_seed))
            continue
        if len(tokens) <= block_size:
            which = f" of part {number + 1} of the mixture" if len(splits) > 1 else ""
            raise ValueError(f"The {name} split{which} has {counted(len(tokens), 'token')}, one "
                             f"context needs {block_size + 1}: {advice}.")
        parts.append(Windows(tokens, block_size, part_seed))
    return parts
