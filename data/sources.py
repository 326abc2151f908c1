"""The sources of documents, the settings that choose one, and the files that they read.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import http.client
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, get_args, get_type_hints

import atomic
from data import files
from data.chat import read_conversation
from data.files import Document, File
from data.hub import Hub
from data.library import PyDocs, StdLib
from data.mixture import read_mix
from data.records import skipped_records
from data.separator import divide, unescaped
from data.store import data_root, sha256_of
from setting import FilePath, range_problems, setting
from terminal import counted, say

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKENIZERS = ("char", "byte", "gpt2", "cl100k_base", "o200k_base", "bpe")

# Files of conversations.
JSON = (".jsonl", ".ndjson", ".json")

# The settings of text files that a source does not use.
UNUSED = dict.fromkeys(
    ("pydocs", "stdlib", "bin"), ("text_field", "on_bad_record", "encoding", "errors")
)
UNUSED["hub"] = ("encoding", "errors")
UNUSED["chat"] = ("text_field",)


@dataclass(frozen=True)
class DataConfig:
    """The training text and its tokens."""

    source: Literal["pydocs", "stdlib", "shakespeare", "text", "chat", "hub", "bin"] = setting(
        "pydocs", "kind of the training text; presets (data=...) choose it"
    )
    path: str = setting(
        "",
        "text, chat: a file, folder or glob; bin: the folder of the .bin files; shakespeare: a "
        "copy",
    )
    tokenizer: FilePath = setting(
        "bpe",
        f"{', '.join(TOKENIZERS)} (which is trained on the text), the path of a tokenizer.json, or "
        "that of a run",
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
        if self.tokenizer not in TOKENIZERS and not Path(self.tokenizer).exists():
            yield (
                f"tokenizer={self.tokenizer} is not one of {', '.join(TOKENIZERS)}, and there is "
                f"no such file or folder in {Path.cwd()}."
            )

    def mix_problems(self) -> Iterator[str]:
        try:
            names = read_mix(self.mix)
        except ValueError as error:
            yield f"mix={self.mix}: {error}"
            return
        for name, has in {"bin": "tokens", "chat": "conversations"}.items():
            if name in names:
                yield (
                    f"mix={self.mix}: {name} has {has}, and a mixture is made of text: leave it "
                    f"out."
                )
        for name in names:
            for problem in self.part(name).path_problems():
                yield f"mix={self.mix}: {problem}"

    def path_problems(self) -> Iterator[str]:
        if self.source == "text" and not self.path:
            yield (
                "path is missing: name a text file, or a folder or glob of .txt, .md, .jsonl, "
                ".csv or .parquet files, as in data.path=book.txt."
            )
        if self.source == "chat" and not self.path:
            yield (
                "path is missing: name a .jsonl file of conversations, or a folder or glob of such "
                "files, as in data.path=examples.jsonl."
            )
        if self.source == "hub" and not self.hub_name:
            yield (
                "hub_name is missing: name a dataset of the Hugging Face Hub, as in "
                "data.hub_name=HuggingFaceFW/fineweb-edu, or a folder with the same layout."
            )
        if self.source == "bin" and not self.path:
            yield (
                "path is missing: name the folder where train.bin and val.bin are, as in "
                "data.path=nanoGPT/data/owt."
            )
        yield from missing_path("path", self.path)

    def reading_problems(self) -> Iterator[str]:
        if self.encoding and not is_text_encoding(self.encoding):
            yield (
                f"encoding={self.encoding} is not a text encoding of Python: use a name such as "
                f"latin-1, cp1252, utf-16 or gb18030."
            )
        if not self.text_field:
            yield "text_field is empty: name the field of a record that holds its text."
        if self.dtype != "auto" and self.source != "bin":
            yield (
                f"dtype={self.dtype} is the type of tokens of data=bin, and data={self.source} has "
                f"none: leave it out."
            )
        if self.mix:
            return
        for name in UNUSED.get(self.source, ()):
            value = getattr(self, name)
            if value != getattr(DataConfig, name):
                yield f"{name}={value} is for files of text, and data={self.source} reads none."
        if self.separator and self.source not in ("text", "shakespeare"):
            yield (
                f"separator={self.separator} divides plain text files, and data={self.source} has "
                f"none: leave it out."
            )

    def validation_problems(self) -> Iterator[str]:
        for name in ("val_path", "val_split"):
            value = getattr(self, name)
            if value and self.mix:
                yield (
                    f"{name}={value} cannot be used with mix=: each part of a mixture is validated "
                    f"on its own text."
                )
            elif value and self.source == "bin":
                yield (
                    f"{name}={value} cannot be used with data=bin, which has its own validation "
                    f"tokens."
                )
        if self.val_path and self.val_split:
            yield (
                f"val_path={self.val_path} and val_split={self.val_split} exclude each other: "
                f"choose one."
            )
        if self.val_split and not self.mix and self.source not in ("hub", "bin"):
            yield (
                f"val_split={self.val_split} names a split of a dataset of data=hub: use val_path= "
                f"for files."
            )
        yield from missing_path("val_path", self.val_path)

    def part(self, name: str) -> DataConfig:
        """The settings of one part of a mixture: the source of that name, or else its files."""
        if name in get_args(get_type_hints(DataConfig)["source"]):
            return replace(self, mix="", source=name)
        return replace(self, mix="", source="text", path=name)

    def weights(self) -> list[int]:
        """The number of sequences of each source in a period."""
        return list(read_mix(self.mix).values()) if self.mix else [1]


def missing_path(setting: str, path: str) -> Iterator[str]:
    """The problem of a path that does not exist. A glob is checked when it is read."""
    place = Path(expanded(path))
    if not path or place.exists():
        return
    if place.is_symlink():
        yield f"{setting}={path} {files.unreadable(place)}."
    elif not set(path) & set("*?["):
        yield (
            f"{setting}={path} does not exist: check the spelling, and that it is relative to "
            f"{Path.cwd()}."
        )


def is_text_encoding(name: str) -> bool:
    """Whether Python can decode text in an encoding of this name, block by block."""
    try:
        codecs.getincrementaldecoder(name)
        return isinstance("a".encode(name).decode(name), str)
    except (LookupError, ValueError):
        return False


def expanded(path: str) -> str:
    """`path` with the user's home folder in place of ~."""
    return os.path.expanduser(path)


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
    if config.source == "pydocs":
        return PyDocs()
    if config.source == "stdlib":
        return StdLib()
    if config.source == "hub":
        return Hub(config)
    path = config.path
    if config.source == "shakespeare" and not path:
        path = str(fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256))
    return Files(path, config)


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
    place = config.mix or config.path
    kinds = {kind for source in sources.values() for kind in kinds_of(source)}
    if config.separator and "text" not in kinds:
        raise ValueError(
            f"data.separator={config.separator} divides plain text, and {place} holds only "
            f"records: leave it out."
        )
    has_records = kinds - {"text"} or config.val_path
    if config.text_field != DataConfig.text_field and not has_records:
        raise ValueError(
            f"data.text_field={config.text_field} names a field of records, and {place} holds "
            f"only plain text: leave it out, or give files of records one of the extensions "
            f"{', '.join(files.RECORDS)}."
        )
    return sources


