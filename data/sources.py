"""Where documents come from. Each source yields texts and can say, without reading far, what it would yield.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, get_args, get_type_hints

import atomic
from data import files
from data.files import Document, File
from data.hub import Hub
from data.mixture import read_mix
from data.records import skipped_records
from data.separator import divide, unescaped
from data.store import data_root, sha256_of
from progress import ProgressBar
from setting import range_problems, setting
from terminal import say

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# The settings about reading files that a source has no use for.
UNUSED = dict.fromkeys(
    ("pydocs", "stdlib", "bin"), ("text_field", "on_bad_record", "encoding", "errors")
)
UNUSED["hub"] = ("encoding", "errors")


@dataclass(frozen=True)
class DataConfig:
    """The training text and its tokens."""

    source: Literal["pydocs", "stdlib", "shakespeare", "text", "hub", "bin"] = setting(
        "pydocs", "kind of the training text; presets (data=...) choose it"
    )
    path: str = setting(
        "", "text: a file, folder or glob; bin: the folder of the .bin files; shakespeare: a copy"
    )
    tokenizer: Literal["char", "byte", "gpt2", "cl100k_base", "o200k_base", "bpe"] = setting(
        "bpe", "bpe is trained on the text"
    )
    vocab_size: int = setting(2048, "number of tokens of tokenizer=bpe", ge=257, le=100_000)
    val_fraction: float = setting(0.1, "part of the text held out for validation", ge=1e-6, lt=1)
    val_path: str = setting("", "text to validate on instead: a file, folder or glob")
    val_split: str = setting("", "hub: the split to validate on instead, such as validation")
    deduplicate: bool = setting(True, "remove exact duplicates of documents")
    separator: str = setting(
        "", "text between two documents of a plain text file: <|endoftext|>, or \\n\\n"
    )
    text_field: str = setting("text", "the field of a record with its text; data.text: nested")
    on_bad_record: Literal["stop", "skip"] = setting("stop", "the reaction to records without text")
    encoding: str = setting("", "of text files without a byte order mark; empty: UTF-8")
    errors: Literal["strict", "replace"] = setting(
        "strict", "the reaction to bytes that cannot be decoded: stop, or use U+FFFD"
    )
    dtype: Literal["auto", "uint8", "uint16", "int16", "uint32", "int32", "uint64", "int64"] = (
        setting("auto", "bin: type of the tokens in files without a header")
    )
    hub_name: str = setting(
        "", "hub: OWNER/NAME of a dataset on the Hugging Face Hub, or a folder laid out like one"
    )
    hub_config: str = setting("", "hub: the dataset's configuration; empty: its default")
    hub_revision: str = setting("", "hub: branch, tag or commit; empty: the newest")
    split: str = setting("train", "hub: the split to train on, or several: train+validation")
    mix: str = setting("", "several sources with weights, such as 'pydocs:0.7 book.txt:0.3'")
    respect_documents: bool = setting(
        False, "attention does not cross document boundaries, and positions start at each"
    )

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from range_problems(self)
        if self.mix:
            yield from self.mix_problems()
        else:
            yield from self.path_problems()
        yield from self.validation_problems()
        yield from self.reading_problems()

    def mix_problems(self) -> Iterator[str]:
        try:
            names = read_mix(self.mix)
        except ValueError as error:
            yield f"mix={self.mix}: {error}"
            return
        if "bin" in names:
            yield f"mix={self.mix}: bin has tokens, and a mixture is made of text: leave it out."
        for name in names:
            for problem in self.part(name).path_problems():
                yield f"mix={self.mix}: {problem}"

    def path_problems(self) -> Iterator[str]:
        if self.source == "text" and not self.path:
            yield ("path is missing: name a text file, or a folder or glob of .txt, .md, .jsonl, "
                   ".csv or .parquet files, as in data.path=book.txt.")
        if self.source == "hub" and not self.hub_name:
            yield ("hub_name is missing: name a data set of the Hugging Face Hub, as in "
                   "data.hub_name=HuggingFaceFW/fineweb-edu, or a folder laid out like one.")
        if self.source == "bin" and not self.path:
            yield "path is missing: name the folder where train.bin and val.bin lie, as in data.path=nanoGPT/data/owt."
        yield from missing_path("path", self.path)

    def reading_problems(self) -> Iterator[str]:
        if self.encoding and not is_text_encoding(self.encoding):
            yield (f"encoding={self.encoding} is no text encoding that Python knows: use a name "
                   f"such as latin-1, cp1252, utf-16 or gb18030.")
        if not self.text_field:
            yield "text_field is empty: name the field of a record that holds its text."
        if self.dtype != "auto" and self.source != "bin":
            yield (f"dtype={self.dtype} is the type of tokens of data=bin, and data={self.source} "
                   f"has none: leave it out.")
        for name in () if self.mix else UNUSED.get(self.source, ()):
            if getattr(self, name) != getattr(DataConfig, name):
                yield (f"{name}={getattr(self, name)} is for files of text, and "
                       f"data={self.source} reads none.")

    def validation_problems(self) -> Iterator[str]:
        for name in ("val_path", "val_split"):
            value = getattr(self, name)
            if value and self.mix:
                yield f"{name}={value} does not go with mix=: each part of a mixture is validated on its own text."
            elif value and self.source == "bin":
                yield f"{name}={value} does not go with data=bin, which brings its own validation tokens."
        if self.val_path and self.val_split:
            yield f"val_path={self.val_path} and val_split={self.val_split} exclude each other: choose one."
        if self.val_split and not self.mix and self.source not in ("hub", "bin"):
            yield f"val_split={self.val_split} names a split of a data set of data=hub: use val_path= for files."
        yield from missing_path("val_path", self.val_path)
        if self.separator and not self.mix and self.source not in ("text", "shakespeare"):
            yield f"separator={self.separator} divides plain text files, and data={self.source} has none: leave it out."

    def part(self, name: str) -> DataConfig:
        """The settings of one part of the mixture: a source by its name, else files by their path."""
        if name in get_args(get_type_hints(DataConfig)["source"]):
            return replace(self, mix="", source=name)
        return replace(self, mix="", source="text", path=name)

    def weights(self) -> list[int]:
        """How many sequences of a period each source gives."""
        return list(read_mix(self.mix).values()) if self.mix else [1]


def missing_path(setting: str, path: str) -> Iterator[str]:
    """The sentence about a path that does not exist; of a glob, that is known when it is read."""
    place = Path(expanded(path))
    if path and place.is_symlink() and not place.exists():
        yield f"{setting}={path} {files.unreadable(place)}."
    elif path and not place.exists() and not set(path) & set("*?["):
        yield f"{setting}={path} does not exist: check the spelling, and that it is relative to {Path.cwd()}."


def is_text_encoding(name: str) -> bool:
    """Whether Python can decode files in an encoding of this name, block by block."""
    try:
        codecs.getincrementaldecoder(name)
        return isinstance("a".encode(name).decode(name), str)
    except (LookupError, ValueError):
        return False


def expanded(path: str) -> str:
    """`path` with the user's home folder in place of ~; unchanged where there is no such user."""
    return os.path.expanduser(path)


