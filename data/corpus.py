"""A source's documents without exact duplicates, sorted into a training and a validation split.

Knows text; knows no tokens.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from data.files import Document
from data.sources import Source
from data.split import EXPECTED_DOCUMENTS, LEAST_HELD_OUT, Text, choose, gives_tail, raised, tail_of
from progress import ProgressBar

# A corpus with less text than this is split knowing the lengths of all its documents.
KNOWN_CHARACTERS = 2**24
KNOWN_DOCUMENTS = 2**17  # the most whose lengths are kept in memory


class Piece(NamedTuple):
    """Some text of one split; `ends` where the document, or the part of it that the split has, ends behind it."""

    split: str  # "train" or "val"
    text: str
    ends: bool = False


class Found(NamedTuple):
    """A document that is not left out as a duplicate."""

    index: int  # in its source
    document: Document
    number: float  # in [0, 1), from its hash
    length: int  # characters
    split: str = ""  # "train" or "val" where that is decided by its source


class Corpus:
    """The documents of `source`, split by `val_fraction` (data/split.py), or those of `validation` to validate on.

    What occurs in `validation` is dropped from training. Raises ValueError if a split that has a source of its own holds
    no text.
    """

    def __init__(self, source: Source, val_fraction: float, validation: Source | None = None,
                 deduplicate: bool = True) -> None:
        self.source, self.validation, self.deduplicate = source, validation, deduplicate
        self.fraction = val_fraction
        self.counts: Counter[str] = Counter()  # of the documents in the reading that was begun last
        self.tails: dict[int, tuple[int, int]] = {}  # length and held-out end of each document, where all are known
        self.longest_whole = 0.0  # characters
        if validation:
            self.has_boundaries = self.has_several()
        else:
            self.has_boundaries = self.look_ahead(val_fraction)

    def look_ahead(self, val_fraction: float) -> bool:
        """Read documents until it is clear how to split them. Whether there are several."""
        texts: dict[float, Text] = {}
        known: list[tuple[int, float]] = []
        characters, ended = 0, True
        with self.watched("Reading") as watch:
            for found in self.distinct(watch):
                copies = texts[found.number].copies if found.number in texts else 0
                texts[found.number] = Text(found.number, found.length, copies + 1)
                known.append((found.index, found.number))
                characters += found.length
                if self.clear(len(known), characters, val_fraction):
                    ended = False
                    break
        if not known:
            raise ValueError("The source holds no text: every document is empty.")
        if ended:
            tails = choose(list(texts.values()), val_fraction)
            self.tails = {index: (texts[number].length, tails[number]) for index, number in known}
        else:
            self.fraction = raised(val_fraction, characters, len(known))
            self.longest_whole = self.fraction * characters
        return len(known) > 1

    @staticmethod
    def clear(documents: int, characters: int, val_fraction: float) -> bool:
        """Whether so much text can be split by the hash of each document alone."""
        if documents >= KNOWN_DOCUMENTS:
            return True
        return (characters >= KNOWN_CHARACTERS and val_fraction * characters >= LEAST_HELD_OUT
                and val_fraction * documents >= EXPECTED_DOCUMENTS)

    def has_several(self) -> bool:
        """Whether a split has several documents. Raises ValueError for a split without any."""
        documents: Counter[str] = Counter()
        with self.watched("Reading") as watch:
            for found in self.distinct(watch):
                documents[found.split] += 1
                if documents["train"] > 1 or (documents["train"] and documents["val"] > 1):
                    break
        if not documents["val"]:
            raise ValueError("The validation text is empty: every document of it is blank.")
        if not documents["train"]:
            if self.counts["in_validation"]:
                raise ValueError("Every document of the training text is also in the validation text: nothing is left "
                                 "to train on.")
            raise ValueError("The source holds no text: every document is empty.")
        return max(documents.values()) > 1

    @contextmanager
    def watched(self, title: str) -> Iterator[Callable[[str], None]]:
        """Something to call for each piece that is read; where that takes long, a bar shows how far it has come."""
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        plain_format = "{desc}: {percentage:.0f}%, {elapsed} elapsed, {remaining} left"
        with ProgressBar(desc=title, total=100, leave=False, delay=2, bar_format=bar_format,
                         plain_format=plain_format) as bar:
            def watch(text: str) -> None:
                bar.update(100 * self.source.fraction() - bar.n)
            yield watch

    def distinct(self, watch: Callable[[str], None] = lambda text: None) -> Iterator[Found]:
        """Each document that is no duplicate; those of a validation source first."""
        self.counts = Counter()
        held_out, seen = Seen(), Seen()
        for index, document in enumerate(self.validation.documents() if self.validation else ()):
            digest, length = measure(document, watch)
            if held_out.add(digest) or not self.deduplicate:
                yield Found(index, document, number_of(digest), length, "val")
        for index, document in enumerate(self.source.documents()):
            digest, length = measure(document, watch)
            self.counts["documents"] += 1
            if self.validation and digest in held_out:
                self.counts["in_validation"] += 1
            elif self.deduplicate and not seen.add(digest):
                self.counts["duplicates"] += 1
            else:
                yield Found(index, document, number_of(digest), length, "train" if self.validation else "")

    def pieces(self) -> Iterator[Piece]:
        """All text, in the order of the source, in pieces."""
        if self.tails:
            for index, document in enumerate(self.source.documents()):
                if index in self.tails:
                    yield from divided(document, *self.tails[index])
        else:
            for found in self.distinct():
                yield from divided(found.document, found.length, self.held_out(found))

    def held_out(self, found: Found) -> int:
        """How many characters at the end of a document are held out."""
        if found.split:
            return found.length if found.split == "val" else 0
        if gives_tail(found.length, found.length, self.fraction, self.longest_whole):
            return tail_of(found.length, self.fraction)
        return found.length if found.number < self.fraction else 0

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

    def summary(self) -> str:
        """What the last complete reading found: files, documents, and those that were dropped."""
        said = f"{self.source.description()}, {counted(self.counts['documents'], 'document')}"
        if self.counts["duplicates"]:
            said += f", {counted(self.counts['duplicates'], 'exact duplicate')} dropped"
        if self.counts["in_validation"]:
            said += f", {counted(self.counts['in_validation'], 'document')} dropped that the validation text has too"
        if self.validation:
            said += f"; validation text: {self.validation.description()}"
        return said


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def measure(document: Document, watch: Callable[[str], None]) -> tuple[bytes, int]:
    """A digest of a document's text, and its length in characters."""
    hashed, length = hashlib.sha256(), 0
    for text in document.pieces():
        hashed.update(text.encode())
        length += len(text)
        watch(text)
    return hashed.digest()[:16], length


def number_of(digest: bytes) -> float:
    """A number in [0, 1) that depends on the digest alone."""
    return int.from_bytes(digest[:8]) / 2**64


def divided(document: Document, length: int, tail: int) -> Iterator[Piece]:
    """A document's text, of which the last `tail` characters are held out."""
    left = length - tail  # characters of the training part that are to come
    for text in document.pieces():
        if left:
            yield Piece("train", text[:left])
        if left < len(text):
            yield Piece("val", text[left:])
        left = max(0, left - len(text))
    if tail < length:
        yield Piece("train", "", ends=True)
    if tail:
        yield Piece("val", "", ends=True)


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

    def __contains__(self, digest: bytes) -> bool:
        return self.table.execute("SELECT 1 FROM seen WHERE digest = ?", (digest,)).fetchone() is not None
