"""The documents in a file: text, JSON, CSV or Parquet, plain or compressed, in bounded memory.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data import text_records
from data.document import Document, cut_into_pieces
from data.encodings import decoded
from data.parquet import parquet_texts
from data.records import SUFFIXES, BadRecord
from data.unpack import COMPRESSIONS, decompressed, plain_name, reading


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
    read_record: text_records.RecordReader | None = None
    bad_records: int = field(default=0, init=False)  # in the latest reading
    raw: BinaryIO | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        """The suffix of a format of records, or "text"."""
        name = plain_name(self.path)
        return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "text")

    def documents(self) -> Iterator[Document]:
        """Raises ValueError naming the file and the place that cannot be read."""
        self.bad_records = 0
        # A plain text is one document.
        if self.kind == "text":
            document = Document(self.text_pieces)
            first = next((piece for piece in document.pieces() if not piece.isspace()), "")
            if text_records.is_json_lines(first):
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
        """The text of each record, or what `read_record` makes of it."""
        with self.opened() as stream:
            text, kind = self.decoded(stream), self.kind
            if kind in text_records.DELIMITERS:
                yield from text_records.csv_records(text, kind, self.text_field, self.path)
            elif kind != ".parquet":
                read = self.read_record or partial(text_records.text_of, field=self.text_field)
                yield from text_records.json_records(text, kind, read, self.path)
            elif self.path.suffix.lower() in COMPRESSIONS:
                raise ValueError(f"{self.path} is a compressed Parquet file: decompress it.")
            else:
                yield from parquet_texts(stream, self.text_field, self.path)


def file_version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
