"""Files in any encoding: the byte order mark, the setting, and what a message suggests."""

from __future__ import annotations

import codecs
import json

import pytest

from data import encodings, files
from data.config import DataConfig

TEXTS = {
    "latin-1": "Le café était fermé à Noël, où êtes-vous allés déjà ?\n",
    "cp1252": "He said \u201cno\u201d \u2013 it\u2019s not so.\n",
    "iso-8859-2": "Příliš žluťoučký kůň úpěl ďábelské ódy.\n",
    "cp1250": "Zażółć gęślą jaźń, příšerně žluťoučký.\n",
    "cp1251": "Съешь же ещё этих мягких французских булок.\n",
    "koi8-r": "Съешь же ещё этих мягких французских булок.\n",
    "cp1253": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.\n",
    "cp932": "いろはにほへと ちりぬるを。カタカナの本を読みました。\n",
    "euc_jp": "いろはにほへと ちりぬるを。カタカナの本を読みました。\n",
    "gb18030": "我能吞下玻璃而不伤身体。这是一个人的中国。\n",
    "big5": "我能吞下玻璃而不傷身體。這是一個人的中國。\n",
    "euc_kr": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다\n",
    "utf-16-le": "The cat sat on the mat.\n",
    "utf-16-be": "Съешь же ещё этих мягких французских булок.\n",
    "utf-32-le": "The cat sat on the mat.\n",
}


def read(path, encoding="", errors="strict"):
    return [
        "".join(document.pieces()) for document in files.File(path, errors=errors, encoding=encoding).documents()
    ]


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_likely_encoding_is_named_and_reads_the_file(tmp_path, encoding):
    text = TEXTS[encoding] * 20
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(
        ValueError,
        match=f"a.txt is not UTF-8: byte 0x.. at offset .*set data.encoding={encoding}, or",
    ):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", encoding) == [text]


def test_russian_without_its_last_letter_is_not_greek(tmp_path):
    # Without the letter that cp1253 lacks, its bytes are Greek letters, too.
    (tmp_path / "a.txt").write_bytes("Привет, как дела? Это русский текст о жизни.".encode("cp1251"))
    with pytest.raises(ValueError, match=r"data.encoding=cp1251"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "mark, encoding",
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_byte_order_mark_decides(tmp_path, monkeypatch, mark, encoding, name):
    monkeypatch.setattr(encodings, "BLOCK", 100)
    text = "žluťoučký 🐎 \ufeff, “x” " * 50
    content = {
        "a.txt": text,
        "a.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
        "a.json": json.dumps([text]),
        "a.csv": f'id,text\n1,"{text}"\n',
        "a.tsv": f"id\ttext\n1\t{text}\n",
    }[name]
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    assert read(tmp_path / name) == read(tmp_path / name, "latin-1") == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_wide_encoding_without_a_mark_is_little_endian(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("žluť".encode(f"{encoding}-le"))
    assert read(tmp_path / "a.txt", encoding) == ["žluť"]


@pytest.mark.parametrize(
    "encoding, content, place",
    [
        ("cp932", b"abc\x81\x00def", "byte 0x81 at offset 3"),
        ("utf-16-le", b"a\0b\0c", "byte 0x63 at offset 4"),
        ("ascii", b"abc\xe9", "byte 0xe9 at offset 3"),
        ("utf-16-le", b"a\0\0\0", "byte 0x00 at offset 2"),
    ],
)
def test_undecodable_bytes_are_reported_with_their_offset(
    tmp_path, monkeypatch, encoding, content, place
):
    for piece in (1, 2, 3, 2**18):
        monkeypatch.setattr(encodings, "BLOCK", piece)
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"a.txt is not .*: {place} \\(line 1\\);.*data.errors=replace"):
            read(tmp_path / "a.txt", encoding)
        assert read(tmp_path / "a.txt", encoding, "replace")


def test_a_record_in_another_encoding_is_read_by_lines(tmp_path):
    records = "".join(
        json.dumps({"text": f"é {number}"}, ensure_ascii=False) + "\n" for number in range(1000)
    )
    (tmp_path / "a.jsonl").write_bytes(records.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"a.jsonl is not UTF-8: .*\(line 1\); .*set data.encoding=latin-1"
    ):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", "latin-1") == [f"é {number}" for number in range(1000)]


@pytest.mark.parametrize(
    "block",
    [
        "žluťoučký 🐎".encode() * 5 + b"\xff",
        "é".encode()[:1],
        "🐎".encode() * 3 + b"\xf0\x9f",
        bytes(range(256)),
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0>\0",
    ],
    ids=["damaged", "cut", "cut later", "all bytes", "binary"],
)
def test_no_encoding_is_guessed_for_damaged_utf8_and_binaries(block):
    assert encodings.likely_encoding(block) == ""


@pytest.mark.parametrize(
    "name", ["latin-1", "utf-16", "UTF8", "cp1252", "gb18030", "utf-8-sig", "mac_roman"]
)
def test_text_encodings_of_python_are_accepted(name):
    assert not list(DataConfig("text", __file__, encoding=name).problems())


@pytest.mark.parametrize(
    "name", ["latin1x", "hex", "base64", "zip", "rot13", "undefined", "utf 99", "\0", "punycode", "utf-7"]
)
def test_an_unknown_encoding_is_one_problem(name):
    [problem] = DataConfig("text", __file__, encoding=name).problems()
    assert problem.startswith(f"encoding={name} is not a text encoding")


def test_a_bad_byte_is_named_by_its_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xff")
    for block in (4, 2**18):
        monkeypatch.setattr(encodings, "BLOCK", block)
        with pytest.raises(ValueError, match=r"byte 0xff at offset 11 \(line 3\);"):
            read(tmp_path / "a.txt")
