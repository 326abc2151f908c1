"""Files to documents: text, Markdown, JSON lines and Parquet, plain or compressed, never more of one in memory than a piece.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 2**18  # the characters of a long text that are read at once; no tokenizer fails on a million blanks then
RECORD_BYTES = 2**26  # the most that one JSON line may hold: it is one string, and must be in memory whole
TEXTS = tuple(f"{kind}{compression}" for kind in (".txt", ".md", ".jsonl") for compression in ("", ".gz", ".zst"))
LARGEST_WINDOW = 2**31  # of zstd, which keeps so much of a text to refer back to

# Where a long text can be cut without changing its tokens: every split pattern begins anew at a space behind a word or
# number, after the end of a line (blank ones are another matter), and at a mark after a word of a script without spaces.
LETTER, WORD = r"[^\W\d_]", r"[^\W_]"
MARK = r"[\u3001\u3002\u300a-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]"  # of Chinese and Japanese
CUT = re.compile(rf"(?<={WORD})(?= \S)|(?<=\S\n)(?=[^\s/])|(?<={LETTER})(?={MARK})")
CUT_WITHIN = (2**10, 2**16)  # characters at a piece's end in which a place to cut is looked for, first in few of them


@dataclass(frozen=True)
class Document:
    """A text that may be larger than memory: its pieces, joined, are the text, and can be read again and again."""

    pieces: Callable[[], Iterator[str]]

    @classmethod
    def of(cls, text: str) -> Document:
        return cls(lambda: cut_up(text))

    @property
    def text(self) -> str:
        """All of it at once."""
        return "".join(self.pieces())


def find(path: str, skipped: Counter[str] | None = None) -> list[Path]:
    """The files that `path` names, in the order of their names: a file of any ending, a folder's, or those of a glob.

    Files are skipped whose name, or a folder's on the way to them, begins with a dot that `path` does not name, and in a
    folder those of other endings; `skipped` counts them. Raises ValueError if there is none that can be read.
    """
    skipped = Counter() if skipped is None else skipped
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        base, wanted = place, (*TEXTS, ".parquet")
        candidates = below(place)
    else:
        base, wanted = Path(place.anchor), ("",)
        candidates = (file for file in base.glob(str(place.relative_to(base))) if file.is_file())
    files = []
    for file in sorted(candidates):
        if is_hidden(file.relative_to(base), place):
            skipped["hidden"] += 1
        elif file.name.lower().endswith(wanted):
            files.append(file)
        else:
            skipped[file.suffix.lower() or "without an ending"] += 1
    if not files:
        left_out = f" ({skipped_files(skipped)})" if skipped else ""
        raise ValueError(f"{path} holds no file to read{left_out}: put .txt, .md, .jsonl (also compressed, .gz or .zst) or "
                         f".parquet there, or name a single file of any ending.")
    return files


def is_hidden(file: Path, place: Path) -> bool:
    """Whether a part of `file` begins with a dot that `place` does not name, as in .trash/a.txt or ._note.md."""
    named = [part for part in place.parts if part.startswith(".")]
    return any(part.startswith(".") and not any(fnmatch(part, name) for name in named) for part in file.parts)


def skipped_files(skipped: Counter[str]) -> str:
    """How many files were left out, by kind."""
    return "skipped " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())


def below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, those that links lead to as well. Raises OSError for what cannot be seen."""
    seen = set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()  # a link that leads back up
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (file for file in map(Path(place).joinpath, names) if file.is_file())


def refuse(error: OSError) -> None:
    raise error


