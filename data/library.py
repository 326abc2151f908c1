"""Text that every Python comes with: the documentation and the code of its standard library.

Read as files and never imported. It varies with the Python version, so results name that.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from data.document import Document
from progress import ProgressBar

# Tests, and folders of packages that were installed later.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Library:
    """A source that reads the standard library, or the Python files in another `folder`."""

    kind: str

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(sysconfig.get_paths()["stdlib"])
        self.files: list[Path] = []
        for parent, subfolders, names in os.walk(self.folder):
            subfolders[:] = set(subfolders) - SKIPPED
            self.files += [Path(parent, name) for name in names if name.endswith(".py")]
        # The order in a folder depends on the file system.
        self.files.sort()

    def fingerprint(self) -> str:
        """Changes with the Python version, and with the name or any byte of a file."""
        # Reading all of it, 12 MB, takes 25 ms.
        digest = hashlib.sha256(f"{self.kind} {platform.python_version()}\n".encode())
        for path in self.files:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(self.folder)} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    def fraction(self) -> float:
        return 0.0

    def description(self) -> str:
        return f"{len(self.files):,} files of Python's standard library"


class PyDocs(Library):
    """The language reference in `pydoc_data`, and all docstrings."""

    kind = "pydocs"

    def documents(self) -> Iterator[Document]:
        yield from map(Document.of, self.texts)

    @cached_property
    def texts(self) -> list[str]:
        """All of them, about 2 MB. Parsing takes seconds, so it is done once."""
        texts: list[str] = []
        for path in ProgressBar(self.files, "Reading the standard library", unit="files",
                                leave=False):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                # A template, or an example of broken code.
                continue
            # The help topics are the values of the dictionary in `topics = {...}`.
            if path.relative_to(self.folder).as_posix() == "pydoc_data/topics.py":
                for node in tree.body:
                    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                        texts += ast.literal_eval(node.value).values()
            # The docstrings of the module, and of its classes and functions.
            for node in ast.walk(tree):
                if isinstance(node, WITH_DOCSTRING):
                    texts.append(ast.get_docstring(node) or "")
        return [text for text in texts if text.strip()]


class StdLib(Library):
    """The source code, about 12 MB. Each file is a document."""

    kind = "stdlib"

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            text = path.read_bytes().decode("utf-8", "replace")
            if text.strip():
                yield Document.of(text)