class Source(Protocol):
    """Where documents come from; they can be read again and again."""

    def fingerprint(self) -> str: ...
    def documents(self) -> Iterator[Document]: ...
    def fraction(self) -> float: ...  # how far the reading has come, from 0 to 1; 0 where nobody knows
    def description(self) -> str: ...  # how many files there are, and which are left out


def open_source(config: DataConfig) -> Source:
    """The source that `config` names. Downloads where that is what it takes."""
    if config.source == "pydocs":
        return PyDocs()
    if config.source == "stdlib":
        return StdLib()
    if config.source == "hub":
        return Hub(config.hub_name, config.hub_config, config.split, config.text_field, config.hub_revision,
                   data_root() / "hub", config.on_bad_record)
    path = config.path
    if config.source == "shakespeare" and not path:
        path = str(fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256))
    return Files(path, config.text_field, config.errors, config.separator, config.encoding,
                 config.on_bad_record)


def open_validation(config: DataConfig) -> Source | None:
    """The source of the text to validate on, where it is not a part of the training text."""
    if config.val_path:
        return open_source(replace(config, source="text", path=config.val_path))
    if config.val_split:
        return open_source(replace(config, split=config.val_split))
    return None


def open_sources(config: DataConfig) -> dict[str, Source]:
    """The sources that `config` names, by name: one, or the parts of a mixture."""
    if config.mix:
        sources = {name: open_source(config.part(name)) for name in read_mix(config.mix)}
    else:
        sources = {config.source: open_source(config)}
    if config.separator and not any(isinstance(source, Files) and source.has_plain_text() for source in sources.values()):
        raise ValueError(f"data.separator={config.separator} divides plain text, and {config.mix or config.path} holds "
                         f"only records: leave it out.")
    has_records = any(map(reads_records, sources.values())) or config.val_path
    if config.text_field != DataConfig.text_field and not has_records:
        raise ValueError(
            f"data.text_field={config.text_field} names a field of records, and "
            f"{config.mix or config.path} holds none, only plain text: leave it out, or give files "
            f"of records one of the endings {', '.join(files.RECORDS)}."
        )
    return sources


def reads_records(source: Source) -> bool:
    return isinstance(source, Hub) or (isinstance(source, Files) and source.has_records())


def library_files(library: Path | None = None) -> tuple[Path, list[Path]]:
    """The folder of the standard library, and its files without tests and what was installed beside it."""
    folder = library or Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    paths: list[Path] = []
    for parent, inner, names in os.walk(folder):
        inner[:] = set(inner) - skipped  # not even looked into: what is installed is many times as much
        paths += (Path(parent, name) for name in names if name.endswith(".py"))
    return folder, sorted(paths)


def library_fingerprint(kind: str, folder: Path, paths: list[Path]) -> str:
    """Changes with the Python version, and with the name or any byte of a file; 12 MB are read in 25 ms."""
    digest = hashlib.sha256(f"{kind} {platform.python_version()}\n".encode())
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