class File:
    """A file of documents, each in one piece of JSON lines or Parquet, else the file as a whole; blank ones are left out.

    `errors` is what to do about bytes that are no UTF-8, "strict" or "replace".
    """

    def __init__(self, path: Path, text_field: str = "text", errors: str = "strict") -> None:
        self.path, self.text_field, self.errors = path, text_field, errors
        name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        self.kind = next((kind for kind in (".jsonl", ".parquet") if name.endswith(kind)), "text")
        self.raw: BinaryIO | None = None

    def documents(self) -> Iterator[Document]:
        """Raises ValueError with file and place for what cannot be read."""
        if self.kind == ".jsonl":
            found = (Document.of(text) for text in self.json_lines())
        elif self.kind == ".parquet":
            found = (Document.of(text) for text in self.parquet())
        else:
            found = iter([Document(self.text_pieces)])
        return (document for document in found if any(piece.strip() for piece in document.pieces()))

    def position(self) -> int:
        """The bytes on the disk that are behind the place where it is read now: none before, all after reading."""
        if self.raw is None:
            return 0
        return self.path.stat().st_size if self.raw.closed else self.raw.tell()

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The content, uncompressed as it is read. Raises ValueError where that takes a package that is not here."""
        name = self.path.name.lower()
        with open(self.path, "rb") as self.raw:
            if name.endswith(".gz"):
                yield gzip.GzipFile(fileobj=self.raw)
            elif name.endswith(".zst"):
                try:
                    import zstandard
                except ImportError:
                    raise ValueError(f"{self.path}: reading .zst needs zstandard: pip install zstandard.") from None
                yield io.BufferedReader(Unzstd(self.raw, zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)))
            else:
                yield self.raw

    def whole(self, read: Callable[[], bytes]) -> bytes:
        """What `read` gives, or one sentence about a file that is cut short or damaged."""
        try:
            return read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # Unzstd raises EOFError too
            raise ValueError(f"{self.path} is damaged or cut short ({error}).") from None
        except Exception as error:  # zstandard's own, which is not always there to be named
            if type(error).__name__ != "ZstdError":
                raise
            raise ValueError(f"{self.path} is damaged or cut short ({error}).") from None

    def text_pieces(self) -> Iterator[str]:
        """A UTF-8 file in pieces that end where tokens end. Raises ValueError naming the offset of what is no UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        waiting, offset = "", 0
        with self.opened() as file:
            while block := self.whole(lambda: file.read(PIECE)):
                waiting += self.decoded(decoder, block, offset)
                if offset == 0:
                    waiting = waiting.removeprefix("\ufeff")  # a byte order mark is no text
                offset += len(block)
                while len(waiting) >= 2 * PIECE:
                    cut = place_to_cut(waiting, 0)
                    yield waiting[:cut]
                    waiting = waiting[cut:]
        waiting += self.decoded(decoder, b"", offset, final=True)
        if waiting:
            yield waiting

    def decoded(self, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool = False) -> str:
        advice = "convert it (iconv -t utf-8), leave it out, or set data.errors=replace."
        if self.errors == "strict" and (zero := block.find(0)) >= 0:
            raise ValueError(f"{self.path} is no text, or UTF-16: byte 0x00 at offset {offset + zero}; {advice}")
        held = len(decoder.getstate()[0])  # the beginning of a character that the block before ended in
        try:
            return decoder.decode(block, final)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            place = offset - held + error.start
            raise ValueError(f"{self.path} is not UTF-8: byte 0x{byte:02x} at offset {place}; {advice}") from None

    def json_lines(self) -> Iterator[str]:
        """The text of each line's record."""
        with self.opened() as file:
            number = 0
            while line := self.whole(lambda: file.readline(RECORD_BYTES + 1)):
                number += 1
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if len(line) > RECORD_BYTES:
                    raise ValueError(f"{self.path}, line {number} is longer than {RECORD_BYTES // 2**20} MB, the most that "
                                     f"a JSON record may be: split it, or keep long texts as plain text.")
                if line.strip():
                    yield self.field_of(line, f"{self.path}, line {number}")

    def field_of(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line.decode("utf-8", self.errors))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not UTF-8 (byte {error.start + 1} of the line): convert it, "
                             f"or set data.errors=replace.") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not JSON ({error}).") from None
        if not isinstance(record, dict):
            return checked(None, place, self.text_field, [])
        return checked(record.get(self.text_field), place, self.text_field, sorted(record))

    def parquet(self) -> Iterator[str]:
        """The text of each row, some at a time."""
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{self.path}: reading .parquet needs pyarrow: pip install pyarrow.") from None
        try:
            with open(self.path, "rb") as self.raw, parquet.ParquetFile(self.raw, buffer_size=PIECE) as file:
                if self.text_field not in file.schema_arrow.names:
                    checked(None, str(self.path), self.text_field, file.schema_arrow.names)
                for row, value in enumerate(parquet_column(file, self.text_field), 1):
                    yield checked(value, f"{self.path}, row {row}", self.text_field, [self.text_field])
        except Exception as error:  # pyarrow has many kinds for damage: its own, OSError, UnicodeDecodeError
            if type(error) is ValueError:
                raise  # a sentence already
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.path} is damaged, or no Parquet file ({said}).") from None


def parquet_column(file: Any, name: str) -> Iterator[Any]:
    """The values of a pyarrow ParquetFile's column, about PIECE bytes of them in memory at a time."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)
        at_once = max(1, min(1024, PIECE * group.num_rows // max(1, size)))
        for batch in file.iter_batches(batch_size=at_once, row_groups=[number], columns=[name], use_threads=False):
            yield from batch.column(0).to_pylist()


class Unzstd(io.RawIOBase):
    """A zstd file's content, of one frame or several. Raises EOFError where the last one is cut short."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self.raw, self.decompressor = raw, decompressor
        self.frame, self.left = decompressor.decompressobj(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.left:
            block = self.frame.unused_data or self.raw.read(PIECE // 16)
            if self.frame.eof and block:
                self.frame = self.decompressor.decompressobj()
            elif not block:
                if not self.frame.eof:
                    raise EOFError("its last frame has no end")
                return 0
            self.left = self.frame.decompress(block)
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size


def checked(value: Any, place: str, text_field: str, there: list[str]) -> str:
    """`value` if it is text. Raises ValueError naming the fields that are `there`."""
    if not isinstance(value, str):
        fields = f"it has {', '.join(map(str, there[:10]))}" if there else "it is no record"
        raise ValueError(f"{place} has no text in the field {text_field} ({fields}): set data.text_field=NAME.")
    return value.encode("utf-8", "replace").decode()  # JSON can spell half of a character, which UTF-8 cannot


def cut_up(text: str) -> Iterator[str]:
    """A text in pieces that end where tokens end."""
    start = 0
    while len(text) - start >= 2 * PIECE:
        end = place_to_cut(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def place_to_cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` is to end: at PIECE characters where there is no good place before it."""
    end = start + PIECE
    for within in CUT_WITHIN:
        places = [match.start() for match in CUT.finditer(text, max(start + 1, end - within), end)]
        if places:
            return places[-1]
    return end
