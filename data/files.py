"""Files to documents: text, JSON, CSV and Parquet, plain or compressed, in bounded memory.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from data.encodings import decoded
from data.parquet import parquet_texts
from data.records import BadRecord, RecordReader, is_json_lines, read_records
from data.unpack import COMPRESSIONS, decompressed, plain_name, reading

# A long text is read in pieces of about this many characters. With so few, no tokenizer fails on
# long runs of white space.
PIECE = 2**18
RECORDS = (".jsonl", ".jsonlines", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIBLE = (".txt", ".md", *RECORDS[:-1])
HIDDEN = re.compile(r"\..*|.*~|#.*#", re.DOTALL)

# Where a long text can be cut without changing its tokens. Every split pattern of the tokenizers
# starts a new match at a space after a word or number, after the end of a line that is not blank,
# and at a punctuation mark after a letter of a script without spaces.
LETTER, WORD = r"[^\W\d_]", r"[^\W_]"
# Chinese and Japanese punctuation.
MARK = r"[\u3001\u3002\u300a-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]"
CUT = re.compile(rf"(?<={WORD})(?= \S)|(?<=\S\n)(?=[^\s/])|(?<={LETTER})(?={MARK})")
# How many characters at the end of a piece are searched for a place to cut: few, then more.
CUT_WITHIN = (2**10, 2**16)


class SpecialToken(str):
    """The name of a special token, as a piece of a document between pieces of text."""

    __slots__ = ()


@dataclass(frozen=True)
class Document:
    """A text that may be larger than memory, as pieces that can be read again and again."""

    pieces: Callable[[], Iterator[str]]

    @classmethod
    def of(cls, text: str) -> Document:
        return cls(lambda: cut_into_pieces([text]))


# Find files


def find(path: str, skipped: Counter[str] | None = None) -> list[Path]:
    """The files that `path` names, sorted: a file of any extension, a folder's, or a glob's.

    Skipped are hidden files and folders that `path` does not name, special files, and in a folder
    files with other extensions. `skipped` counts them. Raises ValueError if no file is left.
    """
    skipped = Counter() if skipped is None else skipped
    place = Path(path)
    # The characters of a glob can also be those of a file name.
    if place.is_file():
        return [place]
    reason = unreadable(place)
    if reason:
        raise ValueError(f"{path} {reason}.")
    is_folder = place.is_dir()
    base = place if is_folder else Path(place.anchor)

    # Sorted, so that the order of documents does not depend on the file system.
    files = []
    for file in sorted(below(place) if is_folder else matches(place)):
        if file.is_dir():
            continue
        if is_hidden(file.relative_to(base), place):
            skipped["hidden"] += 1
        elif not file.is_file():
            skipped["broken links, pipes, sockets or devices"] += 1
        elif is_folder and not has_known_suffix(file):
            skipped[file.suffix.lower() or "without an extension"] += 1
        else:
            files.append(file)

    if not files:
        details = f" ({skipped_files(skipped)})" if skipped else ""
        raise ValueError(
            f"{path} holds no file to read{details}: put .txt, .md, .jsonl, .json, .csv, .tsv "
            f"(also compressed, {', '.join(COMPRESSIONS)}) or .parquet there, or name a single "
            f"file of any extension.")
    return files


def unreadable(path: Path) -> str:
    """Why an existing path is not a file that can be read twice; empty if it may be one."""
    if path.is_symlink() and not path.exists():
        return "is a symbolic link to itself or to nothing"
    if path.exists() and not (path.is_file() or path.is_dir()):
        return ("is a pipe, a socket or a device, which cannot be read more than once: write its "
                "content to a file")
    return ""


def is_hidden(file: Path, named: Path) -> bool:
    """Whether a part of `file` is hidden and no part of `named` stands for it (.trash/a.txt).

    Hidden are names that start with a dot, and the copies of editors (a.txt~, #a.txt#).
    """
    patterns = [part for part in named.parts if HIDDEN.fullmatch(part)]
    hidden = [part for part in file.parts if HIDDEN.fullmatch(part)]
    return any(not any(fnmatch(part, pattern) for pattern in patterns) for part in hidden)


def has_known_suffix(path: Path) -> bool:
    return plain_name(path).endswith(COMPRESSIBLE) or path.suffix.lower() == ".parquet"


def skipped_files(skipped: Counter[str]) -> str:
    """The number of skipped files of each kind."""
    return "skipped " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())


def matches(glob: Path) -> list[Path]:
    """The files and folders that a glob matches. Raises ValueError if the glob is invalid."""
    base = Path(glob.anchor)
    try:
        return list(base.glob(str(glob.relative_to(base))))
    except ValueError:
        raise ValueError(
            f"{glob} is not a valid glob: ** stands for whole folders, as in 'corpus/**/*.txt'."
        ) from None


def below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders."""
    for parent, _, names in walk(folder):
        yield from map(parent.joinpath, names)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Like `os.walk`, but follows symbolic links and visits each folder once.

    Raises OSError for a folder that cannot be listed, which `os.walk` would leave out.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
        else:
            seen.add((status.st_dev, status.st_ino))
            yield Path(place), subfolders, names


# Read files


@dataclass
class File:
    """A file of documents: each of its records, or else the whole file. Blank ones are skipped.

    `text_field` names a record's text. `encoding` is for files without a byte order mark; empty is
    UTF-8. `errors` says what to do with bytes that are not text, "strict" or "replace", and
    `on_bad_record` with records without text, "stop" or "skip". `read_record` makes the text, or a
    whole document, of a JSON record; by default it is the text of its field.
    """

    path: Path
    text_field: str = "text"
    errors: str = "strict"
    encoding: str = ""
    on_bad_record: str = "stop"
    read_record: RecordReader | None = None
    bad_records: int = field(default=0, init=False)  # in the latest reading
    raw: BinaryIO | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        """The suffix of a format of records, or "text"."""
        name = plain_name(self.path)
        return next((suffix for suffix in RECORDS if name.endswith(suffix)), "text")

    def documents(self) -> Iterator[Document]:
        """Raises ValueError naming the file and the place that cannot be read."""
        self.bad_records = 0
        # A plain text is one document.
        if self.kind == "text":
            document = Document(self.text_pieces)
            first = next((piece for piece in document.pieces() if not piece.isspace()), "")
            if is_json_lines(first):
                raise ValueError(
                    f"{self.path} has JSON records, but its name is that of a plain text: give it "
                    f"the extension .jsonl, or, to train on the JSON itself, set data.separator, "
                    f"as in data.separator='\\n' (each line is a document).")
            if first:
                yield document
            return

        # Of other files, each record is one.
        for text in self.records():
            if isinstance(text, BadRecord):
                if self.on_bad_record == "stop":
                    raise text.refusal(str(self.path))
                self.bad_records += 1
            elif isinstance(text, Document):
                yield text
            elif text and not text.isspace():
                yield Document.of(text)

    def position(self) -> int:
        """The number of bytes on disk that have been read: 0 before reading, all after it."""
        if self.raw is None:
            return 0
        return self.path.stat().st_size if self.raw.closed else self.raw.tell()

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """A stream of the decompressed content.

        Raises ValueError for damage, and if the file changes meanwhile.
        """
        with reading(self.path), open(self.path, "rb") as self.raw:
            before = os.fstat(self.raw.fileno())
            yield decompressed(self.raw, self.path)
            # By path: the file may have been replaced.
            after = os.stat(self.path)
        if file_version(before) != file_version(after):
            raise ValueError(
                f"{self.path} changed while it was read: run the command again when it is complete."
            )

    def decoded(self, stream: BinaryIO) -> Iterator[str]:
        return decoded(stream, self.path, self.encoding or "utf-8", self.errors)

    def text_pieces(self) -> Iterator[str]:
        """The file as text, in pieces that end where tokens end. Line ends are kept."""
        with self.opened() as stream:
            yield from cut_into_pieces(self.decoded(stream))

    def records(self) -> Iterator[str | Document | BadRecord]:
        with self.opened() as stream:
            if self.kind != ".parquet":
                blocks, read = self.decoded(stream), self.read_record
                yield from read_records(blocks, self.kind, self.text_field, self.path, read)
            elif self.path.suffix.lower() in COMPRESSIONS:
                raise ValueError(
                    f"{self.path} is a compressed Parquet file: decompress it first. Parquet has "
                    f"its own compression.")
            else:
                yield from parquet_texts(stream, self.text_field, self.path)


def file_version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


# Pieces


def cut_into_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The concatenation of `texts`, in pieces that end where tokens end."""
    waiting = ""
    for text in texts:
        waiting += text
        start = 0
        while len(waiting) - start >= 2 * PIECE:
            end = place_to_cut(waiting, start)
            yield waiting[start:end]
            start = end
        waiting = waiting[start:]
    if waiting:
        yield waiting


def place_to_cut(text: str, start: int) -> int:
    """Where the piece that starts at `start` ends: after PIECE characters if no place is better."""
    end = start + PIECE
    for within in CUT_WITHIN:
        places = [match.start() for match in CUT.finditer(text, max(start + 1, end - within), end)]
        if places:
            return places[-1]
    return end
