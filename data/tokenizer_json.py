"""The JSON form of tokenizers: reads what `to_json` gave, and refuses anything else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from data.bpe import PUBLISHED, BPETokenizer
from data.patterns import KNOWN
from data.tokenizer import (
    END_OF_TEXT,
    OTHER_ENDS,
    ByteTokenizer,
    CharTokenizer,
    ExtendedTokenizer,
    Tokenizer,
)

# Limits of a file. No training here makes a longer token.
LONGEST_TOKEN = 4096  # bytes
LARGEST_FILE = 2**26  # bytes
MOST_SPECIAL = 2**16  # ids after the last merged token


def from_json(saved: dict[str, Any], place: str) -> Tokenizer:
    """The tokenizer that `to_json` saved. Raises ValueError naming `place` for anything else."""
    # Each kind has exactly these fields. Anything else falls through to the error.
    match saved:
        case {"added": list(words), **base} if are_words(words):
            tokenizer = from_json(base, place)
            if not set(words) & set(tokenizer.special):
                return ExtendedTokenizer(tokenizer, words)
        case {"kind": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"kind": str(name), **rest} if name in PUBLISHED and not rest:
            return BPETokenizer.published(name)
        case {"kind": "char", "characters": str(characters), "end_of_text": bool(with_end), **rest}:
            encodable = not re.search("[\ud800-\udfff]", characters)
            if encodable and not rest and list(characters) == sorted(set(characters)):
                return CharTokenizer(characters, with_end)
        case {"kind": "bpe", "pattern": pattern, "ranks": list(encoded), **rest}:
            ranks = decode_ranks(encoded)
            longest = max(map(len, ranks), default=0)
            if longest > LONGEST_TOKEN:
                raise ValueError(f"{place} has a token of {longest:,} bytes, more than the "
                                 f"{LONGEST_TOKEN:,} allowed: it was not trained here, or is "
                                 f"damaged.")
            if ranks and pattern in KNOWN and are_options(rest, ranks):
                return BPETokenizer.from_ranks(ranks, pattern, **rest)
    raise ValueError(f"{place} is not a nanohydra tokenizer.")


def are_words(words: list[Any]) -> bool:
    """Whether the names of special tokens are distinct texts that UTF-8 can encode."""
    for word in words:
        if not isinstance(word, str) or not word or re.search("[\ud800-\udfff]", word):
            return False
    return len(set(words)) == len(words)


def are_options(options: dict[str, Any], ranks: list[bytes]) -> bool:
    """Whether these are valid arguments of `BPETokenizer.from_ranks`."""
    # The ids of special tokens are distinct, are not those of merged tokens, and include the end.
    default = {"special": {END_OF_TEXT: len(ranks)}, "in_text": [], "normalizer": ""}
    match default | options:
        case {"special": dict(special), "in_text": list(in_text),
              "normalizer": "" | "NFC", **rest} if not rest:
            free = {rank for rank, token in enumerate(ranks) if not token}
            free |= set(range(len(ranks), len(ranks) + MOST_SPECIAL))
            ids = list(special.values())
            has_end = any(word in special for word in (END_OF_TEXT, *OTHER_ENDS))
            return (are_words(list(special)) and all(type(token) is int for token in ids)
                    and len(set(ids)) == len(ids) and set(ids) <= free and has_end
                    and are_words(in_text) and set(in_text) <= set(special))
    return False


def decode_ranks(encoded: list[Any]) -> list[bytes]:
    """Tokens from base64; an empty list if they are not distinct or do not include all bytes.

    Only those of special tokens may be empty, which the last one is not.
    """
    try:
        ranks = [base64.b64decode(token, validate=True) for token in encoded]
    except (TypeError, ValueError):
        return []
    tokens = [token for token in ranks if token]
    has_all_bytes = {bytes((value,)) for value in range(256)} <= set(tokens)
    is_valid = has_all_bytes and len(set(tokens)) == len(tokens) and ranks[-1]
    return ranks if is_valid else []


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file. Raises ValueError naming the file for anything else."""
    return from_json(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """The content of a file; empty if there is no such file or it is not JSON.

    Raises ValueError if it is larger than a tokenizer is.
    """
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size // 2**20:,} MB, more than the "
                         f"{LARGEST_FILE // 2**20} MB of a tokenizer.")
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash that is the same for tokenizers that give the same ids."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()
