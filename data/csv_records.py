"""The texts in a column of CSV or TSV, with one row in memory at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from data.records import RECORD_BYTES, BadRecord, lines_of, no_field, too_long, well_formed
from terminal import counted

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}


def csv_records(blocks: Iterator[str], kind: str, field: str,
                path: Path) -> Iterator[str | BadRecord]:
    """The text of each row of CSV or TSV, whose first row names the columns.

    Blank lines are skipped. Raises ValueError if there is no such column.
    """
    csv.field_size_limit(RECORD_BYTES)
    row_size = 0

    def counted_lines() -> Iterator[str]:
        nonlocal row_size
        # Lines can end with \r alone.
        for number, line in enumerate(lines_of(blocks, "", path), 1):
            row_size += len(line)
            if row_size > RECORD_BYTES:
                raise too_long(f"{path}: the record on line {number}")
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
        row_size, line = 0, n_blank + rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield BadRecord(f"line {line} is not {kind[1:].upper()} ({error})")
            continue
        if row is None:
            return
        if not row:
            continue
        if not n_columns:
            n_columns, column = len(row), column_of(field, row, path)
        elif len(row) != n_columns:
            yield BadRecord(
                f"line {line} has {counted(len(row), 'field')} and the header has {n_columns:,}")
        else:
            yield well_formed(row[column])


def column_of(field: str, header: list[str], path: Path) -> int:
    """The index of the column `field`. Raises ValueError unless there is exactly one."""
    names = [name.strip() for name in header]
    if field not in names:
        raise no_field(str(path), field, names)
    if names.count(field) > 1:
        raise ValueError(f"{path} has several columns {field}: rename all but one.")
    return names.index(field)


def delimiter_of(first: str, kind: str, field: str) -> str:
    """The delimiter that makes `field` a column name in the first line, or else the usual one."""
    for delimiter in DELIMITERS[kind]:
        names = next(csv.reader([first], delimiter=delimiter), [])
        if field in [name.strip() for name in names]:
            return delimiter
    return DELIMITERS[kind][0]
