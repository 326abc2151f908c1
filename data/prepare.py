"""Prepare token shards from documents: made if missing, else checked.

The folder's name ends with a hash of everything that the tokens depend on. After a kill, the same
command resumes after the last complete segment and gives identical files.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import atomic
from data.bins import prepare_bins
from data.bpe import DISTINCT_BYTES, BPETokenizer, with_few_words
from data.chat import markers_of, with_markers
from data.config import TOKENIZERS, DataConfig
from data.corpus import Corpus
from data.document import SpecialToken
from data.encode import segments
from data.shards import (
    SPLITS,
    check,
    check_shards,
    checksum_of,
    prepare_again,
    read_meta,
    write_meta,
)
from data.sources import Files, Source, open_sources, open_validation
from data.store import BUILDING, data_root, folder_for, make_once, sha256_of
from data.tokenizer import CharTokenizer, Tokenizer
from data.tokenizer_json import find_tokenizer, fingerprint, open_tokenizer, read_tokenizer
from terminal import counted, say

SAMPLE_BYTES = 2**28  # from the start of the training split, to train a tokenizer
PROGRESS = "progress.json"  # lists the complete segments while tokens are being prepared
FORMAT = 3  # part of the recipe: increase it when the same source would give other tokens


def prepare(config: DataConfig) -> Path:
    """The folder of prepared tokens for `config`: made if it is missing, else checked.

    Raises ValueError for an invalid source and damaged tokens, OSError for a write error.
    """
    if config.source == "bin" and not config.mix:
        return prepare_bins(config.path, config.tokenizer, config.dtype)
    plan = planned(config)
    make_once(plan.folder, lambda building: build(building, plan, config))
    check(plan.folder, plan.recipe)
    tell_skipped(plan)
    return plan.folder


def tell_skipped(plan: Plan) -> None:
    """Print the number of skipped files, if it has changed since the tokens were made."""
    for source, part in zip(plan.sources.values(), read_meta(plan.folder)["parts"], strict=True):
        skipped = isinstance(source, Files) and source.skipped
        if skipped and source.description() not in part.get("read", ""):
            say(f"The text is the same as before, now in {source.description()}.")


def find_prepared(fingerprint: str) -> Path | None:
    """The folder of intact tokens whose fingerprint starts with `fingerprint`, if there is one."""
    for folder in sorted(data_root().glob("*-*-*")):
        if not fingerprint or folder.name.startswith(BUILDING):
            continue
        with suppress(ValueError, OSError):
            if read_meta(folder)["fingerprint"].startswith(fingerprint):
                check(folder, recipe={})
                return folder
    return None


class Plan(NamedTuple):
    """The folder for the tokens of a configuration, everything they depend on, and the sources."""

    folder: Path
    recipe: dict[str, Any]
    sources: dict[str, Source]
    validation: Source | None


def planned(config: DataConfig) -> Plan:
    """The sources of a configuration, and the folder for its tokens."""
    sources, validation = open_sources(config), open_validation(config)
    # A tokenizer in a file is known by its content, because the file may change or move.
    name, of_tokenizer = config.tokenizer, config.tokenizer
    if name not in TOKENIZERS:
        name, of_tokenizer = "file", f"file {sha256_of([find_tokenizer(name)])[0]}"
    # All that decides the tokens. Its hash is in the name of the folder.
    recipe = {"format": FORMAT,
              "sources": [source.fingerprint() for source in sources.values()],
              "validation": validation.fingerprint() if validation else None,
              "val_fraction": None if validation else config.val_fraction,
              "deduplicate": config.deduplicate,
              "tokenizer": of_tokenizer,
              "asked_vocab_size": config.vocab_size if config.tokenizer == "bpe" else None}
    folder = folder_for(f"{'mix' if config.mix else config.source}-{name}", recipe)
    return Plan(folder, recipe, sources, validation)


def build(building: Path, plan: Plan, config: DataConfig) -> None:
    """Make the tokenizer, the shards and `meta.json`; ValueError if a source changes meanwhile."""
    # Only the folder's last name was missing.
    if (building / "meta.json").exists():
        return

    # Divide each source into its splits.
    corpora = []
    for name, source in plan.sources.items():
        place = name if config.mix else config.path or name
        corpora.append(Corpus(source, config.val_fraction, plan.validation, config.deduplicate,
                              divisible=config.source != "chat", name=place))

    # Make the tokenizer, unless an earlier attempt has already encoded segments with it.
    done = read_progress(building)
    if done:
        tokenizer = read_tokenizer(building / "tokenizer.json")
    else:
        tokenizer = make_tokenizer(config, corpora)
        atomic.write_json(building / "tokenizer.json", tokenizer.to_json())
    made_with = fingerprint(tokenizer)

    # Encode the segments that are missing. Each one is noted when it is on the disk.
    title = f"Tokenizing {config.mix or config.source}"
    for segment in segments(corpora, tokenizer, building, len(done), title):
        done.append(segment | {"checksum": checksum_of(segment)})
        atomic.write_json(building / PROGRESS, {"tokenizer": made_with, "segments": done})

    # The tokens must be those of the recipe, so the sources must not have changed.
    now = [source.fingerprint() for source in plan.sources.values()]
    validation = plan.validation.fingerprint() if plan.validation else None
    if now != plan.recipe["sources"] or validation != plan.recipe["validation"]:
        raise ValueError(f"{config.mix or config.path or config.source} changed while it was being "
                         f"read: run the command again.")

    # The totals, and those of each part of a mixture.
    parts = []
    for number, (name, corpus) in enumerate(zip(plan.sources, corpora, strict=True)):
        own = [segment for segment in done if segment["part"] == number]
        parts.append({"source": name, "read": corpus.summary()})
        for split in SPLITS:
            shards = chain.from_iterable(segment[split]["shards"] for segment in own)
            parts[-1][split] = total(own, split) | {"shards": list(shards)}
    tokens = {"splits": {split: total(done, split) for split in SPLITS}, "parts": parts}
    write_meta(building, plan.recipe, made_with, tokenizer.vocab_size, tokens)
    (building / PROGRESS).unlink()


def read_progress(building: Path) -> list[dict[str, Any]]:
    """The segments that an earlier attempt completed, up to the first damaged one."""
    complete: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, LookupError, TypeError):
        progress = atomic.read_json(building / PROGRESS)
        if fingerprint(read_tokenizer(building / "tokenizer.json")) == progress["tokenizer"]:
            for segment in progress["segments"]:
                check_shards(building, [*segment["train"]["shards"], *segment["val"]["shards"]])
                if segment["number"] != len(complete):
                    break
                if segment["checksum"] != checksum_of(segment):
                    break
                complete.append(segment)
    return complete


def total(segments: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """The documents, bytes and tokens of one split in some segments."""
    counts = {}
    for name in ("documents", "bytes", "tokens"):
        counts[name] = sum(segment[split][name] for segment in segments)
    return counts | {"bytes_per_token": counts["bytes"] / max(1, counts["tokens"])}


def make_tokenizer(config: DataConfig, corpora: list[Corpus]) -> Tokenizer:
    """The tokenizer of `config`: `bpe` is trained on the training split, `char` knows both.

    That of conversations has the markers of messages.
    """
    if config.tokenizer == "bpe":
        samples = [corpus.training_text(SAMPLE_BYTES // len(corpora)) for corpus in corpora]
        if len(samples) > 1:
            # Each part of a mixture gets the same share of the different words.
            share = DISTINCT_BYTES // len(samples)
            samples = [with_few_words(sample, share) for sample in samples]
        tokenizer = BPETokenizer.train(chain.from_iterable(samples), config.vocab_size)
    elif config.tokenizer == "char":
        tokenizer = character_tokenizer(corpora)
    else:
        tokenizer = open_tokenizer(config.tokenizer)
    if config.source == "chat":
        tokenizer = with_markers(tokenizer)
        markers_of(tokenizer)  # which checks them
    return tokenizer


def character_tokenizer(corpora: list[Corpus]) -> CharTokenizer:
    """A tokenizer of the characters of both splits."""
    characters: set[str] = set()
    for corpus in corpora:
        with corpus.progress("Listing characters") as update:
            for piece in corpus.pieces():
                if not isinstance(piece.text, SpecialToken):
                    characters.update(piece.text)
                update()
    several = len(corpora) > 1 or corpora[0].has_boundaries
    return CharTokenizer("".join(sorted(characters)), with_end_of_text=several)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of prepared tokens. Raises ValueError if it is not the one that made them."""
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer(path)
    found, expected = fingerprint(tokenizer), read_meta(folder)["tokenizer_fingerprint"]
    if found != expected:
        raise ValueError(f"{path} did not make the tokens beside it (its fingerprint is "
                         f"{found[:12]}, expected {expected[:12]}): {prepare_again(folder)}")
    return tokenizer


def val_bytes_per_token(folder: Path, weights: list[int]) -> float:
    """The mean bytes per validation token; in a mixture, weighted by part."""
    means = [part["val"]["bytes_per_token"] for part in read_meta(folder)["parts"]]
    return fmean(means, weights)


def describe(folder: Path) -> str:
    """One line about prepared tokens."""
    meta = read_meta(folder)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    text = (f"{counted(train['tokens'], 'token')} to train on, {val['tokens']:,} to validate on, "
            f"vocabulary of {meta['vocab_size']:,}, {train['bytes_per_token']:.2f} bytes a token "
            f"({folder})")
    sources = [part["read"] for part in meta["parts"] if "read" in part]
    return f"{text}; read from {' and '.join(sources)}" if sources else text
