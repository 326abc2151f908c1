"""What is in prepared tokens: how often each occurs, how long documents are, and some of them. In constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards import SPLITS, Tokens, open_parts
from data.tokenizer import Tokenizer
from progress import ProgressBar

CHUNK = 2**22  # tokens
BEGINNING = 2000  # tokens of a document that are shown


class Contents:
    """`counts` of each id, over both splits; documents are those of the training split, in the order they lie there."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.end_of_text = tokenizer.end_of_text
        self.train = open_parts(folder, "train")
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.n_documents = 0
        self.by_length: dict[int, int] = {}  # how many documents by the rounded third of an octave of their length
        parts = [(split, tokens) for split in SPLITS for tokens in open_parts(folder, split)]
        total = sum(len(tokens) for _, tokens in parts)
        with ProgressBar(desc="Counting", total=total, unit="tokens", unit_scale=True, leave=False) as bar:
            for split, tokens in parts:
                for chunk in chunks(tokens):
                    self.counts += np.bincount(chunk, minlength=len(self.counts))
                    bar.update(len(chunk))
                for start, end in self.documents(tokens) if split == "train" else ():
                    self.n_documents += 1
                    third = round(3 * np.log2(max(1, end - start)))
                    self.by_length[third] = self.by_length.get(third, 0) + 1

    def documents(self, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """Where each document begins and ends, its end of text not counted; all is one where there is no such token."""
        start, place = 0, 0
        for chunk in chunks(tokens) if self.end_of_text is not None else ():
            for end in (place + np.flatnonzero(chunk == self.end_of_text)).tolist():
                yield start, end
                start = end + 1
            place += len(chunk)
        if start < len(tokens):
            yield start, len(tokens)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The edges, in tokens, and heights of a histogram of the documents' lengths."""
        thirds = np.arange(min(self.by_length, default=0), max(self.by_length, default=0) + 1)
        edges = 2 ** ((np.append(thirds, thirds[-1] + 1) - 0.5) / 3)
        return edges, np.array([self.by_length.get(third, 0) for third in thirds.tolist()])

    def some_documents(self, number: int, seed: int) -> Iterator[tuple[int, int, list[int]]]:
        """Some documents, drawn without replacement: the index of each, its length, and the ids it begins with."""
        draw = np.random.default_rng(seed)
        wanted = set(draw.choice(self.n_documents, min(number, self.n_documents), replace=False).tolist())
        index = 0
        for tokens in self.train:
            for start, end in self.documents(tokens):
                if index in wanted:
                    yield index, end - start, tokens.read(np.arange(start, min(end, start + BEGINNING))).tolist()
                index += 1


def chunks(tokens: Tokens) -> Iterator[np.ndarray]:
    for shard in tokens.shards:
        for start in range(0, len(shard), CHUNK):
            yield shard[start : start + CHUNK]
