"""Records with a text: their limits, their fields, and the sentences about bad ones.

The readers of JSON, CSV and Parquet yield a text or a BadRecord for each record. Does not decide
what happens to bad records. Reads Parquet itself, with the optional package `pyarrow`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from terminal import counted, first_line

JSON_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet")
RECORD_BYTES = 2**26  # the limit for one record, as it must fit in memory
MISSING = object()
JSON_TYPES = {
    type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number",
    list: "a list", dict: "an object with fields"}

BATCH_BYTES = 2**20  # of the rows that are read at a time
BOMB_BYTES, BOMB_RATIO = 2**28, 200  # columns beyond both are not decompressed


class BadRecord(NamedTuple):
    """Why a record has no text, and where it is."""

    problem: str  # such as "line 3 is not JSON (...)"
    advice: str = ""  # such as "set data.text_field=NAME"

    def refusal(self, name: str) -> ValueError:
        """The error for a record of the file or dataset `name`."""
        advice = f"{self.advice}, or " if self.advice else ""
        return ValueError(
            f"{name}, {self.problem}: {advice}set data.on_bad_record=skip to skip such records.")


def skipped_records(number: int) -> str:
    """The addition to the description of a source."""
    return f", {counted(number, 'record')} without text skipped" if number else ""


class OfType(NamedTuple):
    """Stands for a Parquet value that is not text and is not read."""

    name: str


def look_up(record: dict[str, Any], field: str) -> Any:
    """The value of a field, or MISSING. Dots separate the names of nested fields (data.text)."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def as_text(value: Any, field: str, place: str) -> str | BadRecord:
    if isinstance(value, str):
        return well_formed(value)
    return BadRecord(f"{place} has no text in the field {field} (it is {type_name(value)})")


def type_name(value: Any) -> str:
    if isinstance(value, OfType):
        return f"of type {value.name}"
    return JSON_TYPES.get(type(value), f"a {type(value).__name__}")


def well_formed(text: str) -> str:
    """`text` with ? for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def no_field(name: str, field: str, fields: list[str]) -> ValueError:
    return ValueError(
        f"{name} has no field {field} (its fields are {listed(fields)}): set data.text_field=NAME.")


def listed(fields: Iterable[str]) -> str:
    """The first names of fields, for a message."""
    return ", ".join(name[:40] for name in islice(fields, 10))


def too_long(place: str) -> ValueError:
    return ValueError(f"{place} is longer than {RECORD_BYTES // 2**20} MB, the limit for one "
                      f"record: split it, or store long texts as plain text.")


def lines_of(blocks: Iterator[str], newline: str, path: Path) -> Iterator[str]:
    """The lines of a text with their ends. `newline` is as in `open`.

    Raises ValueError for a line that is longer than a record may be.
    """
    waiting, number = "", 0
    for block in chain(blocks, ["\n"]):
        waiting += block
        if "\n" not in block and len(waiting) <= RECORD_BYTES:
            continue
        # All complete lines; the last one continues in the next block.
        end = waiting.rfind("\n") + 1 or len(waiting)
        for line in io.StringIO(waiting[:end], newline):
            number += 1
            if len(line) > RECORD_BYTES:
                raise too_long(f"{path}, line {number}")
            yield line
        waiting = waiting[end:]


# Parquet


def parquet_texts(file: BinaryIO, field: str, path: Path) -> Iterator[str | BadRecord]:
    """The text of each row. Raises ValueError for damage, and if there is no such column."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow.") from None
    try:
        with open_parquet(file, buffer_size=2**18) as opened:
            for row, value in enumerate(parquet_column(opened, field, str(path)), 1):
                yield as_text(value, field, f"row {row}")
    except Exception as error:
        # pyarrow raises many exceptions for damage: its own, OSError, UnicodeDecodeError.
        if type(error) is ValueError and str(path) in str(error):
            raise
        reason = first_line(error)
        raise ValueError(f"{path} is damaged, or not a Parquet file ({reason}).") from None


def open_parquet(file: BinaryIO, buffer_size: int = 0) -> Any:
    """A pyarrow ParquetFile that reads `file` in the calling thread only.

    A thread of pyarrow's that reads a file of Python's while Python ends aborts the program
    (https://github.com/apache/arrow/issues/45214).
    """
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file, buffer_size=buffer_size, pre_buffer=False)


def parquet_column(file: Any, field: str, name: str) -> Iterator[Any]:
    """The values of a column of a pyarrow ParquetFile, with few of them in memory at a time.

    Each value of a column that is not text is an OfType. Raises ValueError, which calls the file
    `name`, if there is no such column or the file is a decompression bomb.
    """
    # Columns are named by their paths: data.text is a field of data, unless a column has that name.
    columns = [file.schema.column(number).path for number in range(len(file.schema))]
    names = [field] if field in file.schema_arrow.names else field.split(".")
    kind = column_type(file.schema_arrow, names)
    if kind is None:
        raise no_field(name, field, file.schema_arrow.names)

    if not is_text(kind):
        yield from repeat(OfType(str(kind)), file.metadata.num_rows)
        return

    for number in range(file.num_row_groups):
        # A row group is decompressed column by column. Its sizes are known before.
        group = file.metadata.row_group(number)
        chunk = group.column(columns.index(field))
        packed, size = chunk.total_compressed_size, chunk.total_uncompressed_size
        if size > BOMB_BYTES and size > BOMB_RATIO * packed:
            raise ValueError(f"{name} decompresses {packed:,} bytes to {size // 2**20:,} MB at "
                             f"once, like a decompression bomb: write it with smaller row groups.")

        # A batch of rows takes little memory.
        rows = batch_rows(chunk.encodings, size, group.num_rows)
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=[field],
                                       use_threads=False):
            values = batch.column(0)
            for nested in names[1:]:
                values = values.field(nested)
            yield from values.to_pylist()


def column_type(schema: Any, names: list[str]) -> Any:
    """The pyarrow type of a column, or of a nested field by its path. None if there is none."""
    import pyarrow

    kind = pyarrow.struct(list(schema))
    for name in names:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def is_text(kind: Any) -> bool:
    """Whether a pyarrow type is text, including dictionary-encoded text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def batch_rows(encodings: tuple[str, ...], size: int, rows: int) -> int:
    """The number of rows to read at a time, of a column whose pages have `size` bytes."""
    if set(encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}:
        at_once = BATCH_BYTES * rows // max(1, size)
    else:
        # A dictionary holds the value of many rows once, and so do the prefixes of delta encoding.
        # Each row can have as many bytes as all pages.
        at_once = RECORD_BYTES // max(1, size)
    return max(1, min(1024, at_once))
