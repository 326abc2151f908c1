"""Read metrics.jsonl and other files of JSON lines: their rows, and the curves that these form.

A run that is training or was killed can leave an incomplete last line: lines that cannot be read
are skipped.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import atomic

Rows = list[dict[str, Any]]
# More than a picture can show.
CURVE_POINTS = 250
# Of a file: that of millions of steps.
MAX_BYTES = 2**30


def read_rows(path: Path) -> Rows:
    """The JSON objects with a step in a file with one on each line; none if there is no file.

    Raises ValueError if it is too large.
    """
    if not path.is_file():
        return []
    return parse_rows(atomic.read_regular(path, MAX_BYTES).splitlines())


def parse_rows(lines: list[bytes]) -> Rows:
    """The JSON objects with a step of these lines, without those that cannot be read."""
    try:
        # One call takes half the time of a call for each line.
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        rows = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_new_rows(path: Path, offset: int, max_bytes: int = -1) -> tuple[Rows, int, int]:
    """The rows of the complete lines after byte `offset`, and the bytes where these begin and end.

    They begin at 0 if the file has become shorter than `offset`: a run that resumes cuts its
    metrics back to the checkpoint. Reads at most `max_bytes` if that is not negative.
    """
    try:
        descriptor = atomic.open_regular(path)
    except FileNotFoundError:
        return [], 0, 0
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size < offset:
            offset = 0
        file.seek(offset)
        lines = file.read(max_bytes)
    # The last line may still be being written.
    end = lines.rfind(b"\n") + 1
    return parse_rows(lines[:end].splitlines()), offset, offset + end


def table(rows: Rows, key: str) -> np.ndarray:
    """Steps, tokens, seconds and the value `key` of the rows that have it, as `[N, 4]`."""
    values = [(row["step"], row.get("tokens", 0), row.get("seconds", 0), row[key])
              for row in rows if row.get(key) is not None]
    return np.array(values, dtype=float).reshape(-1, 4)


def thinned(points: np.ndarray) -> np.ndarray:
    """A curve of at most CURVE_POINTS of the points `[N, 4]`, each with the values up to it."""
    if not len(points):
        return np.empty((0, 6))
    # Each point of the curve stands for the points from its start up to the next start.
    starts = np.linspace(0, len(points), min(len(points), CURVE_POINTS), endpoint=False).astype(int)
    ends = np.append(starts[1:], len(points))
    values = points[:, 3]
    mean = np.add.reduceat(values, starts) / (ends - starts)
    lowest = np.minimum.reduceat(values, starts)
    highest = np.maximum.reduceat(values, starts)
    return np.column_stack((points[ends - 1, :3], mean, lowest, highest))
