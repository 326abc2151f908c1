"""Documents to token shards: made when missing and never otherwise, and checked each time they are used.

The folder's name carries a fingerprint of everything that its content depends on. It is filled under another name;
what a kill leaves there goes on from its last whole segment, to the same bytes.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import atomic
from data.bins import prepare_bins
from data.corpus import Corpus
from data.encode import segments
from data.shards import SPLITS, again, check, check_shards, read_meta, write_meta
from data.sources import DataConfig, Source, expanded, open_sources, open_validation
from data.store import BUILDING, data_root, folder_for, made_once
from data.tokenizer import (
    DISTINCT_BYTES,
    PUBLISHED,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    fingerprint,
    read_tokenizer,
    with_few_words,
)

SAMPLE_BYTES = 2**28  # of the training split, from its start: what a tokenizer is trained on
PROGRESS = "progress.json"  # what is whole of tokens that are being prepared
FORMAT = 3  # part of the fingerprint: raise it when the same source would give other tokens


def prepare(config: DataConfig) -> Path:
    """The folder of prepared tokens for `config`; made now if it is not there, else checked.

    Raises ValueError where the source cannot be read or cannot be split, and where tokens that were prepared are
    not what was written; OSError where they cannot be written.
    """
    if config.source == "bin" and not config.mix:
        return prepare_bins(expanded(config.path), config.tokenizer, config.dtype)
    plan = planned(config)
    made_once(plan.folder, lambda partial: build(partial, plan, config))
    check(plan.folder, plan.recipe)
    return plan.folder


def find_prepared(fingerprint: str) -> Path | None:
    """The folder of prepared tokens that a checkpoint names, by the beginning of their fingerprint.

    Its shards are checked. None where there is no such folder or where its tokens are damaged.
    """
    for folder in sorted(data_root().glob("*-*-*")):
        if folder.name.startswith(BUILDING):
            continue
        try:
            if fingerprint and read_meta(folder)["fingerprint"].startswith(fingerprint):
                check(folder, recipe={})
                return folder
        except (ValueError, OSError):
            continue
    return None


class Plan(NamedTuple):
    """Where the tokens of a configuration lie or will lie, all that they depend on, and the sources of their text."""

    folder: Path
    recipe: dict[str, Any]
    sources: dict[str, Source]
    validation: Source | None


def planned(config: DataConfig) -> Plan:
    sources, validation = open_sources(config), open_validation(config)
    recipe = {"format": FORMAT, "sources": [source.fingerprint() for source in sources.values()],
              "validation": validation.fingerprint() if validation else None,
              "val_fraction": None if validation else config.val_fraction,
              "deduplicate": config.deduplicate, "tokenizer": config.tokenizer,
              "asked_vocab_size": config.vocab_size if config.tokenizer == "bpe" else None}
    name = f"{'mix' if config.mix else config.source}-{config.tokenizer}"
    return Plan(folder_for(name, recipe), recipe, sources, validation)


def build(partial: Path, plan: Plan, config: DataConfig) -> None:
    """Read the sources (twice where a tokenizer is trained), encode them, and describe what came of it.

    Raises ValueError for a source that changes meanwhile.
    """
    if (partial / "meta.json").exists():
        return  # all was done, but for the name
    corpora = [Corpus(source, config.val_fraction, plan.validation, config.deduplicate)
               for source in plan.sources.values()]
    tokens = partial / "tokenizer.json"
    done = read_progress(partial)
    tokenizer = read_tokenizer(tokens) if done else make_tokenizer(config, corpora)
    made_with = fingerprint(tokenizer)
    if not done:
        atomic.write_bytes(tokens, json.dumps(tokenizer.to_json()).encode())
    for segment in segments(corpora, tokenizer, partial, len(done), f"Tokenizing {config.mix or config.source}"):
        done.append(segment)
        atomic.write_bytes(partial / PROGRESS, json.dumps({"tokenizer": made_with, "segments": done}).encode())
    now = [source.fingerprint() for source in plan.sources.values()]
    validation = plan.validation.fingerprint() if plan.validation else None
    if now != plan.recipe["sources"] or validation != plan.recipe["validation"]:
        raise ValueError(f"{config.mix or config.path or config.source} changed while it was read: run the command again.")
    read = [corpus.summary() for corpus in corpora]
    write_meta(partial, plan.recipe, made_with, tokenizer.vocab_size, summary(done, list(plan.sources), read))
    (partial / PROGRESS).unlink()


def read_progress(partial: Path) -> list[dict[str, Any]]:
    """The segments that an earlier attempt has finished, as far as they are what was written."""
    whole: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, LookupError, TypeError):  # what is damaged is made again
        progress = atomic.read_json(partial / PROGRESS)
        if fingerprint(read_tokenizer(partial / "tokenizer.json")) == progress["tokenizer"]:
            for segment in progress["segments"]:
                check_shards(partial, [shard for split in SPLITS for shard in segment[split]["shards"]])
                if segment["number"] != len(whole):
                    break
                whole.append(segment)
    return whole


def summary(done: list[dict[str, Any]], names: list[str], read: list[str]) -> dict[str, Any]:
    """What `meta.json` says about the segments: each split in all, and each part of a mixture with its shards.

    `read` says of each part what was read and what was left out.
    """
    def total(of: list[dict[str, Any]], split: str) -> dict[str, Any]:
        counts = {name: sum(segment[split][name] for segment in of) for name in ("documents", "bytes", "tokens")}
        return counts | {"bytes_per_token": counts["bytes"] / max(1, counts["tokens"])}

    def with_shards(of: list[dict[str, Any]], split: str) -> dict[str, Any]:
        return total(of, split) | {"shards": [shard for segment in of for shard in segment[split]["shards"]]}

    parts = []
    for number, name in enumerate(names):
        mine = [segment for segment in done if segment["part"] == number]
        parts.append({"source": name, "read": read[number]} | {split: with_shards(mine, split) for split in SPLITS})
    return {"splits": {split: total(done, split) for split in SPLITS}, "parts": parts}


def make_tokenizer(config: DataConfig, corpora: list[Corpus]) -> Tokenizer:
    """The tokenizer that `config` names; `bpe` learns from the training split, `char` lists the whole corpus."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer in PUBLISHED:
        return BPETokenizer.published(config.tokenizer)
    if config.tokenizer == "bpe":
        samples = [corpus.training_text(SAMPLE_BYTES // len(corpora)) for corpus in corpora]
        if len(samples) > 1:
            # No part of a mixture may take the room for different words from the others.
            samples = [with_few_words(sample, DISTINCT_BYTES // len(samples)) for sample in samples]
        return BPETokenizer.train(chain.from_iterable(samples), config.vocab_size)
    characters: set[str] = set()
    for corpus in corpora:
        with corpus.watched("Listing characters") as watch:
            for piece in corpus.pieces():
                characters.update(piece.text)
                watch(piece.text)
    return CharTokenizer("".join(sorted(characters)), with_end_of_text=len(corpora) > 1 or corpora[0].has_boundaries)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that lies beside prepared tokens. Raises ValueError if it is not the one that made them."""
    path = folder / "tokenizer.json"
    tokenizer, made_with = read_tokenizer(path), read_meta(folder)["tokenizer_fingerprint"]
    if (found := fingerprint(tokenizer)) != made_with:
        raise ValueError(f"{path} (fingerprint {found[:12]}) is not the tokenizer that made the tokens beside it "
                         f"(fingerprint {made_with[:12]}): {again(folder)}")
    return tokenizer


def val_bytes_per_token(folder: Path, weights: list[int]) -> float:
    """The mean bytes of a token to validate on; of a mixture, by its parts' weights."""
    parts = read_meta(folder)["parts"]
    return sum(weight * part["val"]["bytes_per_token"] for weight, part in zip(weights, parts, strict=True)) / sum(weights)


def describe(folder: Path) -> str:
    """One line about prepared tokens."""
    meta = read_meta(folder)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    read = " and ".join(part["read"] for part in meta["parts"] if "read" in part)
    return (f"{train['tokens']:,} tokens to train on, {val['tokens']:,} to validate on, vocabulary of "
            f"{meta['vocab_size']:,}, {train['bytes_per_token']:.2f} bytes a token ({folder})"
            + (f"; read from {read}" if read else ""))
