"""Text to tokens on all cores, in bounded memory, and onto the disk a segment of text after the other.

Where batches and segments begin depends on the text alone, so any machine makes the same shards, and so does one
that goes on after a kill.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus, Piece
from data.shards import SPLITS, ShardWriter
from data.tokenizer import Tokenizer
from progress import ProgressBar

BATCH_BYTES = 2**20  # of text: what a thread encodes in one go
SEGMENT_BYTES = 2**28  # of text: a shard a split, and the most that a kill undoes


@dataclass(frozen=True)
class Batch:
    """Pieces of text that follow each other, and the segment, of one part of a mixture, that they belong to."""

    part: int
    segment: int
    pieces: list[Piece]
    n_bytes: dict[str, int]  # by split
    read: float  # how much of all sources had been read when its end was, from 0 to 1; 0 where nobody knows

    def documents(self, split: str) -> int:
        return sum(piece.ends for piece in self.pieces if piece.split == split)


def batches(corpora: list[Corpus]) -> Iterator[Batch]:
    segment = 0
    for part, corpus in enumerate(corpora):
        pieces: list[Piece] = []
        n_bytes, in_segment = dict.fromkeys(SPLITS, 0), 0
        for piece in chain(corpus.pieces(), [None]):
            if sum(n_bytes.values()) >= BATCH_BYTES or not piece:
                read = corpus.source.fraction()
                yield Batch(part, segment, pieces, n_bytes, read and (part + read) / len(corpora))
                in_segment += sum(n_bytes.values())
                pieces, n_bytes = [], dict.fromkeys(SPLITS, 0)
                if in_segment >= SEGMENT_BYTES or not piece:
                    segment, in_segment = segment + 1, 0
            if piece:
                pieces.append(piece)
                n_bytes[piece.split] += len(piece.text.encode())


def segments(corpora: list[Corpus], tokenizer: Tokenizer, folder: Path, first: int, title: str) -> Iterator[dict[str, Any]]:
    """Encode the corpora into shards in `folder`; yield what is in each segment as soon as it is whole.

    Those before `first` are read past. A segment is {"number", "part", and for each split "documents", "bytes", "tokens",
    "shards"}.
    """
    boundary = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=np.uint32)
    if len(corpora) == 1 and not corpora[0].has_boundaries:
        boundary = boundary[:0]

    def encode(batch: Batch) -> dict[str, np.ndarray]:
        ids: dict[str, list[np.ndarray]] = {split: [boundary[:0]] for split in SPLITS}
        for split, text, ends in batch.pieces:
            ids[split] += [tokenizer.encode_array(text), boundary[:ends]]
        return {split: np.concatenate(arrays) for split, arrays in ids.items()}

    with ProgressBar(desc=title, unit="B", unit_scale=True, leave=False) as bar:
        def to_do() -> Iterator[Batch]:
            for batch in batches(corpora):
                if batch.segment >= first:
                    yield batch
                else:
                    show(bar, batch)
                    bar.initial, bar.start_t = bar.n, time.time()  # which took no time worth telling

        for number, encoded in groupby(in_order(encode, to_do(), threads()), key=lambda pair: pair[0].segment):
            writers = {split: ShardWriter(folder / f"{split}_{number:05d}.npy", tokenizer.vocab_size) for split in SPLITS}
            segment: dict[str, Any] = {"number": number} | {split: {"documents": 0, "bytes": 0} for split in SPLITS}
            for batch, ids in encoded:
                segment["part"] = batch.part
                for split in SPLITS:
                    writers[split].add(ids[split])
                    segment[split]["documents"] += batch.documents(split)
                    segment[split]["bytes"] += batch.n_bytes[split]
                show(bar, batch)
            for split, writer in writers.items():
                segment[split] |= {"tokens": writer.n_tokens, "shards": writer.close()}
            yield segment


def in_order(work: Callable[[Any], Any], items: Iterator[Any], n_threads: int) -> Iterator[tuple[Any, Any]]:
    """Each item with what `work` makes of it, in the order of the items, a few of them worked on at once."""
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[tuple[Any, Any]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > n_threads + 1:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def threads() -> int:
    """As many as there are cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def show(bar: ProgressBar, batch: Batch) -> None:
    """Move the bar on; how much text there is in all is known only by how far the source has been read."""
    n_bytes = sum(batch.n_bytes.values())
    bar.total = int((bar.n + n_bytes) / batch.read) if batch.read else None
    bar.update(n_bytes)
