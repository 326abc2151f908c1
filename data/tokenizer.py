"""Text to token ids and back. Each kind has one interface, and is saved as JSON beside the tokens it made.

Knows no files but the published ones, which tiktoken finds; knows no model.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"  # written between documents; the same words inside a text stay words

# How a trained BPE cuts text before it merges anything: GPT-4's way, words with the space before them, numbers by threes.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
LONG_BLANK = ("The text holds a million or more blank characters in a row, which is more than splitting it into words "
              "can take: shorten them.")

# OpenAI's vocabularies, and the files that tiktoken downloads for them once.
OPENAI = "https://openaipublic.blob.core.windows.net"
PUBLISHED = {
    "gpt2": (f"{OPENAI}/gpt-2/encodings/main/vocab.bpe", f"{OPENAI}/gpt-2/encodings/main/encoder.json"),
    "cl100k_base": (f"{OPENAI}/encodings/cl100k_base.tiktoken",),
    "o200k_base": (f"{OPENAI}/encodings/o200k_base.tiktoken",),
}

# Training keeps each different word in memory, and takes about 45 bytes for each byte of them. In
# Chinese or base64 almost every word is different. So it reads until it has seen this many bytes of
# them, and cuts longer words. With the texts that it holds, 50 MB of base64, Chinese, minified code,
# random words, marks or blanks took 60 to 430 MB.
DISTINCT_BYTES = 2**23
LONGEST_WORD = 256  # characters
WORDS = re.compile(rf"\S{{1,{LONGEST_WORD}}}|\s{{2,{LONGEST_WORD}}}")
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
TEXTS_AT_ONCE = 64  # that are handed to training, each of up to 2 MB

# The longest token that is loaded, which no training here exceeds, and the largest file.
LONGEST_TOKEN = 4096  # bytes
LARGEST_FILE = 2**26  # bytes

UNKNOWN = 2**32 - 1  # in a table from characters to ids, and no id


class Tokenizer(Protocol):
    """What every kind can do.

    `vocab_size` is above every id. `end_of_text` is the id between documents, None where there is no such id.
    """

    vocab_size: int
    end_of_text: int | None

    def encode_array(self, text: str) -> np.ndarray:
        """The ids as uint32, or uint8 from a tokenizer of bytes. Threads may call it at the same time.

        Raises ValueError for a text that the tokenizer cannot take.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of `encode_array`, as a list."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer(Tokenizer):
    """One id a character, in the order of their code points. Knows just the characters it was made from."""

    def __init__(self, characters: str, with_end_of_text: bool) -> None:
        self.characters = characters
        self.end_of_text = len(characters) if with_end_of_text else None
        self.vocab_size = len(characters) + with_end_of_text
        codes = code_points(characters)
        self.ids = np.full(int(codes.max(initial=0)) + 2, UNKNOWN, dtype=np.uint32)  # the last stands for all above
        self.ids[codes] = np.arange(len(codes))

    def encode_array(self, text: str) -> np.ndarray:
        ids = self.ids[np.minimum(code_points(text), len(self.ids) - 1)]
        if (ids == UNKNOWN).any():
            unknown = sorted(set(text) - set(self.characters))
            raise ValueError(f"The tokenizer has no character {', '.join(map(repr, unknown))}: it knows only "
                             f"the {len(self.characters)} that occur in the text it was made from.")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] if i != self.end_of_text else END_OF_TEXT for i in ids).encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters, "end_of_text": self.end_of_text is not None}


def code_points(text: str) -> np.ndarray:
    """The number of each character, also of half a character, which UTF-8 could not hold."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and one id for the end of a text."""

    vocab_size, end_of_text = 257, 256

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(), dtype=np.uint8)
        except UnicodeEncodeError as error:
            raise half_character(error) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes((i,)) if i < 256 else END_OF_TEXT.encode() for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


