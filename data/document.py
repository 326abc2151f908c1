"""A document: a text of any length, in pieces that can be cut without changing its tokens.

Knows no files and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# A long text is read in pieces of about this many characters. With so few, no tokenizer fails on
# long runs of white space.
PIECE = 2**18

# Where a long text can be cut without changing its tokens. Every split pattern of the tokenizers
# starts a new match at a space after a word or number, after the end of a line that is not blank,
# and at a punctuation mark after a letter of a script without spaces.
LETTER, WORD = r"[^\W\d_]", r"[^\W_]"
# Chinese and Japanese punctuation.
MARK = r"[\u3001\u3002\u300a-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]"
CUT = re.compile(rf"(?<={WORD})(?= \S)|(?<=\S\n)(?=[^\s/])|(?<={LETTER})(?={MARK})")
# How many characters at the end of a piece are searched for a place to cut: few, then more.
CUT_WITHIN = (2**10, 2**16)


class SpecialToken(str):
    """The name of a special token, as a piece of a document between pieces of text."""

    __slots__ = ()


@dataclass(frozen=True)
class Document:
    """A text that may be larger than memory, as pieces that can be read again and again."""

    pieces: Callable[[], Iterator[str]]

    @classmethod
    def of(cls, text: str) -> Document:
        return cls(lambda: cut_into_pieces([text]))


def cut_into_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The concatenation of `texts`, in pieces that end where tokens end."""
    waiting = ""
    for text in texts:
        waiting += text
        start = 0
        while len(waiting) - start >= 2 * PIECE:
            end = place_to_cut(waiting, start)
            yield waiting[start:end]
            start = end
        waiting = waiting[start:]
    if waiting:
        yield waiting


def place_to_cut(text: str, start: int) -> int:
    """Where the piece that starts at `start` ends: after PIECE characters if no place is better."""
    end = start + PIECE
    for within in CUT_WITHIN:
        places = [match.start() for match in CUT.finditer(text, max(start + 1, end - within), end)]
        if places:
            return places[-1]
    return end
