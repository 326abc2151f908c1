"""Files to documents: text, Markdown, JSON lines and Parquet, plain or compressed, never more of one in memory than a piece.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 2**20  # the characters of a long text that are read at once
RECORD_BYTES = 2**26  # the most that one JSON line may hold: it is one string, and must be in memory whole
KINDS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst")

# Where a long text can be cut without changing its tokens: every split pattern begins a new word at a space between two
# letters, after the end of a line (blank ones are another matter), and at a mark after a word of a script without spaces.
LETTER = r"[^\W\d_]"
MARK = r"[\u3001\u3002\u300a-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]"  # of Chinese and Japanese
CUT = re.compile(rf"(?<={LETTER})(?= {LETTER})|(?<=\S\n)(?={LETTER})|(?<={LETTER})(?={MARK})")
CUT_WITHIN = 2**16  # characters at a piece's end in which a place to cut is looked for


@dataclass(frozen=True)
class Document:
    """A text that may be larger than memory: its pieces, joined, are the text, and can be read again and again."""

    pieces: Callable[[], Iterator[str]]

    @classmethod
    def of(cls, text: str) -> Document:
        return cls(lambda: iter((text,)))

    @property
    def text(self) -> str:
        """All of it at once."""
        return "".join(self.pieces())


def find(path: str) -> list[Path]:
    """The files that `path` names, in the order of their names: a file of any ending, a folder's, or those of a glob.

    Raises ValueError if there is none that can be read.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    kinds = tuple(kind + compression for kind in KINDS for compression in COMPRESSIONS)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.name.lower().endswith(kinds) and file.is_file())
    else:
        base = Path(place.anchor)
        files = sorted(file for file in base.glob(str(place.relative_to(base))) if file.is_file())
    if not files:
        raise ValueError(f"data.path={path} holds no file to read: put some of {', '.join(KINDS)} there (also compressed, "
                         f".gz or .zst), or name a single file of any ending.")
    return files


def documents(path: Path, text_field: str, errors: str) -> Iterator[Document]:
    """The documents in a file: each record of JSON lines or Parquet, else the file as a whole; blank ones are left out.

    `errors` is what to do about bytes that are no UTF-8, "strict" or "replace". Raises ValueError with file and place
    for what cannot be read.
    """
    if kind(path) == ".jsonl":
        found = (Document.of(text) for text in json_lines(path, text_field, errors))
    elif kind(path) == ".parquet":
        found = (Document.of(text) for text in parquet(path, text_field))
    else:
        found = iter([Document(lambda: text_pieces(path, errors))])
    return (document for document in found if any(piece.strip() for piece in document.pieces()))


def kind(path: Path) -> str:
    """How a file is read: .jsonl or .parquet, and everything else as text."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((one for one in (".jsonl", ".parquet") if name.endswith(one)), "text")


def opened(path: Path) -> BinaryIO:
    """The file, uncompressed as it is read. Raises ValueError where that takes a package that is not here."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path)
    if path.name.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs zstandard: pip install zstandard.") from None
        return io.BufferedReader(zstandard.open(path, "rb"))
    return open(path, "rb")


def blocks(path: Path) -> Iterator[bytes]:
    """A file's content, piece by piece. Raises ValueError for compression that is damaged."""
    with opened(path) as file:
        while block := whole(path, lambda: file.read(PIECE)):
            yield block


def whole(path: Path, read: Callable[[], bytes]) -> bytes:
    """What `read` gives, or one sentence about a file that is cut short or damaged."""
    try:
        return read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}).") from None
    except Exception as error:  # zstandard's own, which is not always there to be named
        if type(error).__name__ != "ZstdError":
            raise
        raise ValueError(f"{path} is damaged or cut short ({error}).") from None


def text_pieces(path: Path, errors: str) -> Iterator[str]:
    """A UTF-8 file in pieces that end where tokens end. Raises ValueError naming the offset of what is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    waiting, offset = "", 0
    for block in blocks(path):
        waiting += decoded(path, decoder, block, offset)
        if offset == 0:
            waiting = waiting.removeprefix("\ufeff")  # a byte order mark is no text
        offset += len(block)
        while len(waiting) >= 2 * PIECE:
            cut = place_to_cut(waiting[:PIECE])
            yield waiting[:cut]
            waiting = waiting[cut:]
    waiting += decoded(path, decoder, b"", offset, final=True)
    if waiting:
        yield waiting


def decoded(path: Path, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool = False) -> str:
    held = len(decoder.getstate()[0])  # the beginning of a character that the block before ended in
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset - held + error.start}; convert it "
                         f"(iconv -t utf-8), leave it out, or set data.errors=replace.") from None


def place_to_cut(text: str) -> int:
    """Where to cut a piece's end off; the whole length where there is no good place, as in a line without spaces."""
    start = max(1, len(text) - CUT_WITHIN)
    place = len(text)
    for match in CUT.finditer(text, start):
        place = match.start()
    return place


def json_lines(path: Path, text_field: str, errors: str) -> Iterator[str]:
    """The text of each line's record."""
    with opened(path) as file:
        number = 0
        while line := whole(path, lambda: file.readline(RECORD_BYTES + 1)):
            number += 1
            if len(line) > RECORD_BYTES:
                raise ValueError(f"{path}, line {number} is longer than {RECORD_BYTES // 2**20} MB, the most that a JSON "
                                 f"record may be: split it, or keep long texts as plain text.")
            if line.strip():
                yield field_of(line, f"{path}, line {number}", text_field, errors)


def field_of(line: bytes, place: str, text_field: str, errors: str) -> str:
    try:
        record = json.loads(line.decode("utf-8", errors))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 (byte {error.start + 1} of the line): convert it, "
                         f"or set data.errors=replace.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}).") from None
    return checked(record.get(text_field) if isinstance(record, dict) else None, place, text_field,
                   sorted(record) if isinstance(record, dict) else [])


def checked(value: Any, place: str, text_field: str, there: list[str]) -> str:
    """`value` if it is text. Raises ValueError naming the fields that are `there`."""
    if not isinstance(value, str):
        fields = f"it has {', '.join(map(str, there[:10]))}" if there else "it is no record"
        raise ValueError(f"{place} has no text in the field {text_field} ({fields}): set data.text_field=NAME.")
    return value.encode("utf-8", "replace").decode()  # JSON can spell half of a character, which UTF-8 cannot


def parquet(path: Path, text_field: str) -> Iterator[str]:
    """The text of each row, some hundred rows at a time."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow.") from None
    try:
        with ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                checked(None, str(path), text_field, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield checked(value, f"{path}, row {row}", text_field, [text_field])
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({str(error).splitlines()[0]}).") from None
