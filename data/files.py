"""Files to documents: text, JSON, CSV and Parquet, plain or compressed, in bounded memory.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from data.encodings import MARKS, AsUTF8, Decoder, take_mark
from data.records import BadRecord, delimited, json_array, json_lines, parquet
from data.unpack import COMPRESSIONS, decompressed, plain_name, reading

# The characters of a long text that are read at once. With so few, no tokenizer fails on blanks.
PIECE = 2**18
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIBLE = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
READ_IN_FOLDERS = (
    *(kind + one for kind in COMPRESSIBLE for one in ("", *COMPRESSIONS)),
    ".parquet",
)
SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}

# Where a long text can be cut without changing its tokens: every split pattern starts again at a
# space after a word or number, after the end of a line that is not blank, and at a punctuation mark
# after a word of a script without spaces.
LETTER, WORD = r"[^\W\d_]", r"[^\W_]"
# Of Chinese and Japanese.
MARK = r"[\u3001\u3002\u300a-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]"
CUT = re.compile(rf"(?<={WORD})(?= \S)|(?<=\S\n)(?=[^\s/])|(?<={LETTER})(?={MARK})")
# The characters at a piece's end that are searched for a place to cut, first few of them.
CUT_WITHIN = (2**10, 2**16)


@dataclass(frozen=True)
class Document:
    """A text that may be larger than memory: its pieces, which can be read again and again."""

    pieces: Callable[[], Iterator[str]]

    @classmethod
    def of(cls, text: str) -> Document:
        return cls(lambda: cut_up(text))

    @property
    def text(self) -> str:
        """All of it at once."""
        return "".join(self.pieces())


def find(path: str, skipped: Counter[str] | None = None) -> list[Path]:
    """The files that `path` names, sorted: one file of any ending, a folder's, or those of a glob.

    Skipped are files whose name, or a folder's on the way to them, begins with a dot that `path`
    does not name; what is no regular file; and in a folder, files of other endings. `skipped`
    counts them. Raises ValueError if there is none that can be read.
    """
    skipped = Counter() if skipped is None else skipped
    place = Path(path)
    if place.is_file():
        return [place]
    if reason := unreadable(place):
        raise ValueError(f"{path} {reason}.")
    if place.is_dir():
        base, wanted = place, READ_IN_FOLDERS
        candidates = below(place)
    else:
        base, wanted = Path(place.anchor), ("",)
        candidates = (file for file in base.glob(str(place.relative_to(base))) if not file.is_dir())
    files = []
    for file in sorted(candidates):
        if is_hidden(file.relative_to(base), place):
            skipped["hidden"] += 1
        elif not file.is_file():
            skipped["broken links, pipes, sockets or devices"] += 1
        elif file.name.lower().endswith(wanted):
            files.append(file)
        else:
            skipped[file.suffix.lower() or "without an ending"] += 1
    if not files:
        left_out = f" ({skipped_files(skipped)})" if skipped else ""
        raise ValueError(
            f"{path} holds no file to read{left_out}: put .txt, .md, .jsonl, .json, .csv, .tsv "
            f"(also "
            f"compressed, {', '.join(COMPRESSIONS)}) or .parquet there, or name a single file of "
            f"any ending."
        )
    return files


def unreadable(place: Path) -> str:
    """Why a path that exists is not a file that can be read twice; empty if it may be one."""
    try:
        kind = SPECIAL.get(stat.S_IFMT(place.stat().st_mode))
    except OSError:
        return "is a symbolic link that leads nowhere, or to itself" if place.is_symlink() else ""
    return (
        f"is a {kind}, which cannot be read more than once: write its content to a file first"
        if kind
        else ""
    )


def is_hidden(file: Path, place: Path) -> bool:
    """Whether a part of `file` begins with a dot that `place` does not name, as in .trash/a.txt."""
    named = [part for part in place.parts if part.startswith(".")]
    return any(
        part.startswith(".") and not any(fnmatch(part, name) for name in named)
        for part in file.parts
    )


def skipped_files(skipped: Counter[str]) -> str:
    """How many files were left out, by kind."""
    return "skipped " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())


def below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, and in those that links lead to.

    Raises OSError for a folder that cannot be listed.
    """
    seen = set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()  # a link that leads back up
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from map(Path(place).joinpath, names)


def refuse(error: OSError) -> None:
    raise error


