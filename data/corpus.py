"""A source's documents without exact duplicates, sorted into a training and a validation split."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

from tqdm import tqdm

from data.files import Document
from data.sources import Source


class Piece(NamedTuple):
    """Some text of one split; `ends` where the document, or the part of it that the split has, ends behind it."""

    split: str  # "train" or "val"
    text: str
    ends: bool = False


class Corpus:
    """Where documents are many, the hash of its text decides which split a document is in. Where they are few,
    chance would make the validation split too small or too large, so each gives its own tail.

    Raises ValueError if there is no text.
    """

    def __init__(self, source: Source, val_fraction: float) -> None:
        self.source, self.val_fraction = source, val_fraction
        many = int(10 / val_fraction)  # then ten are held out on average, and none at all once in 22,000 corpora
        with self.watched("Reading") as watch:
            first = {index: length for index, _, _, length in islice(self.distinct(watch), many)}
        if not first:
            raise ValueError("The source holds no text: every document is empty.")
        self.has_boundaries = len(first) > 1
        self.lengths = first if len(first) < many else {}

    @contextmanager
    def watched(self, title: str) -> Iterator[Callable[[str], None]]:
        """Something to call for each piece that is read; where that takes long, a bar shows how far it has come."""
        look = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(desc=title, total=100, leave=False, delay=2, bar_format=look) as bar:
            def watch(text: str) -> None:
                bar.update(100 * self.source.fraction() - bar.n)
            yield watch

    def distinct(self, watch: Callable[[str], None] = lambda text: None) -> Iterator[tuple[int, Document, float, int]]:
        """Each distinct document: its index, itself, a number in [0, 1) drawn by its hash, its length in characters."""
        seen = Seen()
        for index, document in enumerate(self.source.documents()):
            hashed, length = hashlib.sha256(), 0
            for text in document.pieces():
                hashed.update(text.encode())
                length += len(text)
                watch(text)
            digest = hashed.digest()[:16]
            if seen.add(digest):
                yield index, document, int.from_bytes(digest[:8]) / 2**64, length

    def pieces(self) -> Iterator[Piece]:
        """All text, in the order of the source, in pieces."""
        if self.lengths:
            for index, document in enumerate(self.source.documents()):
                if index in self.lengths:
                    yield from self.head_and_tail(document, self.lengths[index])
        else:
            for _, document, number, _ in self.distinct():
                split = "val" if number < self.val_fraction else "train"
                yield from (Piece(split, text) for text in document.pieces())
                yield Piece(split, "", ends=True)

    def head_and_tail(self, document: Document, length: int) -> Iterator[Piece]:
        left = int(length * (1 - self.val_fraction))  # characters of the training part that are to come
        in_train = True
        for text in document.pieces():
            if in_train:
                yield Piece("train", text[:left], ends=left < len(text))
                in_train = left >= len(text)
            if not in_train:
                yield Piece("val", text[left:])
            left = max(0, left - len(text))
        yield Piece("val", "", ends=True)

    def training_text(self, most_bytes: int) -> Iterator[str]:
        """The beginning of the training split, in pieces: what a tokenizer is trained on."""
        with self.watched("Reading a sample") as watch:
            for piece in self.pieces():
                watch(piece.text)
                if piece.split == "train" and piece.text:
                    yield piece.text
                    most_bytes -= len(piece.text.encode())
                    if most_bytes <= 0:
                        return


class Seen:
    """The digests met so far, however many: what does not fit into some memory goes to a file that nobody else sees."""

    def __init__(self) -> None:
        self.table = sqlite3.connect("", isolation_level=None)
        for line in ("PRAGMA journal_mode=OFF", "PRAGMA cache_size=-65536",  # KiB
                     "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID", "BEGIN"):
            self.table.execute(line)

    def add(self, digest: bytes) -> bool:
        """Whether it is new. Raises OSError where the disk for temporary files is full."""
        try:
            return self.table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise OSError(f"No room for temporary files, in which copies are looked for ({error}): free some disk, or set "
                          f"SQLITE_TMPDIR to a folder with more room.") from None
