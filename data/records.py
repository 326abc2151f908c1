"""Records with a text: their limits, their fields, and the sentences about bad ones.

The readers of JSON, CSV and Parquet yield a text or a BadRecord for each record. Does not decide
what happens to bad records.
"""

import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from terminal import counted

JSON_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet")
RECORD_BYTES = 2**26  # the limit for one record, as it must fit in memory
MISSING = object()
JSON_TYPES = {
    type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number",
    list: "a list", dict: "an object with fields"}


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


def several_fields(name: str, field: str) -> ValueError:
    return ValueError(f"{name} has several columns {field}: rename all but one.")


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