class File:
    """A file of documents: each of its records, or else the whole file. Blank ones are left out.

    `text_field` names a record's text. `encoding` is for files without a byte order mark; empty is
    UTF-8. `errors` says what to do with bytes that are not text, "strict" or "replace", and
    `on_bad_record` with records without text, "stop" or "skip". `bad_records` counts those in the
    reading that was started last.
    """

    def __init__(
        self,
        path: Path,
        text_field: str = "text",
        errors: str = "strict",
        encoding: str = "",
        on_bad_record: str = "stop",
    ) -> None:
        self.path, self.text_field, self.errors = path, text_field, errors
        self.encoding, self.on_bad_record = encoding or "utf-8", on_bad_record
        self.kind = next((kind for kind in RECORDS if plain_name(path).endswith(kind)), "text")
        self.raw: BinaryIO | None = None
        self.bad_records = 0

    def documents(self) -> Iterator[Document]:
        """Raises ValueError with file and place for what cannot be read."""
        self.bad_records = 0
        if self.kind == "text":
            document = Document(self.text_pieces)
            if any(not piece.isspace() for piece in document.pieces()):
                yield document
            return
        for text in self.records():
            if isinstance(text, BadRecord):
                if self.on_bad_record == "stop":
                    raise text.refusal(str(self.path))
                self.bad_records += 1
            elif text and not text.isspace():
                yield Document.of(text)

    def position(self) -> int:
        """How many bytes on the disk have been read: 0 before reading, all of them after it."""
        if self.raw is None:
            return 0
        return self.path.stat().st_size if self.raw.closed else self.raw.tell()

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """The content, decompressed as it is read.

        Raises ValueError for damage, and if the file changes meanwhile.
        """
        with reading(self.path), open(self.path, "rb") as self.raw:
            before = os.fstat(self.raw.fileno())
            yield decompressed(self.raw, self.path)
            after = os.stat(self.path)
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (
            after.st_ino,
            after.st_size,
            after.st_mtime_ns,
        ):
            raise ValueError(
                f"{self.path} changed while it was read: run the command again when it is complete."
            )

    def decoder(self, stream: Any) -> Decoder:
        """By the byte order mark, which is read past, or else by the setting."""
        mark = take_mark(stream)
        return Decoder(self.path, MARKS.get(mark, self.encoding), self.errors, len(mark))

    def text_pieces(self) -> Iterator[str]:
        """The file as text, in pieces that end where tokens end. Line ends stay as they are."""
        with self.opened() as stream:
            yield from cut_into_pieces(decoded_blocks(stream, self.decoder(stream)))

    def records(self) -> Iterator[str | BadRecord]:
        with self.opened() as stream:
            if self.kind == ".parquet":
                if self.path.suffix.lower() in COMPRESSIONS:
                    raise ValueError(
                        f"{self.path} is a Parquet file that was compressed once more: decompress "
                        f"it first."
                    )
                yield from parquet(stream, self.text_field, self.path)
                return
            decoder = self.decoder(stream)
            head = stream.peek(1).decode(decoder.encoding, "ignore")
            if self.kind == ".json" and head.lstrip().startswith("["):
                yield from json_array(decoded_blocks(stream, decoder), self.text_field, self.path)
                return
            if decoder.encoding != "utf-8":
                stream = io.BufferedReader(AsUTF8(stream, decoder), PIECE)
            if self.kind in (".csv", ".tsv"):
                yield from delimited(stream, self.kind, self.text_field, self.errors, self.path)
            else:
                yield from json_lines(stream, self.text_field, self.errors, self.path)


def decoded_blocks(stream: Any, decoder: Decoder) -> Iterator[str]:
    while block := stream.read(PIECE):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def cut_up(text: str) -> Iterator[str]:
    """A text in pieces that end where tokens end."""
    start = 0
    while len(text) - start >= 2 * PIECE:
        end = place_to_cut(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def cut_into_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The text that `texts` are end to end, in pieces that end where tokens end."""
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) >= 2 * PIECE:
            cut = place_to_cut(waiting, 0)
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting


def place_to_cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: after PIECE characters if no place is better."""
    end = start + PIECE
    for within in CUT_WITHIN:
        places = [match.start() for match in CUT.finditer(text, max(start + 1, end - within), end)]
        if places:
            return places[-1]
    return end
