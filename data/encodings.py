"""Decode the bytes of a file to text.

Knows byte order marks and encodings, and guesses an encoding where none is set. Every error names
the file, and the offset and the line if it can. Knows no records and no tokens.
"""

import codecs
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 2**18  # bytes

# The longer marks come first: the mark of UTF-32 starts with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# Python's decoders of these encodings look for a byte order mark themselves.
WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}

# The first bytes of files that are not text, whatever their names.
OTHER_FORMATS = {
    b"\x1f\x8b": "gzip: give it the extension .gz", b"BZh": "bzip2: give it the extension .bz2",
    b"\x28\xb5\x2f\xfd": "zstd: give it the extension .zst",
    b"\xfd7zXZ": "xz: give it the extension .xz",
    b"PAR1": "Parquet: give it the extension .parquet",
    b"PK\x03\x04": "zip, as are documents of office programs: unpack it, or save it as text",
    b"%PDF": "PDF: save it as text"}

# Of a tar archive, at this offset; before it is the name of its first file.
TAR = (257, b"ustar")

# Encodings that a message may suggest, with the frequent characters of their languages.
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
WESTERN = "éèêëáàâäãåæçíìîïñóòôöõøœßúùûüýÿÉÀÄÖÜ\u2019\u2018\u201c\u201d\u2013\u2014\u2026«»°§©"
CENTRAL = "áéíóúýčďěňřšťůžąćęłńóśźżöüőűäâîŠČŽŘ\u201e\u201d\u2013"
CYRILLIC = "оеаинтсрвлкмдпуяыьгз"
GREEK = "αοιετσνηυρπκμλςάέήίόύώ"
JAPANESE = "のにはをたがでてとしれさいるなもかっりアイスントルーきくまれみろんちほへ。、"
KOREAN = "이다는의에을가고하지도로한기은를서사자나인리어만시해그대일"
CHINESE = "的一是不了在人有我他这這個个上们們国國说說来來到大中。"
LATIN = {"latin-1": WESTERN, "cp1252": WESTERN, "iso-8859-2": CENTRAL, "cp1250": CENTRAL}
OTHER_SCRIPTS = {"cp1251": CYRILLIC, "koi8-r": CYRILLIC, "cp1253": GREEK, "cp932": JAPANESE,
                 "euc_jp": JAPANESE, "euc_kr": KOREAN, "gb18030": CHINESE, "big5": CHINESE}
# Of frequent characters among the non-ASCII ones. Wrong encodings have smaller shares.
LEAST_SHARE = 0.2


def decoded(stream: BinaryIO, path: Path, encoding: str = "utf-8",
            errors: str = "strict") -> Iterator[str]:
    """The text of a stream, in blocks. A byte order mark overrides `encoding` and is left out.

    `errors` is "strict", which raises ValueError for bytes that are not text, or "replace", which
    decodes them to replacement characters.
    """
    # Four bytes are the longest mark.
    block = stream.read(max(4, BLOCK))
    mark = next((mark for mark in MARKS if block.startswith(mark)), b"")
    block = block[len(mark) :]
    encoding = codecs.lookup(MARKS.get(mark, encoding)).name
    encoding = WITHOUT_MARK.get(encoding, encoding)

    # Decode block by block. `offset` is that of `block` in the stream.
    offset, line = len(mark), 1
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    while True:
        # The first bytes of a character that continues in this block.
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(block, final=not block)
            # UTF-8 allows NUL, which text does not have. Report it by its offset in bytes.
            if errors == "strict" and "\0" in text:
                start = len(text[: text.index("\0")].encode(encoding, "replace"))
                start = min(start, len(pending + block) - 1)
                raise UnicodeDecodeError(encoding, pending + block, start, start + 1, "NUL")
        except UnicodeDecodeError as error:
            # Find the offset and the line of the byte.
            line += error.object[: error.start].decode(encoding, "replace").count("\n")
            place = f"at offset {offset - len(pending) + error.start} (line {line})"
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise ValueError(f"{path} {not_text(encoding, block, f'{byte} {place}')}") from None
        if text:
            yield text
        if not block:
            return
        offset += len(block)
        line += text.count("\n")
        block = stream.read(BLOCK)


def not_text(encoding: str, block: bytes, place: str) -> str:
    """Why a block is not text in `encoding`, and what to do."""
    if block.startswith(TAR[1], TAR[0]):
        return "is not text but a tar archive: unpack it."
    for start, advice in OTHER_FORMATS.items():
        if block.startswith(start):
            return f"is not text but {advice}."

    # Advise the most likely encoding, if another one fits, else what to do about single bytes.
    name = encoding.upper() if encoding.startswith("utf") else encoding
    advice = "set data.encoding=NAME if it has another encoding"
    guess = likely_encoding(block)
    if guess and codecs.lookup(guess).name != encoding:
        advice = f"it looks like {guess}: set data.encoding={guess}"
    elif place.startswith("byte 0x00") or (encoding == "utf-8" and 0 in block):
        name, advice = "text", "leave it out"
    return (f"is not {name}: {place}; {advice}, or data.errors=replace to read a replacement "
            f"character there.")


def likely_encoding(block: bytes) -> str:
    """The encoding in which most characters of a block are frequent ones of its language.

    Empty if there is none, and for UTF-8 that is truncated or has only a few damaged bytes.
    """
    # Only UTF-16 and UTF-32 have bytes of zero in a text.
    if 0 in block:
        frequent = string.ascii_letters + " \n" + WESTERN + "".join(OTHER_SCRIPTS.values())
        candidates = dict.fromkeys(WIDE, frequent)
    else:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace").decode(block)
        n_foreign = sum(not letter.isascii() for letter in utf8)
        if 2 * utf8.count("\ufffd") < max(1, n_foreign):
            return ""
        # In Latin scripts, most letters have no accents.
        n_accented = sum(byte >= 128 for byte in block)
        n_plain = len(re.findall(rb"[A-Za-z]", block))
        candidates = OTHER_SCRIPTS
        if n_accented <= 2 * n_plain:
            candidates = LATIN | OTHER_SCRIPTS

    # Decode as each candidate, and count the frequent characters of its language.
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
