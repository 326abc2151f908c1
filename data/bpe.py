"""Byte-pair encoding by tiktoken: published vocabularies, and training one on a text."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from data.patterns import PATTERN, normalized
from data.tokenizer import END_OF_TEXT, ENDS_OF_TEXT, Tokenizer, surrogate

# OpenAI's vocabularies, and the files that tiktoken downloads for them.
OPENAI = "https://openaipublic.blob.core.windows.net"
PUBLISHED = {
    "gpt2": (f"{OPENAI}/gpt-2/encodings/main/vocab.bpe",
             f"{OPENAI}/gpt-2/encodings/main/encoder.json"),
    "cl100k_base": (f"{OPENAI}/encodings/cl100k_base.tiktoken",),
    "o200k_base": (f"{OPENAI}/encodings/o200k_base.tiktoken",),
}
PUBLISHED_SIZES = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}

# The limits of a tokenizer in a file. No training here makes a longer token.
LONGEST_TOKEN = 4096  # bytes
MOST_SPECIAL = 2**16  # ids after the last merged token

# Training keeps each distinct word in memory, about 45 bytes for each byte. In Chinese or base64
# almost every word is distinct, so training stops reading after this many bytes of distinct words,
# and splits longer words. 50 MB of base64, Chinese, minified code, random words, punctuation or
# blanks then took 60 to 430 MB.
DISTINCT_BYTES = 2**23
LONGEST_WORD = 256  # characters
WORDS = re.compile(rf"\S{{1,{LONGEST_WORD}}}|\s{{2,{LONGEST_WORD}}}")
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
TEXTS_AT_ONCE = 64  # texts of up to 2 MB that are passed to training together


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken: a published vocabulary, one trained on the corpus, or a file.

    The special tokens `in_text` are also found inside a text. `normalizer` is "" or "NFC", a form
    of Unicode that a text gets before it is encoded.
    """

    def __init__(self, encoding: tiktoken.Encoding, in_text: Sequence[str] = (),
                 normalizer: str = "") -> None:
        self.encoding, self.in_text, self.normalizer = encoding, tuple(in_text), normalizer
        self.pattern = encoding._pat_str  # tiktoken has no public name for it
        words = encoding.special_tokens_set
        self.special = {word: encoding.encode_single_token(word) for word in words}
        self.vocab_size = encoding.n_vocab
        self.end_of_text = next(self.special[word] for word in ENDS_OF_TEXT if word in self.special)
        longest_first = sorted(self.in_text, key=len, reverse=True)
        self.find_in_text = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def merged(self) -> dict[bytes, int]:
        """The ids of the merged tokens."""
        tokens = self.encoding.token_byte_values()
        return {token: self.encoding.encode_single_token(token) for token in tokens}

    @cached_property
    def unused(self) -> set[int]:
        """Ids without a token, which published vocabularies have."""
        if len(self.encoding.token_byte_values()) + len(self.special) == self.vocab_size:
            return set()
        return set(range(self.vocab_size)) - {*self.merged.values(), *self.special.values()}

    @classmethod
    def published(cls, name: str) -> BPETokenizer:
        """A vocabulary of PUBLISHED. Raises ValueError if tiktoken cannot read or download it."""
        try:
            return cls(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:
            raise ValueError(missing_files(name, error)) from None

    @classmethod
    def from_ranks(cls, ranks: list[bytes], pattern: str = PATTERN,
                   special: dict[str, int] | None = None, in_text: Sequence[str] = (),
                   normalizer: str = "") -> BPETokenizer:
        """The merged tokens in the order of their ids; empty ones are ids of special tokens.

        Without `special`, the end of text is the last token.
        """
        merged = {token: rank for rank, token in enumerate(ranks) if token}
        special = special or {END_OF_TEXT: len(ranks)}
        encoding = tiktoken.Encoding("nanohydra-bpe", pat_str=pattern, mergeable_ranks=merged,
                                     special_tokens=special)
        return cls(encoding, in_text, normalizer)

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> BPETokenizer:
        """Train `vocab_size` tokens, with the end of text; ValueError if the texts give fewer.

        Of texts with very many distinct words, only the beginning is read.
        """
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(with_few_words(texts, DISTINCT_BYTES), vocab_size - 1,
                                    buffer_size=TEXTS_AT_ONCE, pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        possible = len(ranks) + 1
        if possible < vocab_size:
            raise ValueError(f"data.vocab_size={vocab_size} is too large for this text, which "
                             f"gives {possible} tokens: set data.vocab_size={possible} or less.")
        return cls.from_ranks([bytes(token) for token, _ in ranks])

    def encode_array(self, text: str) -> np.ndarray:
        if not self.in_text:
            return self.encode_plain(text)
        arrays = []
        for place, part in enumerate(self.find_in_text.split(text)):
            # Every second part is a special token.
            if place % 2:
                arrays.append(np.array([self.special[part]], dtype=np.uint32))
            else:
                arrays.append(self.encode_plain(part))
        return np.concatenate(arrays)

    def encode_plain(self, text: str) -> np.ndarray:
        """The ids of a text without special tokens."""
        if self.normalizer:
            text = normalized(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise surrogate(error) from None
        except ValueError:
            # The regular expression of the pattern overflowed its stack.
            raise ValueError("The text has a million or more blank characters in a row, too many "
                             "to split it into words: shorten them.") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids without a token, which only a model can generate, give no bytes."""
        return self.encoding.decode_bytes([token for token in ids if token not in self.unused])

    def ranks(self) -> list[bytes]:
        """The merged tokens in the order of their ids; empty ones are ids of special tokens."""
        token_of = {rank: token for token, rank in self.merged.items()}
        return [token_of.get(rank, b"") for rank in range(max(token_of) + 1)]

    def to_json(self) -> dict[str, Any]:
        if self.encoding.name in PUBLISHED:
            return {"kind": self.encoding.name}
        ranks = self.ranks()
        saved: dict[str, Any] = {"kind": "bpe", "pattern": self.pattern,
                                 "ranks": [base64.b64encode(token).decode() for token in ranks]}
        # The settings of imported tokenizers are left out where they are the usual ones, so that
        # old fingerprints stay valid.
        if self.special != {END_OF_TEXT: len(ranks)}:
            saved["special"] = self.special
        if self.in_text:
            saved["in_text"] = list(self.in_text)
        if self.normalizer:
            saved["normalizer"] = self.normalizer
        return saved


def with_few_words(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """The first of `texts`, until their distinct words have `most_bytes` of UTF-8.

    Words and runs of blanks longer than LONGEST_WORD characters are split.
    """
    seen: set[str] = set()
    for text in texts:
        # The bytes of words that are new.
        words = set(WORDS.findall(text))
        new = words - seen
        seen |= new
        most_bytes -= sum(len(word.encode("utf-8", "replace")) for word in new)
        # The text in pieces that end after LONGEST_WORD characters of a run.
        start = 0
        if any(len(word) == LONGEST_WORD for word in words):
            for run in LONG_RUN.finditer(text):
                yield text[start : run.end()]
                start = run.end()
        yield text[start:]
        if most_bytes <= 0:
            return


def missing_files(name: str, error: Exception) -> str:
    """The message about a vocabulary that tiktoken cannot load: its files and their folder."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    place = f"folder {Path(folder).absolute()}" if folder else "folder in TIKTOKEN_CACHE_DIR"
    files = []
    for url in PUBLISHED[name]:
        # tiktoken names a cached file by the hash of its address.
        files.append(f"the file {hashlib.sha1(url.encode()).hexdigest()} (a copy of {url})")
    reason = type(error).__name__ if isinstance(error, OSError) else "unexpected content"
    return (f"The tokenizer {name} needs {' and '.join(files)} in the {place}, without a download "
            f"({reason}): copy it there, or set TIKTOKEN_CACHE_DIR to a folder with it.")
