"""Divide plain text into documents at a separator, such as <|endoftext|> or a blank line.

Knows text in pieces; knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

from data.document import Document, cut_into_pieces

IN_MEMORY = 2**24  # characters; a longer document is read again from its file
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
LINE_END = r"(?>\r\n|\n|\r)"


def unescaped(separator: str) -> str:
    r"""`separator` with \n, \r, \t, \\, \xHH and \uHHHH as characters, and all line ends as \n."""

    def character(match: re.Match[str]) -> str:
        return ESCAPES.get(match[0][1:]) or chr(int(match[0][2:], 16))

    text = re.sub(r"\\([nrt\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", character, separator)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def pattern_of(separator: str) -> re.Pattern[str]:
    """Matches `separator` with line ends of any kind, and the line ends that follow it."""
    lines = [re.escape(line) for line in separator.split("\n")]
    return re.compile(LINE_END.join(lines) + r"[\r\n]*")


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
        if length <= IN_MEMORY:
            parts.append(text)
        else:
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
    pattern = pattern_of(separator)
    # The length of text that may be the start of a separator, with line ends of two characters.
    held_back = len(separator) + separator.count("\n") - 1
    waiting, after_separator = "", False
    for piece in pieces:
        waiting += piece
        # Line ends after a separator belong to it, also in the next piece.
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
