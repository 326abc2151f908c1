"""Bytes to text: byte order marks, other encodings than UTF-8, and a guess where none is named.

Every error names the file and the offset. Knows no records and no tokens.
"""

from __future__ import annotations

import codecs
import io
import re
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

BLOCK = 2**16

# The longer marks come first: UTF-32's begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Without a mark, Python's decoders of these names refuse to guess the order of bytes.
WITHOUT_MARK = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}

# How files begin that are not text, whatever they are named.
OTHER_FORMATS = {
    b"\x1f\x8b": "gzip: give it the ending .gz",
    b"\x28\xb5\x2f\xfd": "zstd: give it the ending .zst",
    b"BZh": "bzip2: give it the ending .bz2",
    b"\xfd7zXZ": "xz: give it the ending .xz",
    b"PAR1": "Parquet: give it the ending .parquet",
    b"PK\x03\x04": "zip, as are documents of office programs: unpack it, or save it as text",
    b"%PDF": "PDF: save it as text",
}

# Encodings that a message may suggest, with characters that are frequent in their languages.
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
WESTERN = "éèêëáàâäãåæçíìîïñóòôöõøœßúùûüýÿÉÀÄÖÜ\u2019\u2018\u201c\u201d\u2013\u2014\u2026«»°§©"
CENTRAL = "áéíóúýčďěňřšťůžąćęłńóśźżöüőűäâîŠČŽŘ\u201e\u201d\u2013"
CYRILLIC = "оеаинтсрвлкмдпуяыьгз"
GREEK = "αβγδεζηθικλμνξοπρστυφχψωςάέήίόύώϊ"
JAPANESE = "のにはをたがでてとしれさいるなもかっりアイスントルーきくまれみろんちほへ。、"
KOREAN = "이다는의에을가고하지도로한기은를서사자나인리어만시해그대일"
CHINESE = "的一是不了在人有我他这這個个上们們国國说說来來到大中。"
LATIN = {
    "latin-1": WESTERN,
    "cp1252": WESTERN,
    "iso-8859-2": CENTRAL,
    "cp1250": CENTRAL,
}
OTHER_SCRIPTS = {
    "cp1251": CYRILLIC,
    "koi8-r": CYRILLIC,
    "cp1253": GREEK,
    "cp932": JAPANESE,
    "euc_jp": JAPANESE,
    "euc_kr": KOREAN,
    "gb18030": CHINESE,
    "big5": CHINESE,
}
LEAST_SHARE = 0.2  # of a text in its language; the shares of other encodings are smaller


def take_mark(stream: Any) -> bytes:
    """Read past a byte order mark, and return it; without one, read nothing."""
    head = stream.peek(4)
    for mark in MARKS:
        if head.startswith(mark):
            return stream.read(len(mark))
    return b""


class Decoder:
    """Decodes a file block by block. Raises ValueError for bytes that are not text in `encoding`.

    `errors` is "strict", or "replace" to decode them to replacement characters. `offset` is where
    the first block begins in the decompressed file.
    """

    def __init__(self, path: Path, encoding: str, errors: str, offset: int) -> None:
        self.path, self.errors, self.offset = path, errors, offset
        self.encoding = codecs.lookup(WITHOUT_MARK.get(codecs.lookup(encoding).name, encoding)).name
        self.decoder = codecs.getincrementaldecoder(self.encoding)(errors)

    def decode(self, block: bytes, final: bool = False) -> str:
        # The bytes of a character that began in the block before.
        waiting = len(self.decoder.getstate()[0])
        is_utf8 = self.encoding == "utf-8"
        if is_utf8 and self.errors == "strict" and 0 in block:
            raise self.refusal(block, block.index(0), 0)
        try:
            text = self.decoder.decode(block, final)
        except UnicodeDecodeError as error:
            raise self.refusal(error.object, error.start, waiting) from None
        if not is_utf8 and self.errors == "strict" and "\0" in text:
            start = len(text[: text.index("\0")].encode(self.encoding, "replace"))
            raise self.refusal(block, min(start, len(block) - 1), waiting)
        self.offset += len(block)
        return text

    def refusal(self, block: bytes, start: int, waiting: int) -> ValueError:
        place = f"byte 0x{block[start]:02x} at offset {self.offset - waiting + start}"
        return ValueError(f"{self.path} {not_text(self.encoding, block, place)}")


def not_text(encoding: str, block: bytes, place: str) -> str:
    """What a message says about a file with bytes that are not text, and what to do."""
    for start, advice in OTHER_FORMATS.items():
        if block.startswith(start):
            return f"is not text but {advice}."
    name = encoding.upper() if encoding.startswith("utf") else encoding
    replace = "data.errors=replace to read a replacement character there"
    guess = likely_encoding(block)
    if guess and codecs.lookup(guess).name != codecs.lookup(encoding).name:
        advice = f"set data.encoding={guess}, or {replace}"
        return f"is not {name}: {place}; it looks like {guess}: {advice}."
    if place.startswith("byte 0x00"):
        return f"is not text: {place}; leave it out, or set data.errors=replace."
    advice = f"set data.encoding=NAME if it has another encoding, or {replace}"
    return f"is not {name}: {place}; {advice}."


def likely_encoding(block: bytes) -> str:
    """The encoding of a block that is not UTF-8, by the most frequent characters of many languages.

    Empty if none fits, and for UTF-8 that is cut short or has only some damaged bytes.
    """
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(block)
        if 0 not in block:
            return ""
    valid = block.decode("utf-8", "replace")
    foreign = sum(not letter.isascii() for letter in valid)
    if 0 in block:
        latin = string.ascii_letters + " \n"
        candidates = dict.fromkeys(WIDE, latin + WESTERN + "".join(set(OTHER_SCRIPTS.values())))
    elif valid.count("\ufffd") * 2 < foreign:
        return ""
    else:
        # In Latin scripts, most letters have no accents.
        accented = sum(byte >= 128 for byte in block)
        plain = sum(len(word) for word in re.findall(rb"[A-Za-z]+", block))
        dense = accented > 2 * plain
        candidates = OTHER_SCRIPTS if dense else LATIN | OTHER_SCRIPTS
    best, best_share = "", LEAST_SHARE
    for encoding, frequent in candidates.items():
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(block)
        except UnicodeDecodeError:
            continue
        letters = [letter for letter in text if 0 in block or not letter.isascii()]
        share = sum(letter in frequent for letter in letters) / max(1, len(letters))
        if share > best_share:
            best, best_share = encoding, share
    return best


class AsUTF8(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: Any, decoder: Decoder) -> None:
        self.stream, self.decoder = stream, decoder
        self.left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.left:
            block = self.stream.read(BLOCK)
            text = self.decoder.decode(block, final=not block)
            self.left = memoryview(text.encode("utf-8", "replace"))
            if not block:
                break
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size