class PyDocs:
    """The English inside every Python: the language reference of `pydoc_data`, and all docstrings.

    Read with `ast`, never by importing. It varies with the Python version, so figures name that.
    """

    def __init__(self, library: Path | None = None) -> None:
        self.stdlib, self.files = library_files(library)

    def fingerprint(self) -> str:
        """Changes with the Python version, and with the name or any byte of a file."""
        return library_fingerprint("pydocs", self.stdlib, self.files)

    def documents(self) -> Iterator[Document]:
        yield from map(Document.of, self.texts)

    def fraction(self) -> float:
        return 0.0

    def description(self) -> str:
        return f"{len(self.files):,} files of Python's standard library"

    @cached_property
    def texts(self) -> list[str]:
        """All of them, about 2 MB: parsing takes seconds, so it is done once."""
        texts: list[str] = []
        for path in ProgressBar(self.files, "Reading the standard library", unit="files", leave=False):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # a template or an example of broken code: nothing to read
            if path.relative_to(self.stdlib).as_posix() == "pydoc_data/topics.py":
                texts.extend(self.topics(tree))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    texts.append(ast.get_docstring(node) or "")
        return [text for text in texts if text.strip()]

    @staticmethod
    def topics(tree: ast.Module) -> Iterator[str]:
        """The values of the dictionary of help topics, `topics = {...}`."""
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                yield from ast.literal_eval(node.value).values()


class StdLib:
    """The source code of Python's standard library, about 12 MB, each file a document: code to learn, without a download."""

    def __init__(self, library: Path | None = None) -> None:
        self.stdlib, self.files = library_files(library)

    def fingerprint(self) -> str:
        """Changes with the Python version, and with the name or any byte of a file."""
        return library_fingerprint("stdlib", self.stdlib, self.files)

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            text = path.read_bytes().decode("utf-8", "replace")
            if text.strip():
                yield Document.of(text)

    def fraction(self) -> float:
        return 0.0

    def description(self) -> str:
        return f"{len(self.files):,} files of Python's standard library"


class Files:
    """What `data.path` names: a file, a folder, or a glob. `data/files.py` says what is a document in it."""

    def __init__(self, path: str, text_field: str = "text", errors: str = "strict", separator: str = "",
                 encoding: str = "", on_bad_record: str = "stop") -> None:
        self.skipped: Counter[str] = Counter()
        self.files = [File(one, text_field, errors, encoding, on_bad_record)
                      for one in files.find(expanded(path), self.skipped)]
        self.separator = unescaped(separator)
        # Newer settings are left out at their defaults, so that they do not change old fingerprints.
        self.read_as = f"files {text_field} {errors}" + (f" {self.separator!r}" if separator else "")
        if encoding or on_bad_record != "stop":
            self.read_as += f" {encoding} {on_bad_record}"
        self.sizes = [file.path.stat().st_size for file in self.files]
        self.total = sum(self.sizes)
        self.reading = 0  # the index of the file that is read now
        self.read_before = 0  # bytes of the files before it

    def fingerprint(self) -> str:
        """Changes with any byte of any file, and with what is read of them."""
        digest = hashlib.sha256(self.read_as.encode())
        for file, sha256 in zip(self.files, sha256_of([file.path for file in self.files]), strict=True):
            digest.update(file.kind.encode() + bytes.fromhex(sha256))
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        before = 0
        for number, file in enumerate(self.files):
            self.reading, self.read_before = number, before
            if self.separator and file.kind == "text":
                yield from divide(file.text_pieces, self.separator)
            else:
                yield from file.documents()
            before += self.sizes[number]

    def fraction(self) -> float:
        return (self.read_before + self.files[self.reading].position()) / max(1, self.total)

    def has_plain_text(self) -> bool:
        return any(file.kind == "text" for file in self.files)

    def has_records(self) -> bool:
        return any(file.kind != "text" for file in self.files)

    def description(self) -> str:
        said = f"{len(self.files):,} files" if len(self.files) != 1 else "1 file"
        skipped = f" ({files.skipped_files(self.skipped)})" if self.skipped else ""
        return said + skipped + skipped_records(sum(file.bad_records for file in self.files))


def fetch(url: str, sha256: str) -> Path:
    """Download a file once and check what arrived; return where it lies.

    Raises ValueError, saying where to put the file by hand, if it cannot be had or is not the one meant.
    """
    path = data_root() / "downloads" / f"{sha256[:8]}-{url.rsplit('/', 1)[-1]}"
    by_hand = f"Download {url} yourself and put it at {path}, or name your copy with data.path=FILE."
    if not path.exists():
        say(f"Downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"No download of {url}: {getattr(error, 'reason', error)}. {by_hand}") from None
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise ValueError(f"{url} holds another file than expected "
                             f"(sha256 {found[:12]}..., not {sha256[:12]}...). {by_hand}")
        atomic.write_bytes(path, content)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged (its sha256 is not {sha256[:12]}...): delete it to download it again.")
    return path
