"""The texts in files of records: JSON Lines, a JSON array, CSV, TSV and Parquet.

Each reader gives a text or a BadRecord for every record, with never more in memory than a record
may have. Knows records; knows no tokens, and does not decide what happens to bad ones.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.encodings import not_text

RECORD_BYTES = 2**26  # the most that a record may have, as it must be in memory at once
BATCH_BYTES = 2**20  # of Parquet: what the rows that are read at once have
BOMB_BYTES, BOMB_RATIO = 2**28, 200  # of Parquet: columns beyond both are not unpacked
MISSING = object()
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
DECODER = json.JSONDecoder()
BARE_RETURN = re.compile(r"(?<=\r)(?!\n)")


class BadRecord(NamedTuple):
    """A record without text: where it is and what is wrong, and what to do."""

    problem: str  # such as "line 3 is not JSON (...)"
    advice: str = ""  # such as "set data.text_field=NAME"

    def refusal(self, name: str) -> ValueError:
        """For a record of the file or data set `name`."""
        advice = f"{self.advice}, or " if self.advice else ""
        return ValueError(
            f"{name}, {self.problem}: {advice}set data.on_bad_record=skip to leave such "
            f"records out."
        )


def skipped_records(number: int) -> str:
    """What a description of a source adds about them."""
    if not number:
        return ""
    return f", {number:,} {'record' if number == 1 else 'records'} without text skipped"


class OfType(NamedTuple):
    """Stands for a value of Parquet that is not text and is not read."""

    name: str  # of the type


def text_of(record: Any, field: str, place: str) -> str | BadRecord:
    """The text of a record: its `field`, or the record itself if that is a text."""
    if isinstance(record, str):
        return well_formed(record)
    if not isinstance(record, dict):
        return BadRecord(f"{place} is not a record with fields (it is {kind_of(record)})")
    return as_text(look_up(record, field), field, place, list(record))


def look_up(record: dict[str, Any], field: str) -> Any:
    """The value of a field. A name with dots, as in data.text, also names a field of a field."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def as_text(value: Any, field: str, place: str, fields: list[str]) -> str | BadRecord:
    if isinstance(value, str):
        return well_formed(value)
    if value is MISSING:
        there = (
            f"its fields are {', '.join(map(str, fields[:10]))}" if fields else "it has no fields"
        )
        return BadRecord(f"{place} has no field {field} ({there})", "set data.text_field=NAME")
    return BadRecord(f"{place} has no text in the field {field} (it is {kind_of(value)})")


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, OfType):
        return f"of type {value.name}"
    return "an object with fields" if isinstance(value, dict) else f"a {type(value).__name__}"


def well_formed(text: str) -> str:
    """JSON can spell half of a character, which UTF-8 cannot hold: it becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# Lines


def lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Raises ValueError for a line that is longer than a record may be."""
    number = 0
    while line := file.readline(RECORD_BYTES + 1):
        number += 1
        if len(line) > RECORD_BYTES:
            raise ValueError(too_long(f"{path}, line {number}"))
        yield line


def too_long(place: str) -> str:
    return (
        f"{place} is longer than {RECORD_BYTES // 2**20} MB, the most that a record may have: "
        f"split it, or keep long texts as plain text."
    )


def decoded(line: bytes, errors: str, path: Path, number: int) -> str:
    """Raises ValueError for a line that is not UTF-8."""
    if errors == "strict" and 0 in line:
        place = f"byte 0x00, byte {line.index(0) + 1} of the line"
        raise ValueError(f"{path}, line {number} {not_text('utf-8', line, place)}")
    try:
        return line.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x}, byte {error.start + 1} of the line"
        raise ValueError(f"{path}, line {number} {not_text('utf-8', line, place)}") from None


def json_lines(file: BinaryIO, field: str, errors: str, path: Path) -> Iterator[str | BadRecord]:
    """The text of each line's record. Blank lines are no records."""
    for number, line in enumerate(lines_of(file, path), 1):
        if line.isspace():
            continue
        text = decoded(line, errors, path, number)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield BadRecord(
                f"line {number} is not JSON ({reason_of(error)})",
                "a file has one record a line, or, as .json, one array of records",
            )
            continue
        yield text_of(record, field, f"line {number}")


