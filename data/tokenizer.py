"""Tokenizers: text to token ids and back. Those of characters and bytes, and added special tokens.

Byte-pair encoding is in bpe.py. `to_json` is what tokenizer_json.py reads back.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"  # the token between documents; inside a text, it is plain text
# Its names, also in other tokenizers: Llama 3, DeepSeek, Llama 2 and RoBERTa.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>")
UNKNOWN = 2**32 - 1  # the entry of unknown characters in a table of ids


class Tokenizer(Protocol):
    """All ids are below `vocab_size`. `end_of_text` is the id between documents, or None.

    `special` has the ids of special tokens by their names, which are plain text inside a text.
    """

    vocab_size: int
    end_of_text: int | None
    special: dict[str, int]

    def encode_array(self, text: str) -> np.ndarray:
        """The ids as uint32, or uint8 for bytes; ValueError for unknown characters. Thread-safe."""

    def encode(self, text: str) -> list[int]:
        """The ids as a list."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer(Tokenizer):
    """One id for each of the given characters, in code point order."""

    def __init__(self, characters: str, with_end_of_text: bool) -> None:
        self.characters = characters
        self.end_of_text = len(characters) if with_end_of_text else None
        self.special = {END_OF_TEXT: len(characters)} if with_end_of_text else {}
        self.vocab_size = len(characters) + with_end_of_text
        self.tokens = [*characters, END_OF_TEXT][: self.vocab_size]
        codes = code_points(characters)
        # The last entry is for all higher code points.
        self.ids = np.full(int(codes.max(initial=0)) + 2, UNKNOWN, dtype=np.uint32)
        self.ids[codes] = np.arange(len(codes))

    def encode_array(self, text: str) -> np.ndarray:
        ids = self.ids[np.minimum(code_points(text), len(self.ids) - 1)]
        if (ids == UNKNOWN).any():
            unknown = sorted(set(text) - set(self.characters))
            raise ValueError(f"The tokenizer has no character {', '.join(map(repr, unknown))}: it "
                             f"knows the {len(self.characters)} characters of its training text.")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join([self.tokens[token] for token in ids]).encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters,
                "end_of_text": self.end_of_text is not None}


def code_points(text: str) -> np.ndarray:
    # "surrogatepass" keeps surrogates, so that they are reported as unknown characters.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and an end of text."""

    vocab_size, end_of_text = 257, 256
    special = {END_OF_TEXT: 256}  # noqa: RUF012

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(), dtype=np.uint8)
        except UnicodeEncodeError as error:
            raise surrogate(error) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes((i,)) if i < 256 else END_OF_TEXT.encode() for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


def surrogate(error: UnicodeEncodeError) -> ValueError:
    return ValueError(f"The text has a lone surrogate, {error.object[error.start]!r}, at character "
                      f"{error.start}: remove it, or convert the text to UTF-8.")


def bytes_of_counts(counts: np.ndarray, tokenizer: Tokenizer) -> int:
    """The bytes of the text in tokens, of which `counts` has the number of each id."""
    n_bytes = 0
    for token in np.flatnonzero(counts).tolist():
        n_bytes += int(counts[token]) * len(tokenizer.decode_bytes((token,)))
    return n_bytes


class ExtendedTokenizer(Tokenizer):
    """A tokenizer with more special tokens, `added`, whose ids follow its last id."""

    def __init__(self, base: Tokenizer, added: Sequence[str]) -> None:
        self.base, self.added = base, tuple(added)
        self.vocab_size = base.vocab_size + len(self.added)
        self.end_of_text = base.end_of_text
        self.special = dict(base.special)
        for token, word in enumerate(self.added, base.vocab_size):
            self.special[word] = token

    def encode_array(self, text: str) -> np.ndarray:
        return self.base.encode_array(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces = []
        for token in ids:
            if token < self.base.vocab_size:
                pieces.append(self.base.decode_bytes((token,)))
            else:
                pieces.append(self.added[token - self.base.vocab_size].encode())
        return b"".join(pieces)

    def to_json(self) -> dict[str, Any]:
        return self.base.to_json() | {"added": list(self.added)}


def with_special(tokenizer: Tokenizer, words: Iterable[str]) -> Tokenizer:
    """The tokenizer with those of `words` that it lacks as new special tokens, in this order."""
    missing = [word for word in words if word not in tokenizer.special]
    return ExtendedTokenizer(tokenizer, missing) if missing else tokenizer