def kinds_of(source: Source) -> set[str]:
    """The kinds of files in a source whose reading has settings."""
    if isinstance(source, Hub):
        return {"hub"}
    return {file.kind for file in source.files} if isinstance(source, Files) else set()


class Files:
    """A file, a folder or a glob, with documents as described in data/files.py.

    Of conversations, other files than JSON are skipped. Raises ValueError if there is no file.
    """

    def __init__(self, path: str, config: DataConfig = DataConfig()) -> None:
        self.skipped: Counter[str] = Counter()
        paths = files.find(expanded(path), self.skipped)
        text_field, errors, encoding = config.text_field, config.errors, config.encoding
        on_bad_record = config.on_bad_record
        read = read_conversation if config.source == "chat" else None
        self.files = []
        for one in paths:
            file = File(one, text_field, errors, encoding, on_bad_record, read)
            if read and file.kind not in JSON:
                self.skipped[one.suffix.lower()] += 1
            else:
                self.files.append(file)
        if not self.files:
            raise ValueError(
                f"{path} has no conversations: data=chat reads {', '.join(JSON)}, also compressed."
            )
        self.separator = unescaped(config.separator)
        # Newer settings are left out at their defaults, so that old fingerprints stay valid.
        self.settings = f"files {text_field} {errors}"
        if read:
            self.settings = f"chat {errors}"
        if self.separator:
            self.settings += f" {self.separator!r}"
        if encoding or on_bad_record != "stop":
            self.settings += f" {encoding} {on_bad_record}"
        self.sizes = [file.path.stat().st_size for file in self.files]
        self.total = sum(self.sizes)
        self.current = self.files[0]
        self.read_before = 0  # bytes in the files before the current one

    def fingerprint(self) -> str:
        """Changes with any byte of any file, and with the settings that change its documents."""
        digest = hashlib.sha256(self.settings.encode())
        hashes = sha256_of([file.path for file in self.files])
        for file, sha256 in zip(self.files, hashes, strict=True):
            digest.update(file.kind.encode() + bytes.fromhex(sha256))
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            self.current, self.read_before = file, before
            if self.separator and file.kind == "text":
                yield from divide(file.text_pieces, self.separator)
            else:
                yield from file.documents()
            before += size

    def fraction(self) -> float:
        return (self.read_before + self.current.position()) / max(1, self.total)

    def description(self) -> str:
        text = counted(len(self.files), "file")
        if self.skipped:
            text += f" ({files.skipped_files(self.skipped)})"
        return text + skipped_records(sum(file.bad_records for file in self.files))


def fetch(url: str, sha256: str) -> Path:
    """Download a file once, check it, and return its path.

    Raises ValueError, which says where to put the file by hand, if the download fails or has
    another hash.
    """
    path = data_root() / "downloads" / f"{sha256[:8]}-{url.rsplit('/', 1)[-1]}"
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(
                f"{path} is damaged (its sha256 is not {sha256[:12]}...): delete it to download "
                f"it again."
            )
        return path
    advice = f"Download it yourself and put it at {path}, or name your copy with data.path=FILE."
    say(f"Downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url} could not be downloaded ({reason}). {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{url} has changed: its sha256 is {found[:12]}..., not {sha256[:12]}.... {advice}"
        )
    atomic.write_bytes(path, content)
    return path
