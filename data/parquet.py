"""The texts in a column of a Parquet file, with few rows in memory at a time.

Needs the optional package `pyarrow`.
"""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

from data.records import RECORD_BYTES, BadRecord, OfType, as_text, no_field, several_fields
from optional import import_optional
from terminal import first_line

BATCH_BYTES = 2**20  # of the rows that are read at a time
BOMB_BYTES, BOMB_RATIO = 2**28, 200  # columns beyond both are not decompressed


def parquet_texts(file: BinaryIO, field: str, path: Path) -> Iterator[str | BadRecord]:
    """The text of each row. Raises ValueError for damage, and if there is no such column."""
    import_optional("pyarrow", f"{path}: reading .parquet needs pyarrow", "pyarrow")
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
    if columns.count(field) > 1:
        raise several_fields(name, field)
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