def half_character(error: UnicodeEncodeError) -> ValueError:
    return ValueError(f"The text holds {error.object[error.start]!r} at character {error.start}, a part of a character "
                      f"that was cut or is in another encoding: leave it out, or convert the text to UTF-8.")


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken: a published one, or one trained on the corpus."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.pattern = encoding._pat_str  # tiktoken keeps it, but has no public name for it
        self.n_ranks = len(encoding.token_byte_values())  # merged tokens have the ids below it, special ones those above
        self.special = {word: encoding.encode_single_token(word) for word in encoding.special_tokens_set}
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token
        self.unused = set(range(self.n_ranks, self.vocab_size)) - set(self.special.values())  # published ones have holes

    @classmethod
    def published(cls, name: str) -> BPETokenizer:
        """One of PUBLISHED. Raises ValueError naming files and folder if tiktoken has them not and cannot get them."""
        try:
            return cls(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:  # what requests and a full disk raise, and tiktoken for a wrong file
            raise ValueError(missing_files(name, error)) from None

    @classmethod
    def from_ranks(cls, ranks: list[bytes]) -> BPETokenizer:
        return cls(tiktoken.Encoding(
            "nanohydra-bpe", pat_str=PATTERN, special_tokens={END_OF_TEXT: len(ranks)},
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        ))

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> BPETokenizer:
        """Learn `vocab_size` tokens, the end of text among them.

        Of texts with very many different words, only the first are read. Raises ValueError if the
        texts hold too few pairs.
        """
        import rustbpe

        trainer = rustbpe.Tokenizer()
        sample = with_few_words(texts, DISTINCT_BYTES)
        trainer.train_from_iterator(
            sample, vocab_size=vocab_size - 1, buffer_size=TEXTS_AT_ONCE, pattern=PATTERN
        )
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        if len(ranks) < vocab_size - 1:
            raise ValueError(f"data.vocab_size={vocab_size} asks more of this text than it holds: "
                             f"it gives {len(ranks) + 1} tokens; set data.vocab_size={len(ranks) + 1} or less.")
        return cls.from_ranks([bytes(token) for token, _ in ranks])

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())  # special words are words, and no error
        except UnicodeEncodeError as error:
            raise half_character(error) from None
        except ValueError:  # the split pattern ran out of stack
            raise ValueError(LONG_BLANK) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids that no token has, which only a model can give, are no bytes."""
        return self.encoding.decode_bytes([token for token in ids if token not in self.unused])

    def ranks(self) -> list[bytes]:
        """The tokens that merging makes, in the order of their ids."""
        return [self.encoding.decode_single_token_bytes(rank) for rank in range(self.n_ranks)]

    def to_json(self) -> dict[str, Any]:
        if self.encoding.name in PUBLISHED:
            return {"kind": self.encoding.name}
        return {"kind": "bpe", "pattern": PATTERN,
                "ranks": [base64.b64encode(token).decode() for token in self.ranks()]}


def with_few_words(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """The first of `texts`, until their different words have `most_bytes` of UTF-8.

    Words and runs of blanks of more than LONGEST_WORD characters are cut.
    """
    seen: set[str] = set()
    for text in texts:
        words = set(WORDS.findall(text))
        new = words - seen
        seen |= new
        most_bytes -= sum(len(word.encode("utf-8", "replace")) for word in new)
        start = 0
        if any(len(word) == LONGEST_WORD for word in words):
            for run in LONG_RUN.finditer(text):
                yield text[start : run.end()]
                start = run.end()
        yield text[start:]
        if most_bytes <= 0:
            return


def missing_files(name: str, error: Exception) -> str:
    """One sentence about a published vocabulary that could not be had: its files, and where tiktoken looks for them."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    files = {Path(folder, hashlib.sha1(url.encode()).hexdigest()): url for url in PUBLISHED[name]}  # tiktoken's names
    missing = [path for path in files if not (folder and path.is_file())] or list(files)  # there, but cannot be read
    them = "it" if len(missing) == 1 else "them"
    listed = " and ".join(f"the file {path.name} (a copy of {files[path]})" for path in missing)
    place = f"the folder {Path(folder).absolute()}" if folder else "a folder that TIKTOKEN_CACHE_DIR names"
    reason = type(error).__name__ if isinstance(error, OSError) else "another file came"
    return (f"The tokenizer {name} needs {listed} in {place}, and tiktoken could neither read {them} there nor download "
            f"{them} ({reason}): put {them} there, or set TIKTOKEN_CACHE_DIR to a folder that holds {them}.")


def from_json(saved: dict[str, Any], place: str) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises ValueError naming the `place` for what it cannot have written."""
    kind, keys = saved.get("kind"), saved.keys() - {"kind"}
    if isinstance(kind, str) and kind in PUBLISHED and not keys:
        return BPETokenizer.published(kind)
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
        if too_long := [len(token) for token in ranks if len(token) > LONGEST_TOKEN]:
            raise ValueError(
                f"{place} has a token of {max(too_long):,} bytes, and {LONGEST_TOKEN:,} is the most "
                f"that is read: it was not trained here, or is damaged."
            )
        if all(ranks) and len(set(ranks)) == len(ranks) and {bytes((value,)) for value in range(256)} <= set(ranks):
            return BPETokenizer.from_ranks(ranks)
    raise ValueError(f"{place} holds no tokenizer of nanohydra's.")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file. Raises ValueError naming it where it holds none."""
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path} has {path.stat().st_size // 2**20:,} MB, and no tokenizer of nanohydra's has "
            f"more than {LARGEST_FILE // 2**20}."
        )
    try:
        saved = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        saved = None
    return from_json(saved if isinstance(saved, dict) else {}, str(path))


def fingerprint(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that give the same ids."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()
