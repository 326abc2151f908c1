"""The documents of a source without exact duplicates, divided into training and validation splits.

Knows text; knows no tokens.
"""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from data.document import Document, SpecialToken
from data.sources import Source
from data.split import Text, choose_tails, gives_tail, held_out_fraction, is_large, tail_length
from progress import ProgressBar
from terminal import counted


class Piece(NamedTuple):
    """Some text of one split."""

    split: str  # "train" or "val"
    text: str
    ends: bool = False  # whether the document's part in this split ends here


class Found(NamedTuple):
    """A document that is not dropped as a duplicate."""

    index: int  # in its source
    document: Document
    number: float  # in [0, 1), from its hash
    length: int  # characters
    split: str = ""  # "train" or "val" if that depends on its source


class Corpus:
    """The documents of `source` in two splits.

    The validation split is a part of it (data/split.py), or the documents of `validation`, which
    are then dropped from training. Each document is in one split if they are not `divisible`.
    `name` is that of the source in messages. Raises ValueError if one of two sources holds no text.
    """

    def __init__(self, source: Source, val_fraction: float, validation: Source | None = None,
                 deduplicate: bool = True, divisible: bool = True, name: str = "") -> None:
        self.source, self.validation, self.deduplicate = source, validation, deduplicate
        self.divisible, self.fraction, self.name = divisible, val_fraction, name
        self.counts: Counter[str] = Counter()  # of documents in the latest reading
        # The length and tail of each document by its index, if all are known.
        self.tails: dict[int, tuple[int, int]] = {}
        self.wanted = 0.0  # characters to hold out, if not all lengths are known

        # Whether an end-of-text token follows each document. That of a single conversation, too.
        has_several = self.has_several() if validation else self.plan_split(val_fraction)
        self.has_boundaries = has_several or not divisible

    def plan_split(self, val_fraction: float) -> bool:
        """Read documents until it is clear how to split them. Returns whether there are several."""
        # The distinct documents by their numbers, and the number of each document by its index.
        texts: dict[float, Text] = {}
        numbers: dict[int, float] = {}
        characters, is_complete = 0, True
        with self.progress("Reading") as update:
            for found in self.distinct(update):
                numbers[found.index] = found.number
                text = texts.get(found.number, Text(found.number, found.length, 0))
                texts[found.number] = text._replace(copies=text.copies + 1)
                characters += found.length
                if is_large(len(numbers), characters, val_fraction):
                    is_complete = False
                    break
        if not numbers:
            raise self.no_text()

        # With all lengths known, choose what is held out of each document. Otherwise only set how
        # much text it should be, and let the hash of each document decide later.
        if is_complete:
            tails = choose_tails(list(texts.values()), val_fraction, self.divisible)
            for index, number in numbers.items():
                self.tails[index] = texts[number].length, tails[number]
        else:
            self.fraction = held_out_fraction(val_fraction, characters, len(numbers))
            self.wanted = self.fraction * characters
        return len(numbers) > 1

    def has_several(self) -> bool:
        """Whether a split has several documents. Raises ValueError for a split without any."""
        # Three documents are enough to know, as one split has two of them.
        documents: Counter[str] = Counter()
        with self.progress("Reading") as update:
            for found in self.distinct(update):
                documents[found.split] += 1
                if documents["train"] and documents.total() > 2:
                    break

        # Both splits need text.
        if not documents["val"]:
            raise ValueError("The validation text is empty: every document of it is blank.")
        if not documents["train"]:
            if self.counts["in_validation"]:
                raise ValueError("Every document of the training text is also in the validation "
                                 "text: nothing is left to train on.")
            raise self.no_text()
        return max(documents.values()) > 1

    def no_text(self) -> ValueError:
        return ValueError(f"{self.name} holds no text: every document is empty "
                          f"({self.source.description()}).")

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[], None]]:
        """Shows the progress of a long reading. Yields the function that updates it."""
        with ProgressBar(
            desc=title, total=100, leave=False, delay=2,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            plain_format="{desc}: {percentage:.0f}%, {elapsed} elapsed, {remaining} left") as bar:
            yield lambda: bar.update(100 * self.source.fraction() - bar.n)

    def distinct(self, update: Callable[[], None] = lambda: None) -> Iterator[Found]:
        """Each document that is not a duplicate, those of a validation source first.

        `update` is called for each piece that is read.
        """
        # First the validation text, whose documents must not be trained on.
        self.counts = Counter()
        in_validation, seen = Seen(), Seen()
        if self.validation:
            for index, document in enumerate(self.validation.documents()):
                digest, number, length = measure(document, update)
                if in_validation.add(digest) or not self.deduplicate:
                    yield Found(index, document, number, length, "val")

        # Then the other text. Without a validation text, a hash will choose its split.
        split = "train" if self.validation else ""
        for index, document in enumerate(self.source.documents()):
            digest, number, length = measure(document, update)
            self.counts["documents"] += 1
            if self.validation and digest in in_validation:
                self.counts["in_validation"] += 1
            elif self.deduplicate and not seen.add(digest):
                self.counts["duplicates"] += 1
            else:
                yield Found(index, document, number, length, split)

    def pieces(self) -> Iterator[Piece]:
        """All text, in the order of the source, in pieces."""
        # If all lengths are known, so are the documents to keep, and their tails.
        if self.tails:
            for index, document in enumerate(self.source.documents()):
                if index in self.tails:
                    yield from divided(document, *self.tails[index])
        else:
            for found in self.distinct():
                yield from divided(found.document, found.length, self.tail_of(found))

    def tail_of(self, found: Found) -> int:
        """The characters to hold out at the end of a document, without knowing the others."""
        if found.split:
            return found.length if found.split == "val" else 0
        # A long document gives its end. Of the others, the hash decides.
        if self.divisible and gives_tail(found.length, found.length, self.fraction, self.wanted):
            return tail_length(found.length, self.fraction)
        return found.length if found.number < self.fraction else 0

    def training_text(self, most_bytes: int) -> Iterator[str]:
        """The start of the training split, in pieces, to train a tokenizer on."""
        with self.progress("Reading a sample") as update:
            for piece in self.pieces():
                update()
                is_text = piece.text and not isinstance(piece.text, SpecialToken)
                if piece.split == "train" and is_text:
                    yield piece.text
                    most_bytes -= len(piece.text.encode())
                    if most_bytes <= 0:
                        return

    def summary(self) -> str:
        """The files and documents of the latest complete reading, and the dropped ones."""
        documents = counted(self.counts["documents"], "document")
        text = f"{self.source.description()}, {documents}"

        if self.counts["duplicates"]:
            text += f", {counted(self.counts['duplicates'], 'exact duplicate')} dropped"
        if self.counts["in_validation"]:
            shared = counted(self.counts["in_validation"], "document")
            text += f", {shared} dropped that the validation text also has"
        if self.validation:
            text += f"; validation text: {self.validation.description()}"
        return text


