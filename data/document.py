"""A document: a text of any length, in pieces that can be cut without changing its tokens.

A plain text is one document, or several between separators, such as <|endoftext|> or a blank line.
Knows no files and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

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

# A longer document between two separators is read again from its file.
IN_MEMORY = 2**24  # characters
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
LINE_END = r"(?>\r\n|\n|\r)"


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


# Separators


def unescaped(separator: str) -> str:
    r"""`separator` with \n, \r, \t, \\, \xHH and \uHHHH as characters, and all line ends as \n."""

    def character(match: re.Match[str]) -> str:
        return ESCAPES.get(match[0][1:]) or chr(int(match[0][2:], 16))

    text = re.sub(r"\\([nrt\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", character, separator)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def divide(read: Callable[[], Iterator[str]], separator: str) -> Iterator[Document]:
    """The documents between separators, without blank ones.

    `read` returns the text in pieces, from its start each time. At most IN_MEMORY characters are
    kept in memory.
    """
    parts: list[str] = []
    length, index = 0, 0
    for text, is_end in with_ends(read(), separator):
        # Keep the document in memory, unless it is long.
        length += len(text)
        parts.append(text)
        if length > IN_MEMORY:
            parts.clear()
        if not is_end:
            continue

        # The document is complete. A long one is read from the text again.
        document = Document.of("".join(parts))
        if length > IN_MEMORY:
            document = Document(partial(read_again, read, separator, index))
        if any(piece.strip() for piece in document.pieces()):
            yield document
        parts.clear()
        length, index = 0, index + 1


def read_again(read: Callable[[], Iterator[str]], separator: str, index: int) -> Iterator[str]:
    """The document at `index`, read from the start of the text, in pieces."""

    def parts() -> Iterator[str]:
        current = 0
        for text, is_end in with_ends(read(), separator):
            if current == index:
                yield text
            current += is_end
            if current > index:
                return

    return cut_into_pieces(parts())


def with_ends(pieces: Iterator[str], separator: str) -> Iterator[tuple[str, bool]]:
    """The text without its separators, in pieces, and whether a document ends after each piece."""
    # Line ends of any kind match, and those that follow a separator belong to it.
    lines = map(re.escape, separator.split("\n"))
    pattern = re.compile(LINE_END.join(lines) + r"[\r\n]*")
    # The length of text that may be the start of a separator, with line ends of two characters.
    held_back = len(separator) + separator.count("\n") - 1
    waiting, after_separator = "", False
    for piece in pieces:
        waiting += piece
        # Line ends after a separator may be in the next piece.
        if after_separator:
            waiting = waiting.lstrip("\r\n")
            after_separator = not waiting
        start = 0
        for match in pattern.finditer(waiting):
            yield waiting[start : match.start()], True
            start = match.end()
            after_separator = start == len(waiting)
        # What follows the last separator, without what may be the start of another one.
        end = max(start, len(waiting) - held_back)
        if end > start:
            yield waiting[start:end], False
        waiting = waiting[end:]
    yield waiting, True
