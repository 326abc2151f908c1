"""Read tokenizers from JSON: what `to_json` gave, or the file that `data.tokenizer=` names."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import atomic
from data.bpe import LONGEST_TOKEN, MOST_SPECIAL, PUBLISHED, PUBLISHED_SIZES, BPETokenizer
from data.hugging_face import from_hugging_face
from data.patterns import KNOWN
from data.tokenizer import ENDS_OF_TEXT, ByteTokenizer, CharTokenizer, ExtendedTokenizer, Tokenizer

LARGEST_FILE = 2**26  # bytes
SURROGATES = "[\ud800-\udfff]"


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
        # Characters in order, and none that UTF-8 cannot encode.
        case {"kind": "char", "characters": str(characters), "end_of_text": bool(with_end), **rest}:
            is_sorted = list(characters) == sorted(set(characters))
            if is_sorted and not rest and not re.search(SURROGATES, characters):
                return CharTokenizer(characters, with_end)
        # Byte-pair encoding, by one of the patterns that are supported.
        case {"kind": "bpe", "pattern": pattern, "ranks": list(encoded), **rest}:
            ranks = decode_ranks(encoded)
            longest = max(map(len, ranks), default=0)
            if longest > LONGEST_TOKEN:
                raise ValueError(f"{place} has a token of {longest:,} bytes, more than the allowed "
                                 f"{LONGEST_TOKEN:,}: it was not trained here, or is damaged.")
            if ranks and pattern in KNOWN and are_options(rest, ranks):
                return BPETokenizer.from_ranks(ranks, pattern, **rest)
    raise ValueError(f"{place} is not a nanohydra tokenizer.")


def are_words(words: list[Any]) -> bool:
    """Whether the names of special tokens are distinct texts that UTF-8 can encode."""
    for word in words:
        if not isinstance(word, str) or not word or re.search(SURROGATES, word):
            return False
    return len(set(words)) == len(words)


def are_options(options: dict[str, Any], ranks: list[bytes]) -> bool:
    """Whether these are valid arguments of `BPETokenizer.from_ranks`."""
    default = {"special": {ENDS_OF_TEXT[0]: len(ranks)}, "in_text": [], "normalizer": ""}
    match default | options:
        case {"special": dict(special), "in_text": list(in_text), "normalizer": "" | "NFC", **rest}:
            # The ids of special tokens are not those of merged tokens, and include the end of text.
            free = {rank for rank, token in enumerate(ranks) if not token}
            free |= set(range(len(ranks), len(ranks) + MOST_SPECIAL))
            ids = list(special.values())
            are_ids = all(type(token) is int for token in ids) and set(ids) <= free
            has_end = not special.keys().isdisjoint(ENDS_OF_TEXT)
            return (not rest and are_words(list(special)) and are_words(in_text) and are_ids
                    and len(set(ids)) == len(ids) and has_end and set(in_text) <= set(special))
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
    if not atomic.is_regular(path):
        return {}
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size // 2**20:,} MB, more than the "
                         f"{LARGEST_FILE // 2**20} MB of a tokenizer.")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash that is the same for tokenizers that give the same ids."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()


def find_tokenizer(path: str) -> Path:
    """The file of a tokenizer: `path` itself, a run's, or the `tokenizer.json` in a folder.

    Raises ValueError if there is none.
    """
    place = Path(path)
    if place.is_file():
        return place
    # Of a run, the tokenizer in its last checkpoint.
    saved = sorted(place.glob("checkpoints/step_*/tokenizer.json"))
    found = saved[-1] if saved else place / "tokenizer.json"
    if not found.is_file():
        raise ValueError(f"data.tokenizer={path} has no tokenizer.json: name such a file, or the "
                         f"folder of a run, of prepared tokens or of a model.")
    return found


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of bytes, a published one, or that at `path` in our or Hugging Face's format.

    Raises ValueError if there is none, and for a tokenizer with features that are not supported.
    """
    if path == "byte" or path in PUBLISHED:
        return from_json({"kind": path}, f"data.tokenizer={path}")
    file = find_tokenizer(path)
    content = read_json(file)
    if isinstance(content, dict) and "kind" in content:
        return from_json(content, str(file))
    return from_hugging_face(content, str(file))


def planned_size(name: str, vocab_size: int) -> int | None:
    """The number of tokens of `data.tokenizer=NAME`; None where the text decides it."""
    sizes = {**PUBLISHED_SIZES, "byte": ByteTokenizer.vocab_size, "bpe": vocab_size, "char": None}
    return sizes[name] if name in sizes else open_tokenizer(name).vocab_size
