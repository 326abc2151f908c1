"""The sources of documents, and the files that they read.

Knows files and text; knows no tokens.
"""

import ast
import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import atomic
from data.chat import read_conversation
from data.config import DataConfig, read_mix
from data.document import Document, divide, unescaped
from data.files import File, find, skipped_files
from data.hub import Hub
from data.records import JSON_SUFFIXES, SUFFIXES, skipped_records
from data.store import data_root, sha256_of
from progress import ProgressBar
from terminal import counted, say

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Tests, and folders of packages that were installed later.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Source(Protocol):
    """An origin of documents that can be read again and again."""

    def fingerprint(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...

    def fraction(self) -> float:
        """The fraction that has been read, from 0 to 1; 0 where the size is unknown."""

    def description(self) -> str:
        """The number of files, and what was skipped in the latest reading."""


def open_source(config: DataConfig) -> Source:
    """The source that `config` names, which may be downloaded."""
    match config.source:
        case "pydocs":
            return PyDocs()
        case "stdlib":
            return StdLib()
        case "hub":
            return Hub(config)
        case "shakespeare" if not config.path:
            return Files(str(fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256)), config)
    return Files(config.path, config)


def open_validation(config: DataConfig) -> Source | None:
    """The source of the validation text, or None if it is a part of the training text."""
    if config.val_path:
        source = "chat" if config.source == "chat" else "text"
        return open_source(replace(config, source=source, path=config.val_path))
    if config.val_split:
        return open_source(replace(config, split=config.val_split))
    return None


def open_sources(config: DataConfig) -> dict[str, Source]:
    """The source that `config` names, or the parts of a mixture, by name.

    Raises ValueError for a setting that no file uses.
    """
    if config.mix:
        sources = {name: open_source(config.part(name)) for name in read_mix(config.mix)}
    else:
        sources = {config.source: open_source(config)}

    # Settings that DataConfig cannot check, because it does not know the files.
    place = config.mix or config.path
    kinds = set(chain.from_iterable(map(kinds_of, sources.values())))
    if config.separator and "text" not in kinds:
        raise ValueError(f"data.separator={config.separator} divides plain text, and {place} holds "
                         f"only records: leave it out.")
    has_records = kinds - {"text"} or config.val_path
    if config.text_field != DataConfig.text_field and not has_records:
        raise ValueError(f"data.text_field={config.text_field} names a field of records, and "
                         f"{place} holds only plain text: leave it out, or give files of records "
                         f"one of the extensions {', '.join(SUFFIXES)}.")
    return sources


def kinds_of(source: Source) -> set[str]:
    """The kinds of files in a source whose reading has settings."""
    if isinstance(source, Files):
        return {file.kind for file in source.files}
    return {"hub"} if isinstance(source, Hub) else set()


class Files:
    """A file, a folder or a glob, with documents as described in data/files.py.

    Of conversations, other files than JSON are skipped. Raises ValueError if there is no file.
    """

    def __init__(self, path: str, config: DataConfig = DataConfig()) -> None:
        self.skipped: Counter[str] = Counter()
        paths = find(path, self.skipped)

        # Only JSON can hold conversations.
        read = read_conversation if config.source == "chat" else None
        self.files = []
        for one in paths:
            file = File(one, config.text_field, config.errors, config.encoding,
                        config.on_bad_record, read)
            if read and file.kind not in JSON_SUFFIXES:
                self.skipped[one.suffix.lower()] += 1
            else:
                self.files.append(file)
        if not self.files:
            suffixes = ", ".join(JSON_SUFFIXES)
            raise ValueError(f"{path} has no {suffixes} files, which data=chat reads.")
        self.separator = unescaped(config.separator)

        # Newer settings are left out at their defaults, so that old fingerprints stay valid.
        kind = "chat" if read else f"files {config.text_field}"
        self.settings = f"{kind} {config.errors}"
        if self.separator:
            self.settings += f" {self.separator!r}"
        if config.encoding or config.on_bad_record != "stop":
            self.settings += f" {config.encoding} {config.on_bad_record}"

        # For the progress of reading: the bytes in all files, and in those before the current one.
        self.total = sum(file.path.stat().st_size for file in self.files)
        self.current, self.read_before = self.files[0], 0

    def fingerprint(self) -> str:
        """Changes with any byte of any file, and with the settings that change its documents."""
        digest = hashlib.sha256(self.settings.encode())
        hashes = sha256_of([file.path for file in self.files])
        for file, sha256 in zip(self.files, hashes, strict=True):
            digest.update(file.kind.encode() + bytes.fromhex(sha256))
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        n_read = 0
        for file in self.files:
            self.current, self.read_before = file, n_read
            if self.separator and file.kind == "text":
                yield from divide(file.text_pieces, self.separator)
            else:
                yield from file.documents()
            n_read += file.position()

    def fraction(self) -> float:
        return (self.read_before + self.current.position()) / max(1, self.total)

    def description(self) -> str:
        text = counted(len(self.files), "file")
        if self.skipped:
            text += f" ({skipped_files(self.skipped)})"
        return text + skipped_records(sum(file.bad_records for file in self.files))


# Text that every Python comes with, which varies with its version. It is read and never imported.


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


def fetch(url: str, sha256: str) -> Path:
    """Download a file once, check it, and return its path.

    Raises ValueError, which says where to put the file by hand, if the download fails or has
    another hash.
    """
    # A copy that was downloaded before, or put there by hand.
    path = data_root() / "downloads" / f"{sha256[:8]}-{url.rsplit('/', 1)[-1]}"
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is damaged: delete it, and it is downloaded again.")
        return path

    say(f"Downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
        # It must be the text that others report losses on.
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise OSError(f"its sha256 is {found[:12]}..., not {sha256[:12]}...")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url} could not be downloaded ({reason}). Download it yourself and put "
                         f"it at {path}, or name your copy with data.path=FILE.") from None
    atomic.write_bytes(path, content)
    return path
