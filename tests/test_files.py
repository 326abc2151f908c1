"""Files to documents: every ending, every compression, pieces that change no token, one sentence for what cannot be read."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from data import document, encodings, files, records
from data.bpe import BPETokenizer
from data.parquet import parquet_column

RECORDS = ["one", "two\nlines", "žluťoučký 🐎", "  ", "three"]
KEPT = ["one", "two\nlines", "žluťoučký 🐎", "three"]


def read(path, text_field="text", errors="strict"):
    return ["".join(document.pieces()) for document in files.File(path, text_field, errors).documents()]


def json_lines(records, field="text"):
    return "".join(json.dumps({field: text, "more": 1}) + "\n" for text in records).encode()


def test_json_lines_are_a_document_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(RECORDS) + b"\n")
    assert read(tmp_path / "a.jsonl") == KEPT
    (tmp_path / "b.jsonl").write_bytes(json_lines(RECORDS, "content").rstrip(b"\n"))
    assert read(tmp_path / "b.jsonl", "content") == KEPT


@pytest.mark.parametrize("name, content", [("a.txt", "Žluť 🐎\r\n".encode()), ("a.md", b"# One"), ("a.jsonl", json_lines(RECORDS))])
def test_gzip_is_read_as_what_is_in_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert read(tmp_path / f"{name}.gz") == read(tmp_path / name)


def test_zstandard_is_read_as_what_is_in_it(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines(RECORDS)))
    assert read(tmp_path / "a.jsonl.zst") == KEPT
    (tmp_path / "cut.txt.zst").write_bytes(zstandard.compress(b"x" * 10_000)[:-5] + b"?????")
    with pytest.raises(ValueError, match=r"cut.txt.zst is damaged or truncated"):
        read(tmp_path / "cut.txt.zst")


def test_a_truncated_last_zstandard_frame_is_an_error(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"Line {number}.\n" for number in range(30_000))
    frame, path = zstandard.compress(text.encode()), tmp_path / "a.txt.zst"
    for content, times in ((frame, 1), (frame * 3, 3), (zstandard.ZstdCompressor(level=1).compress(b"") + frame, 1)):
        path.write_bytes(content)
        assert read(path) == [text * times]
    for content in (frame[: len(frame) // 2], frame[:-3], frame + frame[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.txt.zst is damaged or truncated"):
            read(path)


def test_large_rows_of_parquet_are_read_a_few_at_a_time(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": ["ab" * 200_000] * 40, "n": list(range(40))}), tmp_path / "a.parquet", use_dictionary=False)
    file = parquet.ParquetFile(tmp_path / "a.parquet")
    sizes = []
    plain = file.iter_batches
    file.iter_batches = lambda **rest: (sizes.append(rest["batch_size"]), plain(**rest))[1]
    assert sum(map(len, parquet_column(file, "text", "a.parquet"))) == 40 * 400_000
    assert sizes == [2]


@pytest.mark.parametrize("place", [4, 2000, -40])
def test_a_damaged_parquet_file_is_named(tmp_path, place):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": [f"text {number * 7919 % 1009} " * 9 for number in range(2000)]}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[place : place + 30] = b"\xff" * 30
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet(, row \d+)? (is damaged|has no text)"):
        read(tmp_path / "a.parquet")


def test_parquet_is_a_document_a_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": RECORDS * 200, "n": list(range(1000))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == KEPT * 200
    with pytest.raises(ValueError, match=r"a.parquet has no field body \(its fields are text, n\): set data.text_field"):
        read(tmp_path / "a.parquet", "body")
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(RECORDS)] * 2, ["text", "text"]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet has several columns text: rename all but one\.$"):
        read(tmp_path / "c.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"b.parquet is damaged, or not a Parquet file"):
        read(tmp_path / "b.parquet")


def test_zstandard_of_several_frames_is_read_to_its_end(tmp_path):
    """What tools that compress on several cores write, and `cat` of two files."""
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert read(tmp_path / "a.txt.zst") == ["one two"]


def test_a_row_without_a_text_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": [*["fine"] * 99, None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 100 has no text in the field text"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"pip install {package}"):
        read(tmp_path / name)


@pytest.mark.parametrize("content, words", [
    (b'{"text": "a"}\n{"body": "b"}\n', r"line 2 has no field text \(its fields are body\): set data.text_field=NAME"),
    (b'{"text": 3}\n', r"line 1 has no text in the field text"), (b'["a"]\n', r"line 1 is not a record with fields \(it is a list\)"),
    (b'{"text": "a"}\n{"text": "b"', r"line 2 is not JSON"), (b"[" * 100_000, "line 1 is not JSON"),

], ids=range(5))
def test_a_record_that_cannot_be_read_is_named_by_file_and_line(tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl, " + words):
        read(tmp_path / "bad.jsonl")


def test_blank_lines_count_in_the_number_of_a_line(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n\n \nno json\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 4 is not JSON"):
        read(tmp_path / "bad.jsonl")


def test_a_record_that_is_too_long_is_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 2**20)
    (tmp_path / "fine.jsonl").write_bytes(b'{"text": "'.ljust(2**20 - 3, b"x") + b'"}\n')
    assert len(read(tmp_path / "fine.jsonl")[0]) == 2**20 - 13  # just as long as may be
    (tmp_path / "long.jsonl").write_bytes(json_lines(["fine", "x" * 2**20]))
    with pytest.raises(ValueError, match=r"long.jsonl, line 2 is longer than 1 MB"):
        read(tmp_path / "long.jsonl")


@pytest.mark.parametrize("content, offset", [(b"\x7fELF\0", 4), (b"a" * 3_000_000 + b"\0", 3_000_000)],
                         ids=["early", "late"])
def test_a_binary_file_is_named_with_the_offset(tmp_path, content, offset):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.txt is not text: byte 0x00 at offset {offset} \(line 1\);.*data.errors=replace"):
        read(tmp_path / "a.txt")
    assert "\0" in read(tmp_path / "a.txt", errors="replace")[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_invalid_utf8_can_be_replaced(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a\xffb"}')
    assert "a\ufffdb" in read(tmp_path / name, errors="replace")[0]


def test_a_lone_surrogate_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}')
    assert read(tmp_path / "a.jsonl") == ["a?b"]


def test_compression_that_is_cut_short_is_one_sentence(tmp_path):
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(json_lines(RECORDS * 1000))[:-20])
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged or truncated"):
            read(tmp_path / name)
    damaged = bytearray(gzip.compress(json_lines(RECORDS)))
    damaged[10] ^= 0b110  # a kind of block that there is not
    (tmp_path / "c.txt.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"c.txt.gz is damaged or truncated"):
        read(tmp_path / "c.txt.gz")
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"b.txt.gz is damaged"):
        read(tmp_path / "b.txt.gz")


def test_a_folder_gives_all_kinds_a_glob_what_it_says(tmp_path):
    for name in ("b.md", "a.txt", "deep/c.jsonl.gz", "deep/d.TXT", "e.py", "f.txt.zst", "g.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(path):
        return [str(one.relative_to(tmp_path)) for one in files.find(str(path))]
    assert names(tmp_path) == ["a.txt", "b.md", "deep/c.jsonl.gz", "deep/d.TXT", "f.txt.zst"]
    assert names(tmp_path / "**/*.gz") == ["deep/c.jsonl.gz", "g.gz"] and names(tmp_path / "?.py") == ["e.py"]
    with pytest.raises(ValueError, match=r"none\*.txt holds no file to read"):
        files.find(str(tmp_path / "none*.txt"))


def test_runs_beside_a_text_are_not_part_of_it(tmp_path):
    for name in ("a.txt", "logs/b.txt", "runs/one/log.txt", "runs/sweep/lr=1/log.txt", "runs/sweep/logs/lr=1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("one/lock", "one/config.yaml", "sweep/sweep.lock"):
        (tmp_path / "runs" / name).touch()
    assert files.find(str(tmp_path)) == [tmp_path / "a.txt", tmp_path / "logs/b.txt"]


def test_a_folder_is_read_through_links_and_once(tmp_path):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("corpus/deep/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "deep" / "back").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "dangling.txt").symlink_to(tmp_path / "nothing")
    assert [path.name for path in files.find(str(tmp_path / "corpus"))] == ["a.txt", "b.txt"]


def test_a_folder_that_cannot_be_seen_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "a.txt").write_bytes(b"x")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("hidden"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="hidden"):
        files.find(str(tmp_path))


@pytest.mark.parametrize("glob, refused", [("**/*.txt", True), ("*/*.txt", True), ("b*/*.txt", False)])
def test_a_folder_that_a_glob_cannot_list_is_an_error(tmp_path, monkeypatch, glob, refused):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_bytes(b"x")
    # As on a machine whose folder of home folders cannot be listed.
    denied = {str(tmp_path / "a"): os.R_OK, str(tmp_path.parent): os.R_OK}
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & denied.get(str(path), 0))
    if refused:
        with pytest.raises(PermissionError, match=rf"{tmp_path / 'a'}'$"):
            files.find(str(tmp_path / glob))
    else:
        assert files.find(str(tmp_path / glob)) == [tmp_path / "b/x.txt"]


def test_a_byte_order_mark_before_json_lines_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(RECORDS))
    assert read(tmp_path / "a.jsonl") == KEPT


def test_a_glob_gives_no_folders(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.txt").write_bytes(b"x")
    assert files.find(str(tmp_path / "*.txt")) == [tmp_path / "a.txt"]


def test_a_glob_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"x")
    assert files.find("*.txt") == [Path("a.txt")]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="newer Pythons accept it")
def test_an_invalid_glob_is_explained():
    with pytest.raises(ValueError, match=r"corpus/\*\*.txt is not a valid glob: \*\* stands for whole folders"):
        files.find("corpus/**.txt")


# Pieces


@pytest.mark.parametrize("content, offset", [(b"abc\xff", 3), (("é" * 50).encode() + b"\xc3", 100), (b"\xef\xbb\xbfab\xe2\x82", 5)])
def test_a_bad_byte_is_named_by_its_offset_in_any_blocks(tmp_path, monkeypatch, content, offset):
    (tmp_path / "a.txt").write_bytes(content)
    for block in (1, 2, 3, 7, 2**20):
        monkeypatch.setattr(encodings, "BLOCK", block)
        with pytest.raises(ValueError, match=rf"at offset {offset} \(line 1\);"):
            read(tmp_path / "a.txt")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.integers(1, 30))
def test_pieces_joined_are_the_text(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "PIECE", piece)
        patch.setattr(encodings, "BLOCK", piece)
        pieces = list(files.File(path).text_pieces())
    assert "".join(pieces) == text.removeprefix("\ufeff") and all(pieces) and all(len(one) < 3 * piece + 3 for one in pieces)


def test_a_byte_order_mark_can_only_start_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PIECE", 10)
    text = "\ufeff" * 50  # so that pieces begin with it
    (tmp_path / "a.txt").write_text("x" + text, encoding="utf-8")
    assert read(tmp_path / "a.txt") == ["x" + text]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.txt") == [text[1:]]


def test_a_text_that_begins_with_pieces_of_blanks_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PIECE", 10)
    (tmp_path / "a.txt").write_text("\n" * 100 + "text")
    assert read(tmp_path / "a.txt") == ["\n" * 100 + "text"]
    (tmp_path / "a.txt").write_text("\n" * 100)
    assert read(tmp_path / "a.txt") == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_file_knows_how_far_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(encodings, "BLOCK", 100)
    monkeypatch.setattr(document, "PIECE", 100)
    content = "".join(f'{{"text": "{number} {number**9}"}}\n' for number in range(20_000)).encode()
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet
        parquet.write_table(pyarrow.table({"text": content.decode().split("\n")}), tmp_path / name, row_group_size=1000)
    else:
        content = content if name.startswith("a.json") else content.replace(b"{", b"")
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    file = files.File(tmp_path / name)
    assert file.position() == 0
    places = [file.position() for document in file.documents() for _ in document.pieces()]
    size = (tmp_path / name).stat().st_size
    assert len({place * 4 // size for place in places}) >= 4 and file.position() == size
    if name != "a.parquet":  # whose end is read first
        assert places == sorted(places)


WORDS = st.sampled_from(["the", "can't", "I'll", "Ünï", "日本", "語", "中文", "، ", "عربي", "a1", "42", "²", "e\u0301", "  ", " ", "\n", "\r\n",
                         "\n\n", "\t", ".", ",", "...", "!?", "，", "。", "「", "（", "_", "🐎", "'s", "’s", "HTTPServer", "\u00a0"])


SAMPLE = "the cat can't sit on the mat. I'll see 42 of them, 日本語 中文 عربي! 100 200\n300\n🐎🐎 "


@pytest.fixture(scope="module", params=["bpe", "gpt2", "cl100k_base", "o200k_base"])
def any_bpe(request):
    """GPT-2's tokenizer, our own, and our own tokens with the patterns by which tiktoken's others split a text."""
    ours = BPETokenizer.train(iter([SAMPLE] * 5), 310)
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
        return BPETokenizer.published("gpt2")
    if request.param != "bpe":
        ranks = {ours.decode_bytes([one]): one for one in range(ours.end_of_text)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: ranks)
            pattern = getattr(openai_public, request.param)()["pat_str"]
        return BPETokenizer(tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}))
    return ours


@settings(max_examples=150)
@given(st.lists(WORDS, max_size=60).map("".join))
def test_cutting_a_text_changes_no_token(any_bpe, text):
    whole = any_bpe.encode(text)
    for match in document.CUT.finditer(text):
        assert any_bpe.encode(text[: match.start()]) + any_bpe.encode(text[match.start():]) == whole, match


@pytest.mark.parametrize("text", [
    "第一回 甄士隱夢幻識通靈，賈雨村風塵懷閨秀。此開卷第一回也。「作者自云」：", "كان يا ما كان في قديم الزمان، وسالف العصر والأوان. ", "🐎 🏳️‍🌈 👩‍👩‍👧‍👦 emoji ",
    "one\r\ntwo\nthree\rfour\r\n\r\n five ", "12,5;13,7;-4\n15,9;1e-5;22\n", "/usr/share/doc/\n/usr/lib/ and so on\n", "def f(x):\n    return x ** 2\n\n\n",
], ids=["chinese", "arabic", "emoji", "line ends", "numbers", "paths", "code"])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(any_bpe, text, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes((text * 100).encode())
    whole = any_bpe.encode(text * 100)
    for piece in (100, 333, 1000):
        monkeypatch.setattr(document, "PIECE", piece)
        pieces = list(files.File(tmp_path / "a.txt").text_pieces())
        assert len(pieces) > 1 and [one for piece in pieces for one in any_bpe.encode(piece)] == whole


def test_ordinary_texts_have_places_to_cut(monkeypatch):
    monkeypatch.setattr(document, "PIECE", 100)
    for text in ("Some words in a line. " * 100, "一些中文，没有空格。" * 100, "كلمات عربية هنا " * 100, "a\nb\n" * 100):
        assert 0 < document.place_to_cut(text, 0) < 100
    assert document.place_to_cut("x" * 500, 0) == 100


# What is found


def test_all_formats_of_records_are_found_in_a_folder(tmp_path):
    names = ["a.JSON", "b.ndjson.bz2", "c.csv.xz", "d.tsv", "e.parquet", "f.json.gz", "g.txt.XZ"]
    for name in [*names, "h.xml", "i.parquet.gz"]:
        (tmp_path / name).write_bytes(b"x")
    skipped = Counter()
    assert [path.name for path in files.find(str(tmp_path), skipped)] == names
    assert skipped == {".xml": 1, ".gz": 1}


@pytest.mark.parametrize("name", [
    "pipe", "link", "socket", pytest.param("proc", marks=pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"))])
def test_a_pipe_or_socket_is_refused_and_skipped(tmp_path, name):
    place = tmp_path / f"{name}.txt"
    if name == "pipe":
        os.mkfifo(place)
    elif name == "link":
        os.mkfifo(tmp_path / "fifo")
        place.symlink_to(tmp_path / "fifo")
    elif name == "proc":
        # It calls itself a regular file. Reading its neighbour /proc/kmsg blocks.
        place.symlink_to("/proc/version")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(place))
    with pytest.raises(ValueError, match="is a pipe, socket or device and cannot be read twice"):
        files.find(str(place))
    (tmp_path / "a.txt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "*.txt"):
        skipped = Counter()
        assert files.find(str(path), skipped) == [tmp_path / "a.txt"] and skipped["broken links, pipes, sockets or devices"] >= 1


def test_a_device_is_refused():
    with pytest.raises(ValueError, match="/dev/zero is a pipe, socket or device and cannot be read twice"):
        files.find("/dev/zero")


@pytest.mark.parametrize("target", ["a.txt", "nothing"])
def test_a_link_to_itself_or_to_nothing_is_named(tmp_path, target):
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"a.txt is a symbolic link to itself or to nothing"):
        files.find(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes(b"x")
    assert files.find(str(tmp_path)) == [tmp_path / "b.txt"]


# While a file is read


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"short"), lambda path: os.utime(path, (1, 1)),
                                    lambda path: path.unlink()], ids=["cut", "touched", "removed"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, change):
    monkeypatch.setattr(encodings, "BLOCK", 100)
    monkeypatch.setattr(document, "PIECE", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 100_000)
    pieces = files.File(path).text_pieces()
    next(pieces)
    change(path)
    with pytest.raises(ValueError, match=r"a.txt (changed while it was read|cannot be read \(No such file)"):
        list(pieces)


def test_an_error_of_the_system_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"gone.txt cannot be read \(No such file or directory\)"):
        read(tmp_path / "gone.txt")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_line_ends_inside_a_document_stay_as_they_are(tmp_path, ending):
    text = f"one{ending}two{ending}{ending}three"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.json").write_bytes(json.dumps([text]).encode())
    (tmp_path / "a.csv").write_bytes(f'text{ending}"{text}"{ending}'.encode())
    for name in ("a.txt", "a.json", "a.csv"):
        assert read(tmp_path / name) == [text]


# Bad records


@pytest.mark.parametrize("name, content, kept, bad", [
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\nno json\n{"text": ["b"]}\n{"body": "c"}\n{"text": "d"}', ["a", "d"], 4),
    ("a.json", b'[{"text": "a"}, {"text": null}, 3, {"text": "d"}]', ["a", "d"], 2),
    ("a.csv", b'id,text\n1,a\n2\n3,b,c\n4,d\n', ["a", "d"], 2),
    ("a.csv", b'id,text\n1,a\n2,"b"c\n3,d\n', ["a", "d"], 1),
])
def test_bad_records_stop_or_are_skipped_and_counted(tmp_path, name, content, kept, bad):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}, (line|record) \d .*data.on_bad_record=skip to skip such records"):
        read(tmp_path / name)
    file = files.File(tmp_path / name, on_bad_record="skip")
    for _ in range(2):
        assert ["".join(document.pieces()) for document in file.documents()] == kept and file.bad_records == bad


@pytest.mark.parametrize("kind, value, words", [
    ("string", None, "it is null"), ("binary", b"x", "it is of type binary"),
    ("list<string>", ["x"], "it is of type list"), ("int64", 3, "it is of type int64")])
def test_rows_of_parquet_without_text_are_told_by_what_they_are(tmp_path, kind, value, words):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    arrow = pyarrow.list_(pyarrow.string()) if kind.startswith("list") else kind
    parquet.write_table(pyarrow.table({"text": pyarrow.array([value] * 3, arrow)}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a.parquet, row 1 has no text in the field text \({words}.*on_bad_record=skip"):
        read(tmp_path / "a.parquet")
    file = files.File(tmp_path / "a.parquet", on_bad_record="skip")
    assert list(file.documents()) == [] and file.bad_records == 3


@pytest.mark.parametrize("content, words", [
    (gzip.compress(b"x", mtime=0), "gzip: give it the extension .gz"), (b"PK\x03\x04\0\xff", "zip, as are documents"), (b"%PDF-1.7\n%\xff\0", "PDF"),
    (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive: unpack it"),
    (b"PAR1\0\xff", "Parquet: give it the extension .parquet")])
def test_a_file_of_another_format_is_named(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt is not text but {words}"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv.gz", "a.parquet"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS to its content: run git lfs pull"):
        read(tmp_path / name)


def test_parquet_that_was_compressed_once_more_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(ValueError, match=r"a.parquet.gz is a compressed Parquet file"):
        read(tmp_path / "a.parquet.gz")
