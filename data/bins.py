"""Tokens that others have prepared: integers without a header (nanoGPT), llm.c's and NumPy's files.

They are used where they are, through memory maps like our own shards.
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

# llm.c's header: 256 int32, of which the first are a magic number, a version, the number of tokens.
HEADER_BYTES = 1024
MAGIC = {20240520: "uint16", 20240801: "uint32"}  # GPT-2's tokens; Llama 3's
CHUNK = 2**24  # tokens that are looked at together
NUMPY_MAGIC = b"\x93NUMPY"
ENDINGS = (".bin", ".npy")
SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation"}

# The types of tokens in a file without a header. Wider ones are tried first: tokens of 16 bits are
# beyond any vocabulary if they are read as 32, while tokens of 32 bits read as 16 only add zeros.
WIDTHS = ("uint64", "uint32", "uint16", "uint8")
SAMPLE_TOKENS = 2**18  # that are looked at for it, at each of three places
MOST_BYTES = 128  # the largest vocabulary of which single bytes are taken for tokens
LEAST_TOKENS = 16  # with fewer, zeros might be tokens, or the upper halves of wider ones


def prepare_bins(path: str, tokenizer_name: str, dtype: str = "auto") -> Path:
    """The folder that describes the tokens in `path`, which stay where they are.

    It is created, or updated if they have moved. `dtype` is that of files without a header, which
    "auto" detects. Raises ValueError for files that are not tokens or whose type is ambiguous, and
    for ids that the tokenizer does not have.
    """
    found = find_bins(path)
    tokenizer = tokenizer_of(found["train"][0].parent, tokenizer_name)
    size = tokenizer.vocab_size
    shards = {
        split: [describe_bin(file, size, dtype) for file in files] for split, files in found.items()
    }
    for split, files in found.items():
        for shard, sha256 in zip(shards[split], sha256_of(files), strict=True):
            shard["sha256"] = sha256
    recipe = {
        "source": {split: [shard["sha256"] for shard in shards[split]] for split in SPLITS},
        "tokenizer": tokenizer_name,
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    widths = {
        split: [shard["dtype"] for shard in shards[split] if not shard["offset"]]
        for split in SPLITS
    }
    if any(set(names) - {"uint16"} for names in widths.values()):
        recipe["dtypes"] = widths
    folder = folder_for(f"bin-{tokenizer_name}", recipe)

    def describe_there(folder: Path) -> None:
        splits = {split: count(shards[split], tokenizer) for split in SPLITS}
        part = {"source": "bin"} | {
            split: splits[split] | {"shards": shards[split]} for split in SPLITS
        }
        atomic.write_bytes(folder / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        write_meta(
            folder,
            recipe,
            fingerprint(tokenizer),
            tokenizer.vocab_size,
            {"splits": splits, "parts": [part]},
        )

    made_once(folder, describe_there)
    if any(read_meta(folder)["parts"][0][split]["shards"] != shards[split] for split in SPLITS):
        describe_there(folder)
    check(folder, recipe)
    return folder


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that made the tokens in `folder`.

    Raises ValueError if that needs a file beside them that is missing.
    """
    # nanoGPT keeps the characters in a pickle, which is not safe to open. The text has them too.
    if name == "char":
        text = folder / "input.txt"
        if not text.is_file():
            raise ValueError(
                f"{text} is not there: of tokens by characters, their text must lie beside them."
            )
        characters = {letter for piece in File(text).text_pieces() for letter in piece}
        return CharTokenizer("".join(sorted(characters)), with_end_of_text=False)
    if name == "bpe":
        saved = folder / "tokenizer.json"
        if not saved.is_file():
            raise ValueError(
                f"{saved} is not there: name the tokenizer that made these tokens, as in "
                f"data.tokenizer=gpt2."
            )
        return read_tokenizer(saved)
    return from_json({"kind": name}, f"data.tokenizer={name}")


