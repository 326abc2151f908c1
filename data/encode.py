"""Encode text into shards on all cores, in bounded memory, one segment of text after another.

Batches and segments depend only on the text, so every machine makes the same shards, also after an
interruption.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus, Piece
from data.document import SpecialToken
from data.shards import SPLITS, ShardWriter
from data.tokenizer import Tokenizer
from hardware import usable_cpus
from progress import ProgressBar

BATCH_BYTES = 2**20  # of text that a thread encodes at once
SEGMENT_BYTES = 2**28  # of text in a shard of each split: the most that a kill loses


@dataclass
class Batch:
    """Consecutive pieces of text from one part of a mixture, and the segment they belong to."""

    part: int
    segment: int
    pieces: list[Piece] = field(default_factory=list)
    n_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    progress: float = 0.0  # the share of all sources that is read after it; 0 if unknown

    def size(self) -> int:
        return sum(self.n_bytes.values())


def batches(corpora: list[Corpus]) -> Iterator[Batch]:
    """The text of all parts in batches of BATCH_BYTES, which may end with a longer piece."""
    segment = 0
    for part, corpus in enumerate(corpora):
        batch, segment_bytes = Batch(part, segment), 0
        for piece in corpus.pieces():
            # The batch is full. After SEGMENT_BYTES, the next one begins another segment.
            if batch.size() >= BATCH_BYTES:
                batch.progress = progress_of(corpora, part)
                yield batch
                segment_bytes += batch.size()
                if segment_bytes >= SEGMENT_BYTES:
                    segment, segment_bytes = segment + 1, 0
                batch = Batch(part, segment)
            batch.pieces.append(piece)
            if not isinstance(piece.text, SpecialToken):
                batch.n_bytes[piece.split] += len(piece.text.encode())
        # The rest of the part. The next one begins another segment.
        batch.progress = progress_of(corpora, part)
        yield batch
        segment += 1


def progress_of(corpora: list[Corpus], part: int) -> float:
    """The share of all sources that has been read, while `part` is being read; 0 if unknown."""
    fraction = corpora[part].source.fraction()
    return (part + fraction) / len(corpora) if fraction else 0.0


def segments(corpora: list[Corpus], tokenizer: Tokenizer, folder: Path, first: int,
             title: str) -> Iterator[dict[str, Any]]:
    """Encode the corpora into shards in `folder`; yield each segment when it is complete.

    Segments before `first` are skipped. A segment has a "number", its "part", and for each split
    "documents", "bytes", "tokens" and "shards".
    """
    has_ends = len(corpora) > 1 or corpora[0].has_boundaries
    end_ids = [tokenizer.end_of_text] if has_ends and tokenizer.end_of_text is not None else []
    encode = partial(encode_batch, tokenizer=tokenizer, end_of_text=np.array(end_ids, np.uint32))

    with ProgressBar(desc=title, unit="B", unit_scale=True, leave=False) as bar:
        remaining = skip_segments(batches(corpora), first, bar)
        encoded = in_order(encode, remaining, usable_cpus())
        for number, group in groupby(encoded, key=lambda pair: pair[0].segment):
            yield write_segment(folder, number, group, tokenizer.vocab_size, bar)


def encode_batch(batch: Batch, tokenizer: Tokenizer,
                 end_of_text: np.ndarray) -> dict[str, np.ndarray]:
    """The ids of a batch by split. `end_of_text` is one id, or none if documents have no end."""
    ids: dict[str, list[np.ndarray]] = {split: [end_of_text[:0]] for split in SPLITS}
    for split, text, ends in batch.pieces:
        if isinstance(text, SpecialToken):
            ids[split].append(np.array([tokenizer.special[text]], dtype=np.uint32))
        else:
            ids[split].append(tokenizer.encode_array(text))
            if ends:
                ids[split].append(end_of_text)
    return {split: np.concatenate(arrays) for split, arrays in ids.items()}


def skip_segments(batches: Iterator[Batch], first: int, bar: ProgressBar) -> Iterator[Batch]:
    """The batches from the segment `first` on, after the others were counted as done."""
    for batch in batches:
        if batch.segment >= first:
            yield batch
        else:
            show(bar, batch)
            # Skipping is fast, so it must not count in the estimate of the time left.
            bar.start_here()


def write_segment(folder: Path, number: int, encoded: Iterator[tuple[Batch, dict[str, np.ndarray]]],
                  vocab_size: int, bar: ProgressBar) -> dict[str, Any]:
    """Write the batches of a segment with their ids into a shard of each split."""
    # Open a shard of each split.
    segment: dict[str, Any] = {"number": number}
    writers = {}
    for split in SPLITS:
        segment[split] = {"documents": 0, "bytes": 0}
        writers[split] = ShardWriter(folder / f"{split}_{number:05d}.npy", vocab_size)

    # Add the tokens, and count what they are made of.
    for batch, ids in encoded:
        segment["part"] = batch.part
        for split in SPLITS:
            writers[split].add(ids[split])
            segment[split]["bytes"] += batch.n_bytes[split]
        for piece in batch.pieces:
            segment[piece.split]["documents"] += piece.ends
        show(bar, batch)

    # A shard gets its name when it is complete.
    for split, writer in writers.items():
        segment[split] |= {"tokens": writer.n_tokens, "shards": writer.close()}
    return segment


def in_order(work: Callable[[Any], Any], items: Iterator[Any],
             n_threads: int) -> Iterator[tuple[Any, Any]]:
    """Each item with the result of `work`, in order, with a few items in progress at once."""
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[tuple[Any, Any]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            # One batch more than threads, so that none waits for the caller.
            if len(waiting) > n_threads + 1:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def show(bar: ProgressBar, batch: Batch) -> None:
    """Advance the bar. The total size of the text is estimated from the progress so far."""
    bar.total = int((bar.n + batch.size()) / batch.progress) if batch.progress else None
    bar.update(batch.size())