def reason_of(error: ValueError | RecursionError) -> str:
    """Why something is not JSON, without places that count from somewhere else."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "too deeply nested" if isinstance(error, RecursionError) else str(error)


def json_array(blocks: Iterator[str], field: str, path: Path) -> Iterator[str | BadRecord]:
    """The text of each element of a JSON array, of which `blocks` are the pieces.

    Raises ValueError where it is not JSON: what follows cannot be told apart there.
    """
    text, place, number = next(blocks, "").lstrip()[1:], 0, 0
    while True:
        try:
            record, end = element(text, place)
        except (ValueError, RecursionError) as error:
            text = text[place:]
            more = following(blocks, len(text)) if may_be_cut(error) else ""
            if not more:
                raise ValueError(
                    f"{path}, record {number + 1} is not JSON ({reason_of(error)})."
                ) from None
            if len(text) > RECORD_BYTES:
                raise ValueError(too_long(f"{path}, record {number + 1}")) from None
            text, place = text + more, 0
            continue
        if record is not MISSING:
            number += 1
            yield text_of(record, field, f"record {number}")
        place = end
        if text[end - 1] == "]":
            break
    if any(block.strip() for block in chain([text[place:]], blocks)):
        raise ValueError(f"{path} has more behind the end of its array: only one array is read.")


def element(text: str, start: int) -> tuple[Any, int]:
    """The element of an array that begins at `start`, and the place behind what ends it.

    MISSING for an array without elements. Raises ValueError if it is not there whole.
    """
    start = skip_blanks(text, start)
    if text[start : start + 1] == "]":
        return MISSING, start + 1
    record, end = DECODER.raw_decode(text, start)
    end = skip_blanks(text, end)
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting a comma or the end of the array", text, end)
    return record, end + 1


def may_be_cut(error: ValueError | RecursionError) -> bool:
    """Whether more text might complete the element that cannot be read."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # A part of the longest word, -Infinity, or of an escape such as \u00e9.
    return error.msg.startswith("Unterminated string") or len(error.doc.rstrip()) - error.pos < 10


def following(blocks: Iterator[str], least: int) -> str:
    """The next blocks, with more than `least` characters. Doubling keeps reading linear."""
    found: list[str] = []
    length = 0
    for block in blocks:
        found.append(block)
        length += len(block)
        if length > least:
            break
    return "".join(found)


def skip_blanks(text: str, place: int) -> int:
    return json.decoder.WHITESPACE.match(text, place).end()


# Columns


class TextLines:
    """The lines of a CSV file. `size` counts the bytes since it was last set to 0.

    Raises ValueError when that is more than a record may have, and for what is not UTF-8.
    """

    def __init__(self, file: BinaryIO, errors: str, path: Path) -> None:
        self.file, self.errors, self.path = file, errors, path
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(lines_of(self.file, self.path), 1):
            self.size += len(line)
            if self.size > RECORD_BYTES:
                raise ValueError(too_long(f"{self.path}: the record that has line {number}"))
            text = decoded(line, self.errors, self.path, number)
            # Old Macs end a line with \r alone.
            yield from BARE_RETURN.split(text) if "\r" in text[:-2] else [text]


def delimited(
    file: BinaryIO, ending: str, field: str, errors: str, path: Path
) -> Iterator[str | BadRecord]:
    """The text of each row of CSV or TSV, whose first row names the columns.

    Blank lines are no rows. Raises ValueError if there is no such column.
    """
    csv.field_size_limit(RECORD_BYTES)
    lines = TextLines(file, errors, path)
    found = iter(lines)
    first = next((line for line in found if line.strip()), "")
    if not first:
        return
    rows = csv.reader(
        chain([first], found), delimiter=delimiter_of(first, ending, field), strict=True
    )
    header: list[str] = []
    while True:
        lines.size, line = 0, rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord(f"line {line} is not {ending[1:].upper()} ({error})")
            continue
        if not header:
            header = names_of(row)
            if field not in header:
                raise ValueError(
                    f"{path} has no field {field} (its fields are {', '.join(header[:10])}): "
                    f"set data.text_field=NAME."
                )
        elif row and len(row) != len(header):
            yield BadRecord(
                f"line {line} has {len(row):,} fields and the header has {len(header):,}"
            )
        elif row:
            yield well_formed(row[header.index(field)])


