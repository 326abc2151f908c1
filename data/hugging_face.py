"""Read and write tokenizers as Hugging Face's `tokenizer.json` (tokenizers, transformers).

Needs neither package. Reads and writes no files.
"""

import json
import math
from itertools import count, pairwise
from typing import Any

from data.bpe import LONGEST_TOKEN, MOST_SPECIAL, BPETokenizer
from data.patterns import BY_ONIGURUMA, GPT2, for_oniguruma
from data.tokenizer import (
    END_OF_TEXT,
    ENDS_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    ExtendedTokenizer,
    Tokenizer,
    with_special,
)

BYTES = [bytes((value,)) for value in range(256)]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
              "use_regex": False}
EACH_CHARACTER = r"[\s\S]"
# The fields of a BPE model that must be empty, null, zero or false.
UNSUPPORTED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
               "byte_fallback")


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
        pre_tokenizers, model = [BYTE_LEVEL], byte_pairs(BYTES)

    # Special tokens are not split. They take their ids from the vocabulary, which allows unused ids
    # below them.
    special = dict(sorted(tokenizer.special.items(), key=lambda item: item[1]))
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
        return "".join(map(letters.__getitem__, token))

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


# Read a tokenizer.json


def from_hugging_face(content: Any, place: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json: the same ids as the package tokenizers gives for a text.

    Special tokens in a text are plain text here, as with `encode_special_tokens = True` there, and
    none are added around it. Byte-level BPE with a known split pattern is supported, and what
    `to_hugging_face` writes. Raises ValueError, which names `place`, for anything else.
    """
    # Whatever is missing or has another type in the file raises one of the errors below.
    try:
        model, added = content["model"], content.get("added_tokens") or []
        by_id = sorted(added, key=lambda one: one["id"])
        special = {one["content"]: one["id"] for one in by_id}
        vocab = {word: token for word, token in model["vocab"].items() if word not in special}
        check_ids(vocab, special)
        # Only our own exports of character tokenizers have such a model.
        if model["type"] == "WordLevel":
            return characters(content, vocab, special)
        return byte_level_bpe(content, vocab, special)
    except Unsupported as error:
        raise ValueError(f"{place} cannot be used as a tokenizer: {str(error)[:500]}. Supported is "
                         f"byte-level BPE as of GPT-2, GPT-4, Llama 3 and Qwen 2.") from None
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(f"{place} is not a tokenizer: give a tokenizer.json of Hugging Face or of "
                         f"nanohydra.") from None


class Unsupported(Exception):
    """A feature of a tokenizer.json that is not supported, as the middle of a sentence."""


def check_ids(vocab: dict[str, int], special: dict[str, int]) -> None:
    ids = [*vocab.values(), *special.values()]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise TypeError("an id is not a number")
    if len(set(ids)) < len(ids):
        raise Unsupported("two of its tokens have the same id")
    if max(ids) >= len(ids) + MOST_SPECIAL:
        raise Unsupported(f"its largest id is {max(ids):,}, and it has {len(ids):,} tokens")


def characters(content: dict[str, Any], vocab: dict[str, int],
               special: dict[str, int]) -> Tokenizer:
    """A character tokenizer that was exported from here."""
    letters = "".join(sorted(set("".join(vocab))))
    tokenizer = with_special(CharTokenizer(letters, END_OF_TEXT in special), special)
    expected = to_hugging_face(tokenizer)
    if any(expected[name] != content[name] for name in ("model", "normalizer", "pre_tokenizer")):
        raise Unsupported("its model is WordLevel")
    return tokenizer


def byte_level_bpe(content: dict[str, Any], vocab: dict[str, int],
                   special: dict[str, int]) -> Tokenizer:
    """The tokenizer of a BPE model. Raises Unsupported naming a feature that is not."""
    # Features of the model that change its ids.
    model = content["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"its model is {model['type']}")
    for name in UNSUPPORTED:
        if model.get(name):
            raise Unsupported(f"its model has {name}={model[name]}")

    # The steps before the model, and its tokens in the order of their merges.
    normalizer = normalizer_of(content.get("normalizer"))
    pattern = pattern_of(content.get("pre_tokenizer"))
    in_text = tokens_in_text(content.get("added_tokens") or [], bool(normalizer))
    ranks = ranks_of(vocab, model["merges"])

    # The 256 bytes without merges are how a ByteTokenizer is exported.
    if ranks == BYTES and not normalizer and not in_text:
        plain = with_special(ByteTokenizer(), special)
        if plain.special == special:
            return plain
    if not pattern:
        raise Unsupported("it merges bytes without splitting a text into words first")
    # Training needs an end of text, which becomes the last token.
    if special.keys().isdisjoint(ENDS_OF_TEXT):
        special = special | {END_OF_TEXT: max([len(ranks) - 1, *special.values()]) + 1}
    return BPETokenizer.from_ranks(ranks, pattern, special, in_text, normalizer)


def normalizer_of(content: dict[str, Any] | None) -> str:
    """The normal form of Unicode that texts are brought to; empty for none."""
    match content:
        case None | {"type": "Sequence", "normalizers": []}:
            return ""
        case {"type": "NFC"}:
            return "NFC"
        case {"type": "Sequence", "normalizers": [only]}:
            return normalizer_of(only)
    raise Unsupported(f"its normalizer is {content['type']}")


def pattern_of(content: dict[str, Any] | None) -> str:
    """The pattern that splits a text into words; empty for none."""
    # The last step must be ByteLevel, which shows bytes as characters.
    steps = [content]
    if content and content["type"] == "Sequence":
        steps = content["pretokenizers"]
    if not steps or not steps[-1] or steps[-1]["type"] != "ByteLevel":
        raise Unsupported("its pre_tokenizer does not end with ByteLevel")
    *before, byte_level = steps
    if byte_level.get("add_prefix_space", True):
        raise Unsupported("its pre_tokenizer has add_prefix_space=true")

    # ByteLevel itself splits by GPT-2's pattern or not at all. Else the pattern is in one Split
    # before it, whose matches are the words.
    splits = byte_level.get("use_regex", True)
    match before:
        case []:
            return GPT2 if splits else ""
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False}] if not splits and pattern in BY_ONIGURUMA:
            return BY_ONIGURUMA[pattern]
    raise Unsupported(f"its pre_tokenizer has other steps before ByteLevel than one Split by a "
                      f"known pattern: {json.dumps(before):.400}")


def tokens_in_text(added: list[dict[str, Any]], is_normalized: bool) -> list[str]:
    """The added tokens that are also found inside a text."""
    in_text = [one for one in added if not one.get("special")]
    names = ["single_word", "lstrip", "rstrip"]
    if is_normalized:
        names.append("normalized")
    for one in in_text:
        for name in names:
            if one.get(name):
                raise Unsupported(f"its added token {one['content']!r} has {name}=true")
        # A long text is encoded in pieces, which may end before a blank or after a line end.
        if any(letter.isspace() for letter in one["content"]):
            raise Unsupported(f"its added token {one['content']!r} contains white space")
    return [one["content"] for one in in_text]


def ranks_of(vocab: dict[str, int], merges: list[Any]) -> list[bytes]:
    """The tokens in the order of their ids, if merging by ids gives the same as by `merges`."""
    # Tokens are written in GPT-2's letters for bytes.
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    rank_of = {}
    for word, rank in vocab.items():
        if not set(word) <= set(byte_of) or not word:
            raise Unsupported(f"its token {word!r} is not written in the letters of ByteLevel")
        rank_of[bytes(map(byte_of.__getitem__, word))] = rank

    # Every text can be encoded, and no token is too long.
    missing = set(BYTES) - rank_of.keys()
    if missing:
        raise Unsupported(f"it has no token for the byte {min(missing)[0]}")
    longest = max(rank_of, key=len)
    if len(longest) > LONGEST_TOKEN:
        raise Unsupported(f"it has a token of {len(longest):,} bytes")

    # tiktoken merges in the order of the ids, so that must be the order of the merges.
    pairs, last = set(), -1
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair = bytes(map(byte_of.__getitem__, left)), bytes(map(byte_of.__getitem__, right))
        rank = rank_of[b"".join(pair)]
        if rank < last:
            raise Unsupported(f"its merge {left!r} {right!r} comes after one with a higher id")
        pairs.add(pair)
        last = rank

    # Each token of several bytes must be made by one of the merges.
    for token in rank_of:
        if len(token) > 1 and tuple(halves(token, rank_of)) not in pairs:
            raise Unsupported(f"its token {token!r} is not made by its merges")
    token_of = {rank: token for token, rank in rank_of.items()}
    return [token_of.get(rank, b"") for rank in range(max(token_of) + 1)]
