"""The settings of the training text and its tokens. Opens no file but to see that it exists."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from data import files
from data.mixture import read_mix
from setting import FilePath, range_problems, setting

TOKENIZERS = ("char", "byte", "gpt2", "cl100k_base", "o200k_base", "bpe")

# Files of conversations.
JSON = (".jsonl", ".jsonlines", ".ndjson", ".json")

# Encodings of Python that no file of text has, or whose decoders can give surrogates.
ESCAPES = ("idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7")

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
        if codecs.lookup(name).name in ESCAPES:
            return False
        return isinstance("a".encode(name).decode(name), str)
    except (LookupError, ValueError):
        return False


def expanded(path: str) -> str:
    """`path` with the user's home folder in place of ~."""
    return os.path.expanduser(path)
