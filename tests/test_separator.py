"""Plain text to documents where a separator stands between them."""

from __future__ import annotations

import gzip
import random

import pytest

from data import document
from data.config import DataConfig
from data.document import divide, unescaped
from data.sources import Files, open_sources


def divided(text: str, between: str, piece: int = 1000) -> list[str]:
    """The documents of a text that is read in pieces of a length."""
    def read():
        return (text[start : start + piece] for start in range(0, len(text), piece))
    return ["".join(document.pieces()) for document in divide(read, unescaped(between))]


@pytest.mark.parametrize("typed, meant", [
    ("<|endoftext|>", "<|endoftext|>"), (r"\n\n", "\n\n"), ("\n\n", "\n\n"), (r"\r\n\r\n", "\n\n"), ("\r", "\n"),
    (r"\n---\n", "\n---\n"), (r"\t", "\t"), (r"\x1e", "\x1e"), (r"\u2029", "\u2029"), (r"\\n", r"\n"), ("a\\", "a\\"),
])
def test_escapes_stand_for_characters(typed, meant):
    assert unescaped(typed) == meant


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("text, between, documents", [
    ("one<|endoftext|>two<|endoftext|>", "<|endoftext|>", ["one", "two"]),
    ("one\n<|endoftext|>\n\ntwo\n", "<|endoftext|>", ["one\n", "two\n"]),
    ("a\nb\n\nc\n\n\n\nd\n", r"\n\n", ["a\nb", "c", "d\n"]),
    ("\n\na\n\n \n\nb", r"\n\n", ["a", "b"]),
    ("a\n\nb b\nc", r"\n", ["a", "b b", "c"]),
    ("a\n---\nb\n---c", r"\n---\n", ["a", "b\n---c"]),
    ("no separator\nhere", "<|endoftext|>", ["no separator\nhere"]),
    ("a.b.c", ".", ["a", "b", "c"]),
])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_a_text_is_divided_wherever_its_pieces_end(text, between, documents, line_end, piece):
    in_file = text.replace("\n", line_end)
    assert divided(in_file, between, piece) == [document.replace("\n", line_end) for document in documents]


def test_a_document_larger_than_memory_is_read_again(monkeypatch):
    monkeypatch.setattr(document, "IN_MEMORY", 100)
    monkeypatch.setattr("data.document.PIECE", 50)
    draw = random.Random(0)
    texts = ["word " * draw.randint(1, 80) for _ in range(30)]
    joined = "\n\n".join(texts)
    pieces = [list(document.pieces()) for document in divide(lambda: iter([joined[:333], joined[333:]]), "\n\n")]
    assert ["".join(parts) for parts in pieces] == texts
    assert max(len(piece) for parts in pieces for piece in parts) <= 100
    assert {len(text) > 100 for text in texts} == {True, False}


@pytest.mark.parametrize("compressed", [False, True])
def test_files_are_divided_and_records_are_not(tmp_path, compressed):
    content = b"one\r\n\r\ntwo\r\n\r\n\r\nthree\n"
    if compressed:
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    else:
        (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.jsonl").write_text('{"text": "four\\n\\nfive"}\n')
    source = Files(str(tmp_path), DataConfig(separator=r"\n\n"))
    assert ["".join(document.pieces()) for document in source.documents()] == ["one", "two", "three\n", "four\n\nfive"]
    assert source.fingerprint() != Files(str(tmp_path)).fingerprint()
    assert source.fingerprint() == Files(str(tmp_path), DataConfig(separator="\n\n")).fingerprint()


def test_a_separator_that_nothing_uses_is_refused(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n')
    with pytest.raises(ValueError, match=r"data.separator=x divides plain text, and .* holds only records: leave it out"):
        open_sources(DataConfig(source="text", path=str(tmp_path), separator="x"))