def find_bins(path: str) -> dict[str, list[Path]]:
    """The files of each split: `.bin` or `.npy`, in the folder or of the glob, by their names.

    Raises ValueError if a split has none or has both endings, and for a file of both splits.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in ENDINGS)
    else:
        files = sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
    # macOS leaves a hidden ._train.bin beside a train.bin that it copies.
    files = [file for file in files if not file.name.startswith(".") and not file.is_dir()]

    def named(split: str, file: Path) -> bool:
        return (
            re.search(rf"(?<![a-z])({SPLIT_NAMES[split]})(?![a-z])", file.name.lower()) is not None
        )

    found = {split: [file for file in files if named(split, file)] for split in SPLITS}
    if both := set(found["train"]) & set(found["val"]):
        raise ValueError(
            f"{both.pop()} is named for both splits: what is held out must not be trained on."
        )
    if missing := [split for split in SPLITS if not found[split]]:
        raise ValueError(
            f"{path} holds no .bin or .npy file with {' and none with '.join(missing)} in its "
            f"name: name the "
            f"folder where train.bin and val.bin lie, or a glob such as 'fineweb10B/*.bin'."
        )
    for split in SPLITS:
        if len({file.suffix.lower() for file in found[split]}) > 1:
            raise ValueError(
                f"{path} holds both .bin and .npy files for {split}, which might be the same "
                f"tokens: name "
                f"one kind with a glob, as in data.path='{path}/*.bin'."
            )
    return found


def describe_bin(path: Path, vocab_size: int, dtype: str) -> dict[str, Any]:
    """What `meta.json` says of a shard, without its checksum.

    Raises ValueError for a file that is damaged or of an unsupported kind, and for a type of tokens
    that is too small for the vocabulary.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: only those can hold tokens.")
    if path.with_suffix(".idx").exists():
        raise ValueError(
            f"{path} is of Megatron-LM, as its .idx file shows, which is not read: write its "
            f"tokens as plain "
            f"integers, documents one after the other."
        )
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        raise ValueError(f"{path} is empty.")
    if head.startswith(NUMPY_MAGIC):
        shard = describe_numpy(path)
    elif path.suffix.lower() == ".npy":
        raise ValueError(f"{path} is no NumPy file: it does not begin like one.")
    else:
        shard = describe_header(path, head.ljust(12, b"\0"))
    if shard and dtype not in ("auto", shard["dtype"]):
        raise ValueError(
            f"{path} says itself that its tokens are {shard['dtype']}: leave out "
            f"data.dtype={dtype}."
        )
    if not shard:
        dtype = detected(path, vocab_size) if dtype == "auto" else dtype
        size, width = path.stat().st_size, np.dtype(dtype).itemsize
        if size % width:
            raise ValueError(f"{path} is no file of {8 * width}-bit tokens: it has {size:,} bytes.")
        shard = {"offset": 0, "dtype": dtype, "tokens": size // width}
    if not shard["tokens"]:
        raise ValueError(f"{path} is empty.")
    if not has_room(shard["dtype"], vocab_size):
        raise ValueError(
            f"{path} has tokens of type {shard['dtype']}, too small for the {vocab_size:,} ids of "
            f"the "
            f"vocabulary: name the tokenizer that made it with data.tokenizer=NAME."
        )
    return {"file": str(path.resolve())} | shard


def describe_numpy(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is not one row of whole numbers."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as a NumPy file ({reason}).") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(
            f"{path} holds {tokens.dtype} numbers of shape {tokens.shape}: tokens are whole "
            f"numbers in one "
            f"dimension."
        )
    if tokens.offset + tokens.nbytes != path.stat().st_size:
        raise ValueError(f"{path} is damaged: it has more bytes than its header promises.")
    name = tokens.dtype.name if tokens.dtype.isnative else tokens.dtype.str
    return {"offset": tokens.offset, "dtype": name, "tokens": len(tokens)}


def describe_header(path: Path, head: bytes) -> dict[str, Any] | None:
    """By llm.c's header; None without one. Raises ValueError where it does not fit the file."""
    magic, _version, tokens = struct.unpack("<3i", head)
    if struct.unpack(">i", head[:4])[0] in MAGIC:
        raise ValueError(f"{path} was written with its bytes the other way round: convert it.")
    if magic not in MAGIC:
        return None
    dtype, size = MAGIC[magic], path.stat().st_size
    if tokens < 0 or HEADER_BYTES + tokens * np.dtype(dtype).itemsize != size:
        raise ValueError(
            f"{path} is cut short or damaged: its header promises {tokens:,} tokens, not {size:,} "
            f"bytes."
        )
    return {"offset": HEADER_BYTES, "dtype": dtype, "tokens": tokens}


def has_room(dtype: str, vocab_size: int) -> bool:
    """Whether a type of tokens holds all ids but the last one, which may be unused."""
    return np.iinfo(dtype).max >= vocab_size - 2


def detected(path: Path, vocab_size: int) -> str:
    """The type of tokens in a file without a header: the widest that gives ids of the vocabulary.

    If none does, the narrowest that can hold the vocabulary. Raises ValueError if it is ambiguous.
    """
    size, doubtful = path.stat().st_size, False
    possible = [name for name in WIDTHS if has_room(name, vocab_size)]
    # Any bytes are ids of a vocabulary of 256, so that says nothing about a file.
    if vocab_size > MOST_BYTES and "uint8" in possible:
        possible.remove("uint8")
    for name in possible:
        width = np.dtype(name).itemsize
        sample = sample_of(path, name) if size % width == 0 else np.array([vocab_size])
        if int(sample.max()) >= vocab_size:
            continue
        few = width > 2 and size // width < LEAST_TOKENS
        if not few and (sample[1::2] == 0).sum() <= len(sample) / 4:
            return name
        doubtful = True
    narrowest = "uint16" if "uint16" in possible else possible[-1]
    if size % np.dtype(narrowest).itemsize:
        return narrowest
    if doubtful:
        raise ValueError(
            f"{path} is too short, or has too many zeros, to tell the type of its tokens: say it "
            f"with "
            f"data.dtype=, as in data.dtype=uint16."
        )
    swapped = np.dtype(narrowest).newbyteorder(">").str
    if int(sample_of(path, swapped).max()) < vocab_size:
        raise ValueError(f"{path} was written with its bytes the other way round: convert it.")
    return narrowest


def sample_of(path: Path, dtype: str) -> np.ndarray:
    """Tokens of the beginning, the middle and the end of a file without a header."""
    tokens = np.memmap(path, dtype, "r")
    starts = (0, len(tokens) // 2, max(0, len(tokens) - SAMPLE_TOKENS))
    if len(tokens) <= 3 * SAMPLE_TOKENS:
        return np.array(tokens)
    return np.concatenate([tokens[start // 2 * 2 :][:SAMPLE_TOKENS] for start in starts])


def count(shards: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Documents, bytes and tokens of some shards.

    Raises ValueError for an id that the tokenizer does not have.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    total = sum(shard["tokens"] for shard in shards)
    with ProgressBar(
        desc="Counting tokens", total=total, unit="tokens", unit_scale=True, leave=False, delay=2
    ) as bar:
        for shard in shards:
            tokens = np.memmap(
                shard["file"], shard["dtype"], "r", shard["offset"], (shard["tokens"],)
            )
            for start in range(0, len(tokens), CHUNK):
                chunk = tokens[start : start + CHUNK]
                place = int(chunk.argmax())
                if chunk[place] < len(counts):
                    place = int(chunk.argmin())
                if not 0 <= int(chunk[place]) < len(counts):
                    raise ValueError(
                        f"{shard['file']} holds the id {chunk[place]} (token {start + place}), "
                        f"beyond the "
                        f"vocabulary of {len(counts)}: name the tokenizer that made it with "
                        f"data.tokenizer=NAME, or the type of its tokens, if not {shard['dtype']}, "
                        f"with "
                        f"data.dtype=."
                    )
                counts += np.bincount(chunk.astype(np.int64, copy=False), minlength=len(counts))
                bar.update(len(chunk))
    documents = 0 if tokenizer.end_of_text is None else int(counts[tokenizer.end_of_text])
    if tokenizer.end_of_text is not None:
        counts[tokenizer.end_of_text] = 0  # no bytes of any text
    used = np.flatnonzero(counts)
    n_bytes = sum(int(counts[one]) * len(tokenizer.decode_bytes((int(one),))) for one in used)
    if not n_bytes:
        raise ValueError(f"{shards[0]['file']} holds no text: only ends of text.")
    return {
        "documents": documents,
        "bytes": n_bytes,
        "tokens": total,
        "bytes_per_token": n_bytes / max(1, total),
    }
