"""Plain text to documents where a separator stands between them, such as <|endoftext|> or a blank line.

Knows text in pieces; knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

from data.files import Document, cut_into_pieces

IN_MEMORY = 2**24  # characters; a longer document is read again from its file
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
LINE_END = r"(?>\r\n|\n|\r)"


def unescaped(separator: str) -> str:
    r"""A separator as it is typed: \n, \r, \t, \\, \xHH and \uHHHH stand for characters. All line ends become \n."""
    def character(match: re.Match[str]) -> str:
        return ESCAPES[match[1]] if match[1] else chr(int(match[2] or match[3], 16))

    plain = re.sub(r"\\(?:([nrt\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))", character, separator)
    return plain.replace("\r\n", "\n").replace("\r", "\n")


def pattern_of(separator: str) -> re.Pattern[str]:
    """What separates two documents: `separator`, with line ends of any kind, and the line ends right behind it."""
    lines = [re.escape(line) for line in separator.split("\n")]
    return re.compile(LINE_END.join(lines) + r"[\r\n]*")


def divide(read: Callable[[], Iterator[str]], separator: str) -> Iterator[Document]:
    """The documents between separators, without blank ones.

    `read` gives the text in pieces, from its beginning each time. No more than IN_MEMORY of it is kept.
    """
    parts: list[str] = []
    length, number = 0, 0
    for text, ends in chain(marked(read(), separator), [("", True)]):
        length += len(text)
        if length <= IN_MEMORY:
            parts.append(text)
        else:
            parts.clear()
        if ends:
            if length > IN_MEMORY:
                document = Document(partial(read_again, read, separator, number))
            else:
                document = Document.of("".join(parts))
            if any(piece.strip() for piece in document.pieces()):
                yield document
            parts.clear()
            length, number = 0, number + 1


def read_again(read: Callable[[], Iterator[str]], separator: str, number: int) -> Iterator[str]:
    """The text between two separators, from the beginning of the file, in pieces that end where tokens end."""
    def between() -> Iterator[str]:
        at = 0
        for text, ends in marked(read(), separator):
            if at == number:
                yield text
            if ends:
                at += 1
            if at > number:
                break

    return cut_into_pieces(between())


def marked(pieces: Iterator[str], separator: str) -> Iterator[tuple[str, bool]]:
    """The text without its separators, in pieces, and whether a document ends behind each piece."""
    pattern = pattern_of(separator)
    held_back = len(separator) + separator.count("\n") - 1  # what could be the beginning of a separator
    waiting, behind_separator = "", False
    for piece in pieces:
        waiting += piece
        if behind_separator:
            waiting = waiting.lstrip("\r\n")
            behind_separator = not waiting
        start = 0
        for match in pattern.finditer(waiting):
            yield waiting[start : match.start()], True
            start = match.end()
            behind_separator = start == len(waiting)
        end = max(start, len(waiting) - held_back)
        if end > start:
            yield waiting[start:end], False
        waiting = waiting[end:]
    if waiting:
        yield waiting, False
