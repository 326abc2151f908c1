"""The results of an evaluation, kept in a file so that an interrupted one resumes."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import atomic


class ResultCache:
    """Results of one model by their keys: scores, losses or texts. Without a path, in memory only.

    An evaluation that was interrupted resumes from those in a file. A line of it has a key, a hash
    of the weights, the precision and what was read; the result; and a checksum of both.
    """

    def __init__(self, path: Path | None = None, model: str = "") -> None:
        self.model = model
        self.results: dict[str, Any] = {}
        self.file = None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = atomic.LineFile(path)
            for line in path.read_bytes().splitlines():
                # What is damaged is computed again.
                with suppress(ValueError, TypeError, RecursionError):
                    key, result, checksum = json.loads(line)
                    if checksum == self.checksum(key, result):
                        self.results[key] = result

    def key(self, *parts: Any) -> str:
        """The key of the result for `parts`, whose texts differ if they do."""
        return hashlib.sha256(f"{self.model} {parts}".encode()).hexdigest()[:24]

    def checksum(self, key: str, result: Any) -> str:
        return self.key(key, json.dumps(result))

    def add(self, key: str, result: Any) -> None:
        self.results[key] = result
        if self.file:
            self.file.add(json.dumps([key, result, self.checksum(key, result)]))
