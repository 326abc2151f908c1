"""A tokenizer in Hugging Face's format, the `tokenizer.json` that the packages tokenizers and transformers read.

Knows tokenizers; knows no files, and needs neither package.
"""

from __future__ import annotations

import math
from itertools import count, pairwise
from typing import Any

from data.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def to_hugging_face(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids as `tokenizer`, of any kind.

    One thing differs: the words of a special token inside a text become that token there, unless the program that loads
    the file sets `encode_special_tokens = True`. A character that a tokenizer of characters does not have is an error
    there too. Raises ValueError for ranks that no training gives.
    """
    if isinstance(tokenizer, CharTokenizer):
        cuts, model, decoder = [split(r"[\s\S]")], characters(tokenizer.characters), {"type": "Fuse"}
    elif isinstance(tokenizer, BPETokenizer):
        cuts, model, decoder = [split(oniguruma(tokenizer.pattern)), BYTE_LEVEL], byte_pairs(tokenizer.ranks()), BYTE_LEVEL
    else:
        cuts, model, decoder = [BYTE_LEVEL], byte_pairs([bytes((value,)) for value in range(256)]), BYTE_LEVEL
    special = special_tokens(tokenizer)
    model["vocab"] |= special  # a special token takes its id from here, also where ids below it have no token
    added = [{"id": token, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for word, token in special.items()]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts}, "post_processor": None, "decoder": decoder,
            "model": model}


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The words and ids of the special tokens, in the order of their ids."""
    if isinstance(tokenizer, BPETokenizer):
        return dict(sorted(tokenizer.special.items(), key=lambda item: item[1]))
    return {} if tokenizer.end_of_text is None else {END_OF_TEXT: tokenizer.end_of_text}


def split(pattern: str) -> dict[str, Any]:
    """Cut a text into what `pattern` finds, one after the other."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def oniguruma(pattern: str) -> str:
    """A split pattern of tiktoken's for the library that Hugging Face reads it with.

    That takes `{1,3}+` for `{1,3}` one or more times, not for what gives nothing back; and there is nothing to give it to.
    """
    return pattern.replace("{1,3}+", "{1,3}")


def characters(known: str) -> dict[str, Any]:
    """A model of one id a character. It wants a word for what is unknown; one that has no id makes that an error."""
    return {"type": "WordLevel", "vocab": {character: token for token, character in enumerate(known)}, "unk_token": ""}


def byte_pairs(ranks: list[bytes]) -> dict[str, Any]:
    """A model that merges as tiktoken does with these ranks."""
    letters = byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    rank_of = {token: rank for rank, token in enumerate(ranks)}
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {written(token): rank for rank, token in enumerate(ranks)},
            # Each a list of two: of merges in one string, a reader takes "#version ..." for a heading.
            "merges": [[written(half) for half in halves(token, rank_of)] for token in ranks if len(token) > 1]}


def byte_letters() -> list[str]:
    """GPT-2's way to write each byte as one visible letter: itself, or where it cannot be seen, the next one from 256 on."""
    free = map(chr, count(256))
    return [chr(byte) if chr(byte).isprintable() and chr(byte) != " " else next(free) for byte in range(256)]


def halves(token: bytes, rank_of: dict[bytes, int]) -> list[bytes]:
    """The two tokens that training merged into `token`: what encoding it leaves just before its own merge.

    Raises ValueError if encoding never gets there.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = enumerate(pairwise(parts))
        rank, place = min((rank_of.get(left + right, math.inf), place) for place, (left, right) in pairs)
        if rank > rank_of[token]:
            raise ValueError(f"The tokenizer cannot be exported: its token {token!r} is no pair of tokens with lower ids.")
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
