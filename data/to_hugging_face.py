"""Write a tokenizer as Hugging Face's `tokenizer.json` (tokenizers, transformers).

Needs neither package. Writes no files.
"""

from __future__ import annotations

import math
from itertools import count, pairwise
from typing import Any

from data.bpe import BPETokenizer
from data.patterns import for_oniguruma
from data.tokenizer import CharTokenizer, ExtendedTokenizer, Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
              "use_regex": False}
EACH_CHARACTER = r"[\s\S]"


def to_hugging_face(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids as `tokenizer`.

    One difference: special tokens in a text are encoded as such, unless the program that loads the
    file sets `encode_special_tokens = True`. Unknown characters are an error there too.
    Raises ValueError for ranks that no training gives.
    """
    base = tokenizer.base if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    decoder, normalizer, in_text = BYTE_LEVEL, None, ()

    # How a text is split, and the model that makes ids of the pieces.
    if isinstance(base, CharTokenizer):
        pre_tokenizers, decoder = [split(EACH_CHARACTER)], {"type": "Fuse"}
        # Unknown characters map to "unk_token"; without an id, that is an error.
        vocab = {character: token for token, character in enumerate(base.characters)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}
    elif isinstance(base, BPETokenizer):
        pre_tokenizers = [split(for_oniguruma(base.pattern)), BYTE_LEVEL]
        model, in_text = byte_pairs(base.ranks()), base.in_text
        if base.normalizer:
            normalizer = {"type": base.normalizer}
    else:
        single_bytes = [bytes((value,)) for value in range(256)]
        pre_tokenizers, model = [BYTE_LEVEL], byte_pairs(single_bytes)

    # Special tokens, which are not split.
    special = dict(sorted(tokenizer.special.items(), key=lambda item: item[1]))
    # Special tokens take their ids from the vocabulary, which allows unused ids below them.
    model["vocab"] |= special
    added_tokens = []
    for word, token in special.items():
        added_tokens.append({"id": token, "content": word, "single_word": False, "lstrip": False,
                             "rstrip": False, "normalized": False, "special": word not in in_text})
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
            "post_processor": None, "decoder": decoder, "model": model}


def split(pattern: str) -> dict[str, Any]:
    """Split a text into the matches of `pattern`."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_pairs(ranks: list[bytes]) -> dict[str, Any]:
    """A BPE model that merges like tiktoken with these ranks."""
    letters = byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    rank_of = {token: rank for rank, token in enumerate(ranks) if token}
    merges = []
    for token in rank_of:
        if len(token) > 1:
            parts = halves(token, rank_of)
            if len(parts) > 2:
                raise ValueError(f"The tokenizer cannot be exported: its token {token!r} is not a "
                                 f"pair of tokens with lower ids.")
            # Lists of two, because "#version ..." in a single string is read as a comment.
            merges.append([written(half) for half in parts])
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {written(token): rank for token, rank in rank_of.items()}, "merges": merges}


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself if it is visible, else the next one from 256 on."""
    letters, free = [], count(256)
    for byte in range(256):
        is_visible = chr(byte).isprintable() and chr(byte) != " "
        letters.append(chr(byte if is_visible else next(free)))
    return letters


def halves(token: bytes, rank_of: dict[bytes, int]) -> list[bytes]:
    """The two tokens that were merged into `token`: those before the last merge of encoding it.

    More than two if none were.
    """
    # Merge the pair with the lowest id, until two parts are left.
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [rank_of.get(left + right, math.inf) for left, right in pairwise(parts)]
        rank = min(ranks)
        if rank > rank_of[token]:
            break
        place = ranks.index(rank)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
