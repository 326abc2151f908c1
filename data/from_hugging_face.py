"""Read a tokenizer from Hugging Face's `tokenizer.json` (tokenizers, transformers).

Needs neither package. Reads no files.
"""

from __future__ import annotations

import json
from typing import Any

from data.bpe import LONGEST_TOKEN, MOST_SPECIAL, BPETokenizer
from data.patterns import BY_ONIGURUMA, GPT2
from data.to_hugging_face import byte_letters, halves, to_hugging_face
from data.tokenizer import (
    END_OF_TEXT,
    ENDS_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    ExtendedTokenizer,
    Tokenizer,
)

# The fields of a BPE model whose other values are not supported, with the supported ones.
PLAIN_BPE: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0), "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""), "fuse_unk": (None, False), "byte_fallback": (None, False)}


def from_hugging_face(content: Any, place: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json: the same ids as the package tokenizers gives for a text.

    Special tokens in a text are plain text here, as with `encode_special_tokens = True` there, and
    none are added around it. Byte-level BPE with a known split pattern is supported, and what
    `to_hugging_face` writes. Raises ValueError, which names `place`, for anything else.
    """
    # Whatever is missing or has another type in the file raises one of the errors below.
    try:
        model, added = content["model"], content.get("added_tokens") or []
        special = {one["content"]: one["id"] for one in added}
        vocab = {word: token for word, token in model["vocab"].items() if word not in special}
        check_ids(vocab, special)
        if model["type"] == "WordLevel":
            return characters(content, vocab, special)
        return byte_level_bpe(content, vocab, special)
    except Unsupported as error:
        raise ValueError(f"{place} cannot be used as a tokenizer: {error}. Supported is byte-level "
                         f"BPE as of GPT-2, GPT-4, Llama 3 and Qwen 2.") from None
    except (LookupError, TypeError, AttributeError, ValueError):
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
    tokenizer = with_added(CharTokenizer(letters, END_OF_TEXT in special), special)
    expected = to_hugging_face(tokenizer)
    if any(expected[name] != content[name] for name in ("model", "normalizer", "pre_tokenizer")):
        raise Unsupported("its model is WordLevel")
    return tokenizer


def with_added(base: Tokenizer, special: dict[str, int]) -> Tokenizer:
    """`base` with the special tokens that it lacks, in the order of their ids."""
    added = [word for word in sorted(special, key=special.__getitem__) if word not in base.special]
    return ExtendedTokenizer(base, added) if added else base


def byte_level_bpe(content: dict[str, Any], vocab: dict[str, int],
                   special: dict[str, int]) -> Tokenizer:
    """The tokenizer of a BPE model. Raises Unsupported naming a feature that is not."""
    # Features of the model that change its ids.
    model = content["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"its model is {model['type']}")
    for name, supported in PLAIN_BPE.items():
        if model.get(name) not in supported:
            raise Unsupported(f"its model has {name}={model[name]}")

    # The steps before the model, and its tokens in the order of their merges.
    normalizer = normalizer_of(content.get("normalizer"))
    pattern = pattern_of(content.get("pre_tokenizer"))
    in_text = tokens_in_text(content.get("added_tokens") or [], bool(normalizer))
    ranks = ranks_of(vocab, model["merges"])

    # The 256 bytes without merges are how a ByteTokenizer is exported.
    if ranks == [bytes((value,)) for value in range(256)] and not normalizer and not in_text:
        plain = with_added(ByteTokenizer(), special)
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
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return "NFC"
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
    found = []
    for one in added:
        if one.get("special"):
            continue
        flags = [name for name in ("single_word", "lstrip", "rstrip") if one.get(name)]
        if is_normalized and one.get("normalized"):
            flags.append("normalized")
        if flags:
            raise Unsupported(f"its added token {one['content']!r} has {flags[0]}=true")
        # A long text is encoded in pieces, which may end before a blank or after a line end.
        if any(letter.isspace() for letter in one["content"]):
            raise Unsupported(f"its added token {one['content']!r} contains white space")
        found.append(one["content"])
    return found


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
    missing = [value for value in range(256) if bytes((value,)) not in rank_of]
    if missing:
        raise Unsupported(f"it has no token for the byte {missing[0]}")
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
            raise Unsupported(f"its merge {left!r} {right!r} comes after one that makes a token "
                              f"with a higher id")
        pairs.add(pair)
        last = rank

    # Each token of several bytes must be made by one of the merges.
    ranks = [b""] * (max(rank_of.values()) + 1)
    for token, rank in rank_of.items():
        ranks[rank] = token
        if len(token) > 1 and tuple(halves(token, rank_of)) not in pairs:
            raise Unsupported(f"its token {token!r} is not made by its merges")
    return ranks
