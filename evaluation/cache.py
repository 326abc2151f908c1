"""The results so far in a file, so that an evaluation that was interrupted resumes."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import atomic


class ResultCache:
    """Results of one model by their keys: scores, losses or texts. Without a path, in memory only.

    A line of the file has a key, a hash of the weights, the precision and what was read, and the
    result as JSON.
    """

    def __init__(self, path: Path | None = None, model: str = "") -> None:
        self.model = model
        self.results: dict[str, Any] = {}
        self.file = None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = atomic.LineFile(path)
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, TypeError, RecursionError):
                    key, result = json.loads(line)
                    self.results[key] = result

    def key(self, *parts: Any) -> str:
        """The key of the result for `parts`, whose texts differ if they do."""
        return hashlib.sha256(f"{self.model} {parts}".encode()).hexdigest()[:24]

    def add(self, key: str, result: Any) -> None:
        self.results[key] = result
        if self.file:
            self.file.add(json.dumps([key, result]))
