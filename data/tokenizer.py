"""Text to token ids and back. Four kinds, one interface, saved as JSON beside the tokens they made.

Knows no files but GPT-2's published ones, which tiktoken finds; knows no model.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import tiktoken

END_OF_TEXT = "<|endoftext|>"  # written between documents; the same words inside a text stay words

# How a trained BPE cuts text before it merges anything: GPT-4's way, words with the space before them, numbers by threes.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")


class Tokenizer(Protocol):
    """What every kind can do. `end_of_text` is the id between documents, None where there is no such id."""

    vocab_size: int
    end_of_text: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One id a character, in the order of their code points. Knows just the characters it was made from."""

    def __init__(self, characters: str, with_end_of_text: bool) -> None:
        self.characters = characters
        self.ids = {character: index for index, character in enumerate(characters)}
        self.end_of_text = len(characters) if with_end_of_text else None
        self.vocab_size = len(characters) + with_end_of_text

    def encode(self, text: str) -> list[int]:
        if unknown := set(text) - self.ids.keys():
            raise ValueError(f"The tokenizer has no character {', '.join(map(repr, sorted(unknown)))}: it knows only "
                             f"the {len(self.characters)} that occur in the text it was made from.")
        return [self.ids[character] for character in text]

    def encode_array(self, text):
        import numpy as np
        return np.array(self.encode(text), dtype=np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] if i != self.end_of_text else END_OF_TEXT for i in ids).encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters, "end_of_text": self.end_of_text is not None}


class ByteTokenizer:
    """The 256 bytes of UTF-8, and one id for the end of a text."""

    vocab_size, end_of_text = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_array(self, text):
        import numpy as np
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes((i,)) if i < 256 else END_OF_TEXT.encode() for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BPETokenizer:
    """Byte-pair encoding by tiktoken: GPT-2's own, or one trained on the corpus."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    @classmethod
    def gpt2(cls) -> BPETokenizer:
        try:
            return cls(tiktoken.get_encoding("gpt2"))
        except OSError as error:  # what requests raises, offline
            raise ValueError(f"The GPT-2 tokenizer's files could not be had ({type(error).__name__}): connect once, or "
                             f"set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept them.") from None

    @classmethod
    def from_ranks(cls, ranks: list[bytes]) -> BPETokenizer:
        return cls(tiktoken.Encoding(
            "nanohydra-bpe", pat_str=PATTERN, special_tokens={END_OF_TEXT: len(ranks)},
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        ))

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> BPETokenizer:
        """Learn `vocab_size` tokens, the end of text among them. Raises ValueError if the texts hold too few pairs."""
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, vocab_size=vocab_size - 1, pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        if len(ranks) < vocab_size - 1:
            raise ValueError(f"data.vocab_size={vocab_size} asks more of this text than it holds: "
                             f"it gives {len(ranks) + 1} tokens; set data.vocab_size={len(ranks) + 1} or less.")
        return cls.from_ranks([bytes(token) for token, _ in ranks])

    def encode(self, text: str) -> list[int]:
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # what tiktoken's Rust code raises, and no Exception
                raise
            raise ValueError("The text is more than tiktoken can split: it holds about a million spaces or more in a row; "
                             "break them up with line ends.") from None

    def encode_array(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes(list(ids))

    def to_json(self) -> dict[str, Any]:
        if self.encoding.name == "gpt2":
            return {"kind": "gpt2"}
        ranks = [self.encoding.decode_single_token_bytes(rank) for rank in range(self.end_of_text)]
        return {"kind": "bpe", "pattern": PATTERN,
                "ranks": [base64.b64encode(token).decode() for token in ranks]}


def from_json(saved: dict[str, Any], place: str) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises ValueError naming the `place` for what it cannot have written."""
    kind, keys = saved.get("kind"), saved.keys() - {"kind"}
    if kind == "gpt2" and not keys:
        return BPETokenizer.gpt2()
    if kind == "byte" and not keys:
        return ByteTokenizer()
    if kind == "char" and keys == {"characters", "end_of_text"}:
        characters, with_end = saved["characters"], saved["end_of_text"]
        if (isinstance(characters, str) and isinstance(with_end, bool) and list(characters) == sorted(set(characters))
                and not any("\ud800" <= character <= "\udfff" for character in characters)):  # UTF-8 has no bytes for these
            return CharTokenizer(characters, with_end)
    if kind == "bpe" and keys == {"pattern", "ranks"} and saved["pattern"] == PATTERN and isinstance(saved["ranks"], list):
        try:
            ranks = [base64.b64decode(token, validate=True) for token in saved["ranks"]]
        except (TypeError, ValueError, binascii.Error):
            ranks = []
        if all(ranks) and len(set(ranks)) == len(ranks) and {bytes((value,)) for value in range(256)} <= set(ranks):
            return BPETokenizer.from_ranks(ranks)
    raise ValueError(f"{place} holds no tokenizer of nanohydra's.")


def fingerprint(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that give the same ids."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()
