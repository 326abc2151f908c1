"""Use the token files of other programs: nanoGPT's plain integers, llm.c's and NumPy's files.

The files stay where they are and are read through memory maps, like our own shards.
"""

from __future__ import annotations

import json
import re
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import atomic
from data.config import TOKENIZERS
from data.files import File
from data.find import matches
from data.shards import SPLITS, check, read_meta, write_meta
from data.store import folder_for, make_once, sha256_of
from data.tokenizer import CharTokenizer, Tokenizer, bytes_of_counts
from data.tokenizer_file import open_tokenizer
from data.tokenizer_json import fingerprint, from_json, read_tokenizer
from progress import ProgressBar

NUMPY_MAGIC = b"\x93NUMPY"
# llm.c's header has 256 int32: a magic number, a version, the number of tokens, and zeros.
HEADER_BYTES = 1024
MAGIC = {20240520: "uint16", 20240801: "uint32"}  # tokens of GPT-2 and of Llama 3
ENDINGS = (".bin", ".npy")
SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation"}
CHUNK = 2**24  # tokens

# Candidate types for files without a header, wider ones first: 16-bit tokens read as 32 bits exceed
# any vocabulary, while 32-bit tokens read as 16 bits only gain zeros.
WIDTHS = ("uint64", "uint32", "uint16", "uint8")
SAMPLE_TOKENS = 2**18  # read at each of three places
MOST_BYTES = 128  # the largest vocabulary whose tokens may be single bytes
# Two of them are a valid id of most vocabularies.
TEXT_BYTES = bytes(range(32, 127)) + b"\t\n\r"
LEAST_TOKENS = 16  # in fewer, a zero may be a token or the upper half of a wider one


