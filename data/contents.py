"""Statistics and samples of prepared tokens, in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards import Tokens, open_parts
from data.tokenizer import Tokenizer
from progress import ProgressBar

BEGINNING = 2000  # tokens of a document that are returned


class Contents:
    """Token `counts` by id over both splits, and the documents of the training split."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.end_of_text = tokenizer.end_of_text
        self.train = open_parts(folder, "train")
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        # The number of documents by their length in tokens, rounded to a third of an octave.
        self.by_length: Counter[int] = Counter()

        # The count of each token, in both splits.
        parts = [*self.train, *open_parts(folder, "val")]
        with ProgressBar(desc="Counting", total=sum(map(len, parts)), unit="tokens",
                         unit_scale=True, leave=False) as bar:
            for tokens in parts:
                for _, chunk in tokens.chunks():
                    self.counts += np.bincount(chunk, minlength=len(self.counts))
                    bar.update(len(chunk))

        for tokens in self.train:
            for start, end in self.documents(tokens):
                self.by_length[round(3 * np.log2(max(1, end - start)))] += 1
        self.n_documents = self.by_length.total()

    def documents(self, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """The start and end of each document, without the end-of-text token (if there is one)."""
        start = 0
        if self.end_of_text is not None:
            for first, chunk in tokens.chunks():
                for end in (first + np.flatnonzero(chunk == self.end_of_text)).tolist():
                    yield start, end
                    start = end + 1
        if start < len(tokens):
            yield start, len(tokens)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The edges, in tokens, and the heights of a histogram of document lengths."""
        # Thirds of octaves, each from half a third below to half a third above.
        thirds = np.arange(min(self.by_length, default=0), max(self.by_length, default=0) + 1)
        edges = 2 ** ((np.append(thirds, thirds[-1] + 1) - 0.5) / 3)
        return edges, np.array([self.by_length[third] for third in thirds.tolist()])

    def some_documents(self, number: int, seed: int) -> Iterator[tuple[int, int, list[int]]]:
        """Random documents without replacement: index, length, and the first ids of each."""
        generator = np.random.default_rng(seed)
        number = min(number, self.n_documents)
        wanted = set(generator.choice(self.n_documents, number, replace=False).tolist())
        index = 0
        for tokens in self.train:
            for start, end in self.documents(tokens):
                if index in wanted:
                    shown = np.arange(start, min(end, start + BEGINNING))
                    yield index, end - start, tokens.read(shown).tolist()
                index += 1
