"""The texts in JSON Lines, in a JSON array, and in a column of CSV or TSV.

One record is in memory at a time.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data import records
from data.records import BadRecord, lines_of
from terminal import counted

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
# Makes a text or a document of a JSON record, whose place is given for messages.
RecordReader = Callable[[Any, str], Any]


def text_of(record: Any, place: str, field: str) -> str | BadRecord:
    """The text of a JSON record: its `field`, or the record itself if it is a string."""
    if isinstance(record, str):
        return records.well_formed(record)
    if not isinstance(record, dict):
        return BadRecord(f"{place} is not a record with fields (it is {records.type_name(record)})")
    value = records.look_up(record, field)
    if value is records.MISSING:
        fields = f"its fields are {records.listed(record)}" if record else "it has no fields"
        return BadRecord(f"{place} has no field {field} ({fields})", "set data.text_field=NAME")
    return records.as_text(value, field, place)


def json_records(blocks: Iterator[str], kind: str, read: RecordReader, path: Path) -> Iterator[Any]:
    """What `read` makes of each record in a file with this content and suffix (`kind`).

    A record is an element of an array, which only .json can be, or a line that is not blank.
    """
    # Look at the beginning of the file, and put it back.
    first = next(blocks, "")
    blocks = chain([first], blocks)
    if kind == ".json" and first.lstrip().startswith("["):
        yield from json_array(blocks, read, path)
        return

    # JSON Lines. A line that is not JSON does not end the file.
    for number, line in enumerate(lines_of(blocks, "\n", path), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRecord(f"line {number} is not JSON ({reason_of(error)})",
                            "write one record per line, or, in .json, one array of records")
            continue
        yield read(record, f"line {number}")


def is_json_lines(text: str) -> bool:
    """Whether each of the first two lines of a text that are not blank is a JSON object."""
    lines = (line for line in io.StringIO(text) if not line.isspace())
    found = 0
    for line in islice(lines, 2):
        try:
            found += line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            return False
    return found == 2


def reason_of(error: ValueError | RecursionError) -> str:
    """Why something is not JSON. Only the position in the record is given, not in the block."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "too deeply nested"
    return "a whole number has more digits than Python reads"


def json_array(blocks: Iterator[str], read: RecordReader, path: Path) -> Iterator[Any]:
    """What `read` makes of each element of a JSON array.

    Raises ValueError for invalid JSON, as the start of the next element is unknown then.
    """
    # `text` from `start` on is not yet read.
    text = next(blocks).lstrip()[1:]
    start, number, n_blocks = 0, 0, 1
    decoder = json.JSONDecoder()
    while True:
        try:
            start = skip_blanks(text, start)
            # A comma may stand before the end of the array.
            is_end = text[start : start + 1] == "]"
            if not is_end:
                record, end = decoder.raw_decode(text, start)
                end = skip_blanks(text, end)
                if text[end : end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting a comma or the end of the array", text,
                                               end)
        except (ValueError, RecursionError) as error:
            # Read more, if the rest of the element may be in the next blocks.
            text, start = text[start:], 0
            more = "".join(islice(blocks, n_blocks)) if may_be_cut(error) else ""
            if not more:
                place = f"{path}, record {number + 1}"
                raise ValueError(f"{place} is not JSON ({reason_of(error)}).") from None
            if len(text) > records.RECORD_BYTES:
                raise records.too_long(f"{path}, record {number + 1}") from None
            text += more
            # Each attempt starts at the beginning of the element. Doubling keeps the time linear.
            n_blocks *= 2
            continue

        # An element was read, or the end of the array.
        n_blocks = 1
        if is_end:
            break
        number += 1
        yield read(record, f"record {number}")
        # The end of the array is read again.
        start = end + 1 if text[end] == "," else end
    if any(block.strip() for block in chain([text[start + 1 :]], blocks)):
        raise ValueError(f"{path} has more text after its array: only one array is read.")


def skip_blanks(text: str, start: int) -> int:
    return json.decoder.WHITESPACE.match(text, start).end()


def may_be_cut(error: ValueError | RecursionError) -> bool:
    """Whether more text might complete the element that cannot be read."""
    # The longest words are -Infinity and escapes such as \u00e9.
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or len(error.doc.rstrip()) - error.pos < 10)


# CSV


def csv_records(blocks: Iterator[str], kind: str, field: str,
                path: Path) -> Iterator[str | BadRecord]:
    """The text of each row of CSV or TSV, whose first row names the columns.

    Blank lines are skipped. Raises ValueError if there is no such column.
    """
    csv.field_size_limit(records.RECORD_BYTES)
    row_size = 0

    def counted_lines() -> Iterator[str]:
        nonlocal row_size
        # Lines can end with \r alone.
        for number, line in enumerate(lines_of(blocks, "", path), 1):
            row_size += len(line)
            if row_size > records.RECORD_BYTES:
                raise records.too_long(f"{path}: the record on line {number}")
            yield line

    # Blank lines before the header could not be told from rows with one empty field.
    lines = counted_lines()
    n_blank, first = 0, next(lines, "")
    while first.isspace():
        n_blank, first = n_blank + 1, next(lines, "")
    delimiter = delimiter_of(first, kind, field)
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)

    # The first row is the header. An invalid row does not end the file.
    n_columns = 0
    while True:
        row_size, n_read = 0, rows.line_num
        line = n_blank + n_read + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            # One bad record may be skipped, but not all the lines that follow it.
            if "unexpected end of data" in str(error) and rows.line_num > n_read + 1:
                raise ValueError(f"{path}, line {line} opens a quotation mark that is never "
                                 f"closed: close or remove it.") from None
            yield BadRecord(f"line {line} is not {kind[1:].upper()} ({error})")
            continue
        if row is None:
            return
        # A blank line.
        if not row:
            continue
        if not n_columns:
            n_columns, column = len(row), column_of(field, row, path)
        elif len(row) != n_columns:
            yield BadRecord(
                f"line {line} has {counted(len(row), 'field')} and the header has {n_columns:,}")
        else:
            yield records.well_formed(row[column])


def column_of(field: str, header: list[str], path: Path) -> int:
    """The index of the column `field`. Raises ValueError unless there is exactly one."""
    names = [name.strip() for name in header]
    if field not in names:
        raise records.no_field(str(path), field, names)
    if names.count(field) > 1:
        raise records.several_fields(str(path), field)
    return names.index(field)


def delimiter_of(first: str, kind: str, field: str) -> str:
    """The delimiter that makes `field` a column name in the first line, or else the usual one."""
    for delimiter in DELIMITERS[kind]:
        names = next(csv.reader([first], delimiter=delimiter), [])
        if field in [name.strip() for name in names]:
            return delimiter
    return DELIMITERS[kind][0]
