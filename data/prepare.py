"""Documents to token shards: made when missing and never otherwise.

The folder's name carries a fingerprint of everything that its content depends on, and it gets that name
in one rename, so parallel jobs neither race nor see half of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import atomic
from data.files import Document
from data.shards import ShardWriter, read_meta
from data.sources import DataConfig, Source, data_root, open_source
from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, fingerprint, from_json

SAMPLE_BYTES = 2**28  # of the training split, from its start: what a tokenizer is trained on
FORMAT = 1  # part of the fingerprint: raise it when the same source would give other tokens


def prepare(config: DataConfig) -> Path:
    """The folder of prepared tokens for `config`; made now if it is not there.

    Raises ValueError where the source cannot be read or cannot be split.
    """
    source = open_source(config)
    vocabulary = config.vocab_size if config.tokenizer == "bpe" else None
    recipe = {"format": FORMAT, "source": source.fingerprint(), "tokenizer": config.tokenizer,
              "vocab_size": vocabulary, "val_fraction": config.val_fraction}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = data_root() / f"{config.source}-{config.tokenizer}-{digest[:12]}"
    if not folder.is_dir():
        build(source, config, folder, recipe)
    return folder


def build(source: Source, config: DataConfig, folder: Path, recipe: dict[str, object]) -> None:
    """Read the source (twice where a tokenizer is trained), encode it, and put the result in place."""
    corpus = Corpus(source, config.val_fraction)
    tokenizer = make_tokenizer(config, corpus)
    with atomic.new_folder(folder) as partial:
        writers = {split: ShardWriter(partial, split, tokenizer.vocab_size) for split in ("train", "val")}
        n_bytes, n_documents = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        with tqdm(desc=f"Tokenizing {config.source}", unit="B", unit_scale=True, leave=False) as bar:
            for split, pieces in corpus.parts():
                for piece in pieces:
                    writers[split].add(tokenizer.encode(piece))
                    n_bytes[split] += (size := len(piece.encode()))
                    bar.update(size)
                if corpus.has_boundaries and tokenizer.end_of_text is not None:
                    writers[split].add([tokenizer.end_of_text])
                n_documents[split] += 1
        for writer in writers.values():
            writer.close()
        meta = recipe | {
            "tokenizer_fingerprint": fingerprint(tokenizer), "vocab_size": tokenizer.vocab_size,
            "splits": {split: {"documents": n_documents[split], "bytes": n_bytes[split], "tokens": writer.n_tokens,
                               "bytes_per_token": n_bytes[split] / max(1, writer.n_tokens)}
                       for split, writer in writers.items()},
        }
        atomic.write_file(partial / "tokenizer.json", [json.dumps(tokenizer.to_json()).encode()])
        atomic.write_file(partial / "meta.json", [json.dumps(meta, indent=2).encode()])


class Corpus:
    """A source's documents without exact duplicates, sorted into training and validation.

    Where documents are many, the hash of its text decides which split a document is in. Where they are few,
    chance would make the validation split too small or too large, so each gives its own tail.
    """

    def __init__(self, source: Source, val_fraction: float) -> None:
        self.source, self.val_fraction = source, val_fraction
        many = int(10 / val_fraction)  # then ten are held out on average, and none at all once in 22,000 corpora
        count = sum(1 for _ in islice(self.documents(), many))
        if not count:
            raise ValueError("The source holds no text: every document is empty.")
        self.by_hash, self.has_boundaries = count == many, count > 1

    def documents(self) -> Iterator[tuple[Document, float, int]]:
        """Each distinct document with a number in [0, 1) that is drawn by its hash, and its length in characters."""
        seen = set()
        for document in self.source.documents():
            hashed, length = hashlib.sha256(), 0
            for piece in document.pieces():
                hashed.update(piece.encode())
                length += len(piece)
            digest = hashed.digest()[:16]
            if digest not in seen:
                seen.add(digest)
                yield document, int.from_bytes(digest[:8]) / 2**64, length

    def parts(self) -> Iterator[tuple[str, Iterator[str]]]:
        """Pairs of split ("train" or "val") and the pieces of a text, to be read at once."""
        for document, number, length in self.documents():
            if self.by_hash:
                yield ("val" if number < self.val_fraction else "train"), document.pieces()
            else:
                cut = int(length * (1 - self.val_fraction))
                yield "train", between(document.pieces(), 0, cut)
                yield "val", between(document.pieces(), cut, length)

    def training_text(self) -> Iterator[str]:
        """The first SAMPLE_BYTES of the training split, in pieces: what a tokenizer is trained on."""
        left = SAMPLE_BYTES
        for split, pieces in self.parts():
            for piece in pieces if split == "train" else ():
                yield piece
                left -= len(piece.encode())
                if left <= 0:
                    return


def between(pieces: Iterator[str], start: int, end: int) -> Iterator[str]:
    """The characters from `start` to `end` of a text in pieces."""
    place = 0
    for piece in pieces:
        part = piece[max(0, start - place) : max(0, end - place)]
        place += len(piece)
        if part:
            yield part


def make_tokenizer(config: DataConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer that `config` names; `bpe` learns from the training split, `char` lists the whole corpus."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "gpt2":
        return BPETokenizer.gpt2()
    if config.tokenizer == "bpe":
        return BPETokenizer.train(corpus.training_text(), config.vocab_size)
    characters: set[str] = set()
    for document, _, _ in corpus.documents():
        for piece in document.pieces():
            characters.update(piece)
    return CharTokenizer("".join(sorted(characters)), with_end_of_text=corpus.has_boundaries)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that lies beside prepared tokens."""
    path = folder / "tokenizer.json"
    return from_json(json.loads(path.read_text()), str(path))


def describe(folder: Path) -> str:
    """One line about prepared tokens."""
    meta = read_meta(folder)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    return (f"{train['tokens']:,} tokens to train on, {val['tokens']:,} to validate on, vocabulary of "
            f"{meta['vocab_size']:,}, {train['bytes_per_token']:.2f} bytes a token ({folder})")