def delimiter_of(first: str, ending: str, field: str) -> str:
    """What separates columns: of .csv, what makes `field` a name in the first line."""
    for delimiter in DELIMITERS[ending]:
        if field in names_of(next(csv.reader([first], delimiter=delimiter), [])):
            return delimiter
    return DELIMITERS[ending][0]


def names_of(row: list[str]) -> list[str]:
    return [name.strip() for name in row]


def parquet(file: BinaryIO, field: str, path: Path) -> Iterator[str | BadRecord]:
    """The text of each row. Raises ValueError for damage, and if there is no such column."""
    try:
        from pyarrow import parquet as reader
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow.") from None
    try:
        with reader.ParquetFile(file, buffer_size=2**18) as opened:
            for row, value in enumerate(parquet_column(opened, field, str(path)), 1):
                yield as_text(value, field, f"row {row}", [])
    except Exception as error:
        # pyarrow raises many kinds for damage: its own, OSError, UnicodeDecodeError.
        if type(error) is ValueError and str(path) in str(error):
            raise  # a sentence already
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or no Parquet file ({said}).") from None


def parquet_column(file: Any, field: str, name: str) -> Iterator[Any]:
    """The values of a column of a pyarrow ParquetFile, few of them in memory at a time.

    Of a column that is not text, each value is an OfType. Raises ValueError if the file, which
    messages call `name`, has no such column or is a decompression bomb.
    """
    columns = [file.schema.column(number).path for number in range(len(file.schema))]
    kind = column_type(file.schema_arrow, field)
    if kind is None:
        there = ", ".join(file.schema_arrow.names[:10])
        raise ValueError(
            f"{name} has no field {field} (its fields are {there}): set data.text_field=NAME."
        )
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        if not is_text(kind):
            yield from repeat(OfType(str(kind)), group.num_rows)
            continue
        chunk = group.column(columns.index(field))
        size = chunk.total_uncompressed_size
        if size > BOMB_BYTES and size > BOMB_RATIO * chunk.total_compressed_size:
            raise ValueError(
                f"{name} unpacks {chunk.total_compressed_size:,} bytes to {size // 2**20:,} MB at "
                f"once, "
                f"like a decompression bomb: write it again with smaller row groups."
            )
        rows = batch_rows(chunk.encodings, size, group.num_rows)
        for batch in file.iter_batches(
            batch_size=rows, row_groups=[number], columns=[field], use_threads=False
        ):
            if field in file.schema_arrow.names:
                yield from batch.column(0).to_pylist()
            else:
                yield from (look_up(row, field) for row in batch.to_pylist())


def is_text(kind: Any) -> bool:
    """Whether a pyarrow type is text, also one that keeps each text once."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def batch_rows(encodings: tuple[str, ...], size: int, rows: int) -> int:
    """The rows to read at once, of a column whose pages have `size` bytes.

    A dictionary holds a value once that many rows have, as do the prefixes of delta encoding.
    There, each row might have as many bytes as all pages.
    """
    if set(encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}:
        at_once = BATCH_BYTES * rows // max(1, size)
    else:
        at_once = RECORD_BYTES // max(1, size)
    return max(1, min(1024, at_once))


def column_type(schema: Any, field: str) -> Any:
    """The pyarrow type of a column, or of a field of a field. None if there is none."""
    import pyarrow

    if field in schema.names:
        return schema.field(field).type
    first, *rest = field.split(".")
    if first not in schema.names:
        return None
    kind = schema.field(first).type
    for name in rest:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind
