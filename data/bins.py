"""Tokens that others have prepared: nanoGPT's `train.bin` and `val.bin` (bare uint16), and llm.c's shards (with a header).

They are used where they lie, read through memory maps like our own shards.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

import atomic
from data.files import File
from data.shards import SPLITS, check, read_meta, write_meta
from data.store import folder_for, made_once, sha256_of
from data.tokenizer import CharTokenizer, Tokenizer, fingerprint, from_json, read_tokenizer
from progress import ProgressBar

HEADER_BYTES = 1024  # of llm.c's files: 256 int32, the first three a magic number, a version, and how many tokens follow
MAGIC = {20240520: "uint16", 20240801: "uint32"}  # GPT-2's tokens; Llama 3's
CHUNK = 2**24  # tokens that are looked at together


def prepare_bins(path: str, tokenizer_name: str) -> Path:
    """The folder that describes the tokens in `path`, which stay where they are. Made, or mended where they have moved.

    Raises ValueError for files that are none, and for ids that the tokenizer does not have.
    """
    found = find_bins(path)
    tokenizer = tokenizer_of(found["train"][0].parent, tokenizer_name)
    shards = {split: [describe_bin(file) for file in files] for split, files in found.items()}
    for split, files in found.items():
        for shard, sha256 in zip(shards[split], sha256_of(files), strict=True):
            shard["sha256"] = sha256
    recipe = {"source": {split: [shard["sha256"] for shard in shards[split]] for split in SPLITS},
              "tokenizer": tokenizer_name, "tokenizer_fingerprint": fingerprint(tokenizer)}
    folder = folder_for(f"bin-{tokenizer_name}", recipe)

    def describe_there(folder: Path) -> None:
        splits = {split: count(shards[split], tokenizer) for split in SPLITS}
        part = {"source": "bin"} | {split: splits[split] | {"shards": shards[split]} for split in SPLITS}
        atomic.write_bytes(folder / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        write_meta(folder, recipe, fingerprint(tokenizer), tokenizer.vocab_size, {"splits": splits, "parts": [part]})

    made_once(folder, describe_there)
    if any(read_meta(folder)["parts"][0][split]["shards"] != shards[split] for split in SPLITS):
        describe_there(folder)
    check(folder, recipe)
    return folder


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that made the tokens in `folder`. Raises ValueError where only a file beside them could tell."""
    if name == "char":  # nanoGPT keeps the characters in a pickle, which is not safe to open; the text tells them too
        text = folder / "input.txt"
        if not text.is_file():
            raise ValueError(f"{text} is not there: of tokens by characters, their text must lie beside them.")
        characters = {letter for piece in File(text).text_pieces() for letter in piece}
        return CharTokenizer("".join(sorted(characters)), with_end_of_text=False)
    if name == "bpe":
        saved = folder / "tokenizer.json"
        if not saved.is_file():
            raise ValueError(f"{saved} is not there: name the tokenizer that made these tokens, as in data.tokenizer=gpt2.")
        return read_tokenizer(saved)
    return from_json({"kind": name}, f"data.tokenizer={name}")


def find_bins(path: str) -> dict[str, list[Path]]:
    """The files of each split: those `.bin` in the folder, or of the glob, whose names hold "train" or "val".

    Raises ValueError where a split has none.
    """
    place = Path(path)
    if place.is_dir():
        # macOS leaves a hidden ._train.bin beside a train.bin that it copies.
        files = sorted(file for file in place.glob("*.bin") if not file.name.startswith("."))
    else:
        files = sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))

    def named(split: str, file: Path) -> bool:
        return re.search(rf"(?<![a-z]){split}(?![a-z])", file.name.lower()) is not None

    found = {split: [file for file in files if named(split, file)] for split in SPLITS}
    if both := set(found["train"]) & set(found["val"]):
        raise ValueError(f"{both.pop()} is named for both splits: what is held out must not be trained on.")
    if missing := [split for split in SPLITS if not found[split]]:
        raise ValueError(f"data.path={path} holds no .bin file with {' and none with '.join(missing)} in its name: name the "
                         f"folder where train.bin and val.bin lie, or a glob such as 'fineweb10B/*.bin'.")
    return found


def describe_bin(path: Path) -> dict[str, Any]:
    """What `meta.json` says of a shard, from its size and header. Raises ValueError for a file that is neither kind."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(12).ljust(12, b"\0")
    magic, _version, tokens = struct.unpack("<3i", header)
    if struct.unpack(">i", header[:4])[0] in MAGIC:
        raise ValueError(f"{path} was written with its bytes the other way round: convert it.")
    if magic in MAGIC:
        dtype, offset = MAGIC[magic], HEADER_BYTES
        if tokens < 0 or offset + tokens * np.dtype(dtype).itemsize != size:
            raise ValueError(f"{path} is cut short or damaged: its header promises {tokens:,} tokens, not {size:,} bytes.")
        return {"file": str(path.resolve()), "offset": offset, "dtype": dtype, "tokens": tokens}
    if size % 2 or not size:
        raise ValueError(f"{path} is no file of 16-bit tokens: it has {size:,} bytes.")
    return {"file": str(path.resolve()), "offset": 0, "dtype": "uint16", "tokens": size // 2}


def count(shards: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Documents, bytes and tokens of some shards. Raises ValueError for an id that the tokenizer does not have."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    total = sum(shard["tokens"] for shard in shards)
    with ProgressBar(desc="Counting tokens", total=total, unit="tokens", unit_scale=True, leave=False, delay=2) as bar:
        for shard in shards:
            tokens = np.memmap(shard["file"], shard["dtype"], "r", shard["offset"], (shard["tokens"],))
            for start in range(0, len(tokens), CHUNK):
                chunk = tokens[start : start + CHUNK]
                if (largest := int(chunk.max())) >= len(counts):
                    place = start + int(chunk.argmax())
                    raise ValueError(f"{shard['file']} holds the id {largest} (token {place}), beyond the vocabulary of "
                                     f"{len(counts)}: name the tokenizer that made it with data.tokenizer=NAME.")
                counts += np.bincount(chunk, minlength=len(counts))
                bar.update(len(chunk))
    documents = 0 if tokenizer.end_of_text is None else int(counts[tokenizer.end_of_text])
    if tokenizer.end_of_text is not None:
        counts[tokenizer.end_of_text] = 0  # no bytes of any text
    used = np.flatnonzero(counts)
    n_bytes = sum(int(counts[one]) * len(tokenizer.decode_bytes((int(one),))) for one in used)
    if not n_bytes:
        raise ValueError(f"{shards[0]['file']} holds no text: only ends of text.")
    return {"documents": documents, "bytes": n_bytes, "tokens": total, "bytes_per_token": n_bytes / max(1, total)}
