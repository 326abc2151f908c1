"""The settings of the training text and its tokens. Opens no file but to see that it exists."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from data.files import unreadable
from setting import FilePath, SettingsBase, expanded, setting

TOKENIZERS = ("char", "byte", "gpt2", "cl100k_base", "o200k_base", "bpe")

# Encodings of Python that no file of text has, or whose decoders can give surrogates.
ESCAPES = ("idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7")

# The types of the tokens in a .bin file.
TokenType = Literal["auto", "uint8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]

# Of a mixture.
LONGEST_PERIOD = 10_000  # sequences; weights with four digits
EXAMPLE = "write SOURCE:WEIGHT, as in pydocs:0.7 book.txt:0.3"

# What to give as the `path`, or as the `hub_name`, of the sources that need one.
NEEDED = {
    "text": "name a file, or a folder or glob of .txt, .md, .jsonl, .csv or .parquet files",
    "chat": "name a .jsonl file of conversations, or a folder or glob of such files",
    "bin": "name the folder where train.bin and val.bin are, as in data.path=nanoGPT/data/owt",
    "hub": "name a dataset of the Hugging Face Hub, OWNER/NAME, or a folder with that layout"}

# The sources that use each of these settings; all sources use the other settings.
FILES, RECORDS = ("text", "chat", "shakespeare"), ("text", "hub", "shakespeare")
USED_BY = {
    "path": (*FILES, "bin"), "val_path": (*FILES, "hub", "pydocs", "stdlib"),
    "separator": ("text", "shakespeare"), "text_field": RECORDS,
    "on_bad_record": (*RECORDS, "chat"), "encoding": FILES, "errors": FILES, "dtype": ("bin",),
    "hub_name": ("hub",), "hub_config": ("hub",), "hub_revision": ("hub",), "split": ("hub",),
    "val_split": ("hub",)}


@dataclass(frozen=True)
class DataConfig(SettingsBase):
    """The training text and its tokens."""

    source: Literal["pydocs", "stdlib", "shakespeare", "text", "chat", "hub", "bin"] = setting(
        "pydocs", "kind of the training text; presets (data=...) choose it")
    path: FilePath = setting(
        "", "text, chat: a file, folder or glob; bin: a folder of .bin files; shakespeare: a copy")
    tokenizer: FilePath = setting(
        "bpe", f"{', '.join(TOKENIZERS)}, or the path of a tokenizer.json or of a run")
    vocab_size: int = setting(2048, "number of tokens of tokenizer=bpe", ge=257, le=100_000)
    val_fraction: float = setting(0.1, "part of the text held out for validation", ge=1e-6, lt=1)
    val_path: FilePath = setting("", "text to validate on instead: a file, folder or glob")
    val_split: str = setting("", "hub: the split to validate on instead, such as validation")
    deduplicate: bool = setting(True, "remove exact duplicates of documents")
    separator: str = setting("", "text between documents of plain text: <|endoftext|>, or \\n\\n")
    text_field: str = setting("text", "the field of a record with its text; data.text: nested")
    on_bad_record: Literal["stop", "skip"] = setting("stop", "the reaction to records without text")
    encoding: str = setting("", "of text files without a byte order mark; empty: UTF-8")
    errors: Literal["strict", "replace"] = setting("strict", "undecodable bytes: stop, or U+FFFD")
    dtype: TokenType = setting("auto", "bin: type of the tokens in files without a header")
    hub_name: FilePath = setting("", "hub: OWNER/NAME on the Hugging Face Hub, or a folder like it")
    hub_config: str = setting("", "hub: the dataset's configuration; empty: its default")
    hub_revision: str = setting("", "hub: branch, tag or commit; empty: the newest")
    split: str = setting("train", "hub: the split to train on, or several: train+validation")
    mix: str = setting("", "several sources with weights, such as 'pydocs:0.7 book.txt:0.3'")
    respect_documents: bool = setting(False, "attention and positions stay within a document")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        # The source, or the parts of a mixture.
        if self.mix:
            yield from self.mix_problems()
        else:
            yield from self.path_problems()
            # A setting that the source does not use would be ignored silently.
            for name, sources in USED_BY.items():
                value = getattr(self, name)
                if self.source not in sources and value != getattr(DataConfig, name):
                    yield (f"{name}={value} is not used by data={self.source}, only by "
                           f"data={', '.join(sources)}: choose one of them, or leave it out.")
        # The validation text.
        if self.val_path and self.val_split:
            yield f"val_path={self.val_path} excludes val_split={self.val_split}: choose one."
        # How the text is read and encoded.
        if self.encoding and not is_text_encoding(self.encoding):
            yield (f"encoding={self.encoding} is not a text encoding of Python: use a name such as "
                   f"latin-1, cp1252, utf-16 or gb18030.")
        if not self.text_field:
            yield "text_field is empty: name the field of a record that holds its text."

    def missing_files(self) -> Iterator[str]:
        """One sentence for each path that cannot be read.

        A run that resumes may need none of them, because its tokens were prepared before.
        """
        parts, start = [self], ""
        if self.mix:
            parts, start = [], f"mix={self.mix}: "
            # `problems` reports an invalid mixture.
            with suppress(ValueError):
                parts = [self.part(name) for name in read_mix(self.mix)]
        paths = [(f"{start}path", part.path) for part in parts if part.source in USED_BY["path"]]
        for name, path in [*paths, ("val_path", self.val_path)]:
            reason = unreadable(Path(path)) if path else ""
            if reason:
                yield f"{name}={path} {reason}."
        if self.tokenizer not in TOKENIZERS and not Path(self.tokenizer).exists():
            yield (f"tokenizer={self.tokenizer} is not one of {', '.join(TOKENIZERS)}, and there "
                   f"is no such file or folder in {Path.cwd()}.")

    def mix_problems(self) -> Iterator[str]:
        # A mixture has no validation text of its own.
        for name in ("val_path", "val_split"):
            if getattr(self, name):
                yield (f"{name}={getattr(self, name)} cannot be used with mix=: each part of a "
                       f"mixture is validated on its own text.")
        try:
            names = read_mix(self.mix)
        except ValueError as error:
            yield f"mix={self.mix}: {error}"
            return
        # The parts must be text, whose settings are valid.
        problems = []
        for name in names:
            if name in ("bin", "chat"):
                has = "tokens" if name == "bin" else "conversations"
                problems.append(f"{name} has {has}, and a mixture is made of text: leave it out.")
            try:
                problems += self.part(name).path_problems()
            except ValueError as error:
                problems.append(f"{name} {error}.")
        yield from (f"mix={self.mix}: {problem}" for problem in problems)

    def path_problems(self) -> Iterator[str]:
        name = "hub_name" if self.source == "hub" else "path"
        if self.source in NEEDED and not getattr(self, name):
            yield f"{name} is missing: {NEEDED[self.source]}."

    def part(self, name: str) -> DataConfig:
        """The settings of one part of a mixture: the source of that name, or else its files."""
        if name in get_args(get_type_hints(DataConfig)["source"]):
            return replace(self, mix="", source=name)
        return replace(self, mix="", source="text", path=expanded(name))

    def weights(self) -> list[int]:
        """The number of sequences of each source in a period."""
        return list(read_mix(self.mix).values()) if self.mix else [1]


def is_text_encoding(name: str) -> bool:
    """Whether Python can decode text in an encoding of this name, block by block."""
    try:
        # Some codecs have no decoder of blocks, and others do not decode to text.
        codecs.getincrementaldecoder(name)
        is_text = isinstance("a".encode(name).decode(name), str)
        return is_text and codecs.lookup(name).name not in ESCAPES
    except (LookupError, ValueError):
        return False


def read_mix(mix: str) -> dict[str, int]:
    """The number of sequences of each source in a period.

    "pydocs:0.7 book.txt:0.3" gives {"pydocs": 7, "book.txt": 3}. Names with blanks are quoted as in
    a shell. Raises ValueError with one sentence for an invalid mixture.
    """
    # Read the weights as fractions, so that 0.7 and 0.3 are exactly 7 and 3 tenths.
    try:
        words = shlex.split(mix)
    except ValueError:
        raise ValueError(f"a quotation mark is not closed: {EXAMPLE}.") from None
    weights: dict[str, Fraction] = {}
    # A part is SOURCE:WEIGHT; its name may contain colons.
    for word in words:
        name, _, number = word.rpartition(":")
        try:
            # Fraction alone would compute all digits of 1e-999999999.
            weight = Fraction(number if "/" in number else str(float(number)))
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not name or weight <= 0:
            raise ValueError(f"{word} is not a source with its weight: {EXAMPLE}.")
        if name in weights:
            raise ValueError(f"{name} is given twice: give it one weight.")
        weights[name] = weight
    if not weights:
        raise ValueError(f"the mixture names no source: {EXAMPLE}.")

    # The smallest whole numbers with the same ratios.
    denominator = lcm(*(weight.denominator for weight in weights.values()))
    counts = {name: int(weight * denominator) for name, weight in weights.items()}
    divisor = gcd(*counts.values())
    period = sum(counts.values()) // divisor
    if period > LONGEST_PERIOD:
        raise ValueError(f"the weights repeat only after {period:,} sequences, at most "
                         f"{LONGEST_PERIOD:,} are supported: round them.")
    return {name: count // divisor for name, count in counts.items()}
