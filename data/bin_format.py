"""The format of a token file of another program: what its header says, or else the likely type.

Knows the files of nanoGPT (plain integers), of llm.c and of NumPy. Reads no more than a sample.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

import atomic

NUMPY_MAGIC = b"\x93NUMPY"
# llm.c's header has 256 int32: a magic number, a version, the number of tokens, and zeros.
HEADER_BYTES = 1024
MAGIC = {20240520: "uint16", 20240801: "uint32"}  # tokens of GPT-2 and of Llama 3

# Candidate types for files without a header, wider ones first: 16-bit tokens read as 32 bits exceed
# any vocabulary, while 32-bit tokens read as 16 bits only gain zeros.
WIDTHS = ("uint64", "uint32", "uint16")
# The largest vocabulary whose tokens may be single bytes. All bytes are ids of one of 256, so that
# they would be taken for single bytes in every case.
MOST_BYTES = 128
SAMPLE_TOKENS = 2**18  # read at each of three places
# Two of them are a valid id of most vocabularies.
TEXT_BYTES = bytes(range(32, 127)) + b"\t\n\r"
LEAST_TOKENS = 16  # in fewer, a zero may be a token or the upper half of a wider one


def describe_bin(path: Path, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The entry of a file in `meta.json`, without its checksum.

    Raises ValueError for a damaged or unsupported file, or a type too small for the vocabulary.
    """
    # Files that are not supported.
    if not atomic.is_regular(path):
        raise ValueError(f"{path} is not a regular file: give files of tokens.")
    if path.with_suffix(".idx").exists():
        raise ValueError(f"{path} is in Megatron-LM's format, as its .idx file shows, which is not "
                         f"supported: write its tokens as plain integers, document by document.")

    # The header of NumPy or of llm.c says what the file holds.
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head:
        raise ValueError(f"{path} is empty.")
    if head.startswith(NUMPY_MAGIC) or path.suffix.lower() == ".npy":
        shard = describe_numpy(path)
    else:
        shard = describe_header(path, head.ljust(12, b"\0"))
    if not shard:
        shard = describe_headerless(path, head, vocab_size, dtype)
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
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        # NumPy parses the header as Python: the errors for a damaged one have no common class.
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


def describe_headerless(path: Path, head: bytes, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The entry of a file without a known header. Its type is `dtype`, or detected for "auto"."""
    if dtype == "auto":
        if len(head) == HEADER_BYTES and any(head[:16]) and not any(head[16:]):
            raise ValueError(f"{path} seems to start with the header of another program: remove "
                             f"it, or set data.dtype= if these are tokens.")
        dtype = detect_dtype(path, vocab_size)
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise ValueError(f"{path} has {size:,} bytes, no whole number of {8 * width}-bit tokens.")
    return {"offset": 0, "dtype": dtype, "tokens": size // width}


def big_endian(path: Path) -> ValueError:
    return ValueError(f"{path} was written in big-endian byte order: convert it to little-endian.")


def fits(dtype: str, vocab_size: int) -> bool:
    """Whether a type can hold all ids of a vocabulary, except the last, which may be unused."""
    return np.iinfo(dtype).max >= vocab_size - 2


def detect_dtype(path: Path, vocab_size: int) -> str:
    """The type of the tokens in a file without a header; ValueError if it is ambiguous.

    It is the widest type that gives ids in the vocabulary, else the narrowest that can hold it.
    """
    # The types that can hold every id.
    size = path.stat().st_size
    possible = [name for name in WIDTHS if fits(name, vocab_size)]
    if vocab_size <= MOST_BYTES:
        possible.append("uint8")
    # Text is a likely mistake.
    elif not read_sample(path, "uint8").tobytes().translate(None, TEXT_BYTES):
        raise ValueError(f"{path} is text, not tokens: train on it with data=text.")

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

    # No type fits. The caller reports an id beyond the vocabulary, unless the bytes are swapped.
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