def measure(document: Document, update: Callable[[], None]) -> tuple[bytes, float, int]:
    """The hash of a document's text, as a number in [0, 1) too, and its length in characters."""
    sha256, length = hashlib.sha256(), 0
    for text in document.pieces():
        if isinstance(text, SpecialToken):
            # A byte that is in no text, so that no message looks like two.
            sha256.update(b"\xff")
        sha256.update(text.encode())
        length += len(text)
        update()
    digest = sha256.digest()[:16]
    return digest, int.from_bytes(digest[:8]) / 2**64, length


def divided(document: Document, length: int, tail: int) -> Iterator[Piece]:
    """The text of a document, with the last `tail` characters in the validation split."""
    left = length - tail  # characters of the training part that follow
    # The piece in which the training part ends is divided.
    for text in document.pieces():
        if left >= len(text):
            yield Piece("train", text)
        elif left == 0:
            yield Piece("val", text)
        else:
            yield Piece("train", text[:left])
            yield Piece("val", text[left:])
        left = max(0, left - len(text))
    # Both parts end, unless one is empty.
    if tail < length:
        yield Piece("train", "", ends=True)
    if tail:
        yield Piece("val", "", ends=True)


class Seen:
    """A set of hashes of any size. What exceeds 64 MB of memory goes to a temporary file."""

    def __init__(self) -> None:
        self.table = sqlite3.connect("", isolation_level=None)
        # The size of the cache is in KiB.
        self.table.executescript("PRAGMA journal_mode=OFF; PRAGMA cache_size=-65536; BEGIN; "
                                 "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, digest: bytes) -> bool:
        """Returns whether it is new. Raises OSError if the disk for temporary files is full."""
        insert = "INSERT OR IGNORE INTO seen VALUES (?)"
        try:
            return self.table.execute(insert, (digest,)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise OSError(f"No space for temporary files, which find duplicates ({error}): free "
                          f"some disk space, or set SQLITE_TMPDIR to a folder with more.") from None

    def __contains__(self, digest: bytes) -> bool:
        query = "SELECT 1 FROM seen WHERE digest = ?"
        return self.table.execute(query, (digest,)).fetchone() is not None