def prepare_bins(path: str, tokenizer_name: str, dtype: str = "auto") -> Path:
    """Describe the tokens in `path` in a folder of prepared tokens, and return the folder.

    The folder is updated if the files have moved. `dtype` is the type of files without a header, or
    "auto". Raises ValueError for files that are not tokens of the tokenizer's vocabulary.
    """
    files = find_bins(path)
    tokenizer = tokenizer_of(files["train"][0].parent, tokenizer_name)
    if tokenizer_name not in TOKENIZERS:
        tokenizer_name = "file"

    # All files are checked before the first one is hashed, which takes longer.
    shards, digests, headerless = {}, {}, {}
    for split in SPLITS:
        shards[split] = [describe_bin(file, tokenizer.vocab_size, dtype) for file in files[split]]
    for split in SPLITS:
        digests[split] = sha256_of(files[split])
        headerless[split] = [shard["dtype"] for shard in shards[split] if not shard["offset"]]
        for shard, sha256 in zip(shards[split], digests[split], strict=True):
            shard["sha256"] = sha256

    # The types of files without a header are in the recipe if they are not the usual ones.
    recipe = {"source": digests, "tokenizer": tokenizer_name,
              "tokenizer_fingerprint": fingerprint(tokenizer)}
    if set(chain.from_iterable(headerless.values())) - {"uint16"}:
        recipe["dtypes"] = headerless
    folder = folder_for(f"bin-{tokenizer_name}", recipe)

    def describe(folder: Path) -> None:
        splits = {split: count_tokens(shards[split], tokenizer) for split in SPLITS}
        part: dict[str, Any] = {"source": "bin"}
        for split in SPLITS:
            part[split] = splits[split] | {"shards": shards[split]}
        atomic.write_bytes(folder / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        write_meta(folder, recipe, fingerprint(tokenizer), tokenizer.vocab_size,
                   {"splits": splits, "parts": [part]})

    # If the files have moved, only their paths change.
    make_once(folder, describe)
    [part] = read_meta(folder)["parts"]
    if any(part[split]["shards"] != shards[split] for split in SPLITS):
        describe(folder)
    check(folder, recipe)
    return folder


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that made the tokens in `folder`; ValueError if it needs a missing file."""
    if name == "char":
        # nanoGPT saves the characters in a pickle, which is not safe to load.
        text = folder / "input.txt"
        if not text.is_file():
            raise ValueError(f"{text} is missing: character tokens need the text that they were "
                             f"made from beside them.")
        characters: set[str] = set()
        for piece in File(text).text_pieces():
            characters.update(piece)
        return CharTokenizer("".join(sorted(characters)), with_end_of_text=False)
    # A BPE of ours, saved beside its tokens.
    if name == "bpe":
        saved = folder / "tokenizer.json"
        if not saved.is_file():
            raise ValueError(f"{saved} is missing: name the tokenizer that made these tokens, as "
                             f"in data.tokenizer=gpt2.")
        return read_tokenizer(saved)
    # One in a file, or one that its name alone describes.
    if name not in TOKENIZERS:
        return open_tokenizer(name)
    return from_json({"kind": name}, f"data.tokenizer={name}")


def find_bins(path: str) -> dict[str, list[Path]]:
    """The `.bin` or `.npy` files of each split, in a folder or of a glob, sorted by name.

    Raises ValueError for a split without files or with both endings, and for a file of both splits.
    """
    # Sort the files into the splits that their names tell.
    place = Path(path)
    if place.is_dir():
        files = [file for file in place.iterdir() if file.suffix.lower() in ENDINGS]
    else:
        files = matches(place)
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in sorted(files):
        # macOS leaves a hidden ._train.bin beside a train.bin that it copies.
        if file.name.startswith(".") or file.is_dir():
            continue
        for split, names in SPLIT_NAMES.items():
            if re.search(rf"(?<![a-z])({names})(?![a-z])", file.name.lower()):
                found[split].append(file)

    # No file may be in both splits, and no split without a file or with two copies of its tokens.
    both = set(found["train"]) & set(found["val"])
    if both:
        raise ValueError(f"{both.pop()} is named for both splits: name it for one of them, because "
                         f"validation tokens must not be trained on.")
    missing = [split for split in SPLITS if not found[split]]
    if missing:
        raise ValueError(f"{path} has no .bin or .npy file with {' and none with '.join(missing)} "
                         f"in its name: give the folder with train.bin and val.bin, or a glob "
                         f"such as 'fineweb10B/*.bin'.")
    for split in SPLITS:
        if len({file.suffix.lower() for file in found[split]}) > 1:
            raise ValueError(f"{path} has both .bin and .npy files for {split}, which might hold "
                             f"the same tokens: name one kind, as in data.path='{path}/*.bin'.")
    return found


def describe_bin(path: Path, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The entry of a file in `meta.json`, without its checksum.

    Raises ValueError for a damaged or unsupported file, or a type too small for the vocabulary.
    """
    # Files that are not supported.
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: give files of tokens.")
    if path.with_suffix(".idx").exists():
        raise ValueError(f"{path} is in Megatron-LM's format, as its .idx file shows, which is not "
                         f"supported: write its tokens as plain integers, document by document.")

    # The header of NumPy or of llm.c says what the file holds.
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head:
        raise ValueError(f"{path} is empty.")
    if head.startswith(NUMPY_MAGIC):
        shard = describe_numpy(path)
    elif path.suffix.lower() == ".npy":
        raise ValueError(f"{path} is not a NumPy file: it does not start like one.")
    else:
        shard = describe_header(path, head.ljust(12, b"\0"))
    # Without one, it is full of tokens.
    if not shard:
        if dtype == "auto":
            if len(head) == HEADER_BYTES and any(head[:16]) and not any(head[16:]):
                raise ValueError(f"{path} seems to start with the header of another program, some "
                                 f"numbers and then zeros: remove it, or set data.dtype= if these "
                                 f"are tokens.")
            dtype = detect_dtype(path, vocab_size)
        size, width = path.stat().st_size, np.dtype(dtype).itemsize
        if size % width:
            raise ValueError(f"{path} has {size:,} bytes, which is not a whole number of "
                             f"{8 * width}-bit tokens.")
        shard = {"offset": 0, "dtype": dtype, "tokens": size // width}
    elif dtype not in ("auto", shard["dtype"]):
        raise ValueError(f"{path} has {shard['dtype']} tokens according to its header: remove "
                         f"data.dtype={dtype}.")

    # The tokens must exist, and their type must have room for every id.
    if not shard["tokens"]:
        raise ValueError(f"{path} is empty.")
    if not fits(shard["dtype"], vocab_size):
        raise ValueError(f"{path} has {shard['dtype']} tokens, too small for a vocabulary of "
                         f"{vocab_size:,}: name the tokenizer that made it with data.tokenizer=.")
    return {"file": str(path.resolve())} | shard


def describe_numpy(path: Path) -> dict[str, Any]:
    """The entry of a NumPy file. Raises ValueError unless it is a 1-D array of integers."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, OverflowError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as a NumPy file ({reason}).") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(f"{path} is an array of {tokens.dtype} with shape {tokens.shape}: tokens "
                         f"are integers in one dimension.")
    if tokens.offset + tokens.nbytes != path.stat().st_size:
        raise ValueError(f"{path} is damaged: it is longer than its header says.")
    name = tokens.dtype.name if tokens.dtype.isnative else tokens.dtype.str
    return {"offset": tokens.offset, "dtype": name, "tokens": len(tokens)}


def describe_header(path: Path, head: bytes) -> dict[str, Any] | None:
    """The entry of a file with llm.c's header, else None; ValueError for a wrong header."""
    magic, _version, n_tokens = struct.unpack("<3i", head[:12])
    if struct.unpack(">i", head[:4])[0] in MAGIC:
        raise big_endian(path)
    if magic not in MAGIC:
        return None
    dtype, size = MAGIC[magic], path.stat().st_size
    if n_tokens < 0 or HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize != size:
        raise ValueError(f"{path} is truncated or damaged: its header says {n_tokens:,} tokens, "
                         f"but it has {size:,} bytes.")
    return {"offset": HEADER_BYTES, "dtype": dtype, "tokens": n_tokens}


def big_endian(path: Path) -> ValueError:
    return ValueError(f"{path} was written in big-endian byte order: convert it to little-endian.")


def fits(dtype: str, vocab_size: int) -> bool:
    """Whether a type can hold all ids of a vocabulary, except the last, which may be unused."""
    return np.iinfo(dtype).max >= vocab_size - 2


def detect_dtype(path: Path, vocab_size: int) -> str:
    """The type of the tokens in a file without a header; ValueError if it is ambiguous.

    It is the widest type that gives ids in the vocabulary, else the narrowest that can hold it.
    """
    size = path.stat().st_size
    in_no_text = read_sample(path, "uint8").tobytes().translate(None, TEXT_BYTES)
    if vocab_size > MOST_BYTES and not in_no_text:
        raise ValueError(f"{path} is text, not tokens: train on it with data=text.")
    possible = [name for name in WIDTHS if fits(name, vocab_size)]
    # All bytes are in a vocabulary of 256, so a match with uint8 would prove nothing.
    if vocab_size > MOST_BYTES and "uint8" in possible:
        possible.remove("uint8")

    # The widest type whose ids are all in the vocabulary. It is ambiguous if there are only a few
    # tokens, or if every second one is mostly zero, like the upper halves of wider tokens.
    ambiguous = False
    for name in possible:
        width = np.dtype(name).itemsize
        if size % width:
            continue
        sample = read_sample(path, name)
        if int(sample.max()) >= vocab_size:
            continue
        too_few = width > 2 and size // width < LEAST_TOKENS
        if not too_few and (sample[1::2] == 0).sum() <= len(sample) / 4:
            return name
        ambiguous = True

    # No type fits: the caller reports an id beyond the vocabulary, unless the bytes are swapped.
    narrowest = "uint16" if "uint16" in possible else possible[-1]
    if size % np.dtype(narrowest).itemsize:
        return narrowest
    if ambiguous:
        raise ValueError(f"{path} is too short, or has too many zeros, to detect the type of its "
                         f"tokens: set data.dtype=, as in data.dtype=uint16.")
    swapped = np.dtype(narrowest).newbyteorder(">").str
    if int(read_sample(path, swapped).max()) < vocab_size:
        raise big_endian(path)
    return narrowest


def read_sample(path: Path, dtype: str) -> np.ndarray:
    """Tokens from the start, the middle and the end of a file without a header."""
    tokens = np.memmap(path, dtype, "r")
    if len(tokens) <= 3 * SAMPLE_TOKENS:
        return np.array(tokens)
    starts = (0, len(tokens) // 4 * 2, (len(tokens) - SAMPLE_TOKENS) // 2 * 2)
    return np.concatenate([tokens[start : start + SAMPLE_TOKENS] for start in starts])


def check_ids(chunk: np.ndarray, start: int, vocab_size: int, shard: dict[str, Any]) -> None:
    """Raise ValueError for an id that is not below `vocab_size`; `chunk` begins at `start`."""
    for place in (int(chunk.argmax()), int(chunk.argmin())):
        if not 0 <= int(chunk[place]) < vocab_size:
            raise ValueError(
                f"{shard['file']} has the id {chunk[place]} (token {start + place}), beyond the "
                f"vocabulary of {vocab_size}: the tokenizer that made it is another "
                f"(data.tokenizer=), or the type of its tokens is not {shard['dtype']} "
                f"(data.dtype=).")


def count_tokens(shards: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """The documents, bytes and tokens in some shards; ValueError for an unknown id."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    total = sum(shard["tokens"] for shard in shards)
    with ProgressBar(desc="Counting tokens", total=total, unit="tokens", unit_scale=True,
                     leave=False, delay=2) as bar:
        for shard in shards:
            tokens = np.memmap(shard["file"], shard["dtype"], "r", shard["offset"],
                               (shard["tokens"],))
            for start in range(0, len(tokens), CHUNK):
                chunk = tokens[start : start + CHUNK]
                check_ids(chunk, start, len(counts), shard)
                counts += np.bincount(chunk.astype(np.int64, copy=False), minlength=len(counts))
                bar.update(len(chunk))

    # Each end of text is a document, and has no bytes.
    documents = 0
    if tokenizer.end_of_text is not None:
        documents = int(counts[tokenizer.end_of_text])
        counts[tokenizer.end_of_text] = 0
    n_bytes = bytes_of_counts(counts, tokenizer)
    if not n_bytes:
        raise ValueError(f"{shards[0]['file']} has no text, only end-of-text tokens.")
    return {"documents": documents, "bytes": n_bytes, "tokens": total,
            "bytes_per_token": n_bytes / max(1, total)}
