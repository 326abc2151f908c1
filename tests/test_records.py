"""Formats of records: JSON in lines and arrays, CSV, TSV and Parquet, in bounded memory and with one sentence for errors."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import encodings, files, records, text_records
from data.parquet import batch_rows, parquet_texts

TEXTS = ["one", "two\nlines, with a comma", 'a "quote"', "žluťoučký 🐎", "\ttab", "[1, 2]"]


def read(path, text_field="text"):
    return ["".join(document.pieces()) for document in files.File(path, text_field).documents()]


def lines(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def array(texts):
    return json.dumps([{"id": 1, "text": text} for text in texts], indent=1).encode()


def table(texts, **style):
    writer = csv.writer(written := io.StringIO(), **style)
    writer.writerows([["id", "text"], *([1, text] for text in texts)])
    return written.getvalue().encode()


def test_parquet_is_read_in_the_calling_thread(tmp_path):
    """A thread of pyarrow's that still reads when Python ends would abort the program."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which is optional")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    readers = set()

    class File(io.FileIO):
        def read(self, *size):
            readers.add(threading.get_native_id())
            return super().read(*size)

    with File(tmp_path / "a.parquet") as file:
        assert list(parquet_texts(file, "text", tmp_path)) == TEXTS
    assert readers == {threading.get_native_id()}


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", lines),
        ("a.ndjson", lines),
        ("a.jsonlines", lines),
        ("a.json", lines),
        ("c4-train.00000-of-01024.json", lines),
        ("a.JSON", array),
        ("a.json", array),
        ("a.csv", table),
        ("a.CSV", lambda texts: table(texts, lineterminator="\n")),
        ("a.csv", lambda texts: table(texts, delimiter=";")),
        ("a.tsv", lambda texts: table(texts, delimiter="\t")),
        ("a.csv", lambda texts: b"\xef\xbb\xbf" + table(texts, quoting=csv.QUOTE_ALL)),
        ("a.json", lambda texts: b" \n\n" + array(texts)),
        ("a.csv", lambda texts: b"\r\n" + table(texts)),
        ("a.json", lambda texts: json.dumps(texts).encode()),
        (
            "a.json",
            lambda texts: json.dumps(
                [{"text": text} for text in texts], ensure_ascii=False, separators=(",", ":")
            ).encode(),
        ),
    ],
)
@pytest.mark.parametrize(
    "pack, ending",
    [(bytes, ""), (gzip.compress, ".gz"), (bz2.compress, ".BZ2"), (lzma.compress, ".xz")],
    ids=["plain", "gz", "bz2", "xz"],
)
def test_each_format_gives_a_document_a_record(tmp_path, name, content, pack, ending):
    (tmp_path / f"{name}{ending}").write_bytes(pack(content(TEXTS)))
    assert read(tmp_path / f"{name}{ending}") == TEXTS


# Fields


@pytest.mark.parametrize(
    "record",
    [{"data": {"text": "x"}}, {"data.text": "x"}, {"data.text": "x", "data": {"text": "y"}}, "x"],
)
def test_a_field_of_a_field_is_named_with_a_dot(tmp_path, record):
    for name, content in (("a.jsonl", json.dumps(record)), ("a.json", json.dumps([record]))):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name, "data.text") == ["x"]


@pytest.mark.parametrize("data", [{}, {"body": "x"}, [{"text": "x"}], "x", None])
def test_a_field_of_a_field_that_is_not_there_is_named(tmp_path, data):
    (tmp_path / "a.jsonl").write_text(json.dumps({"data": data}))
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 1 has no field data.text \(its fields are data\)"
    ):
        read(tmp_path / "a.jsonl", "data.text")


def test_a_field_of_a_field_is_read_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, None, {"text": "b", "n": 3}]
    parquet.write_table(
        pyarrow.table({"data": rows, "other": [1, 2, 3, 4]}), tmp_path / "a.parquet"
    )
    file = files.File(tmp_path / "a.parquet", "data.text", on_bad_record="skip")
    assert ["".join(document.pieces()) for document in file.documents()] == ["a", "b"] and file.bad_records == 2
    for field in ("data.body", "data.text.x", "text", "more.text"):
        with pytest.raises(
            ValueError, match=rf"a.parquet has no field {field} \(its fields are data, other\)"
        ):
            read(tmp_path / "a.parquet", field)


@pytest.mark.parametrize("kind", ["large_string", "string_view", "categorical"])
def test_all_types_of_text_in_parquet_are_read(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(TEXTS * 2)
    column = (
        column.dictionary_encode()
        if kind == "categorical"
        else column.cast(getattr(pyarrow, kind)())
    )
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS * 2


# JSON arrays


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.text() | st.integers() | st.lists(st.floats(allow_nan=False)),
            max_size=3,
        )
        | st.text(min_size=1)
        | st.none()
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_an_array_is_read_the_same_whatever_its_blocks(many, size, escaped):
    content = json.dumps(
        [{"text": "x"} | one if isinstance(one, dict) else one for one in many],
        ensure_ascii=escaped,
    )
    blocks = (content[start : start + size] for start in range(0, len(content), size))
    field_text = functools.partial(text_records.text_of, field="text")
    found = [text for text in text_records.json_records(blocks, ".json", field_text, "a.json") if isinstance(text, str)]
    expected = [one.get("text", "x") if isinstance(one, dict) else one for one in many]
    assert found == [records.well_formed(one) for one in expected if isinstance(one, str)]


@pytest.mark.parametrize(
    "content, words",
    [
        ('[{"text": "a"}, {"text": "b"', r"record 2 is not JSON \(Expecting ',' delimiter"),
        ('[{"text": "a"}, {"text": "b', r"record 2 is not JSON \(Unterminated string"),
        ('[{"text": "a"}', r"record 1 is not JSON \(Expecting a comma or the end of the array"),
        (
            '[{"text": "a"} {"text": "b"}]',
            r"record 1 is not JSON \(Expecting a comma or the end of the array",
        ),
        (
            '[{"text": "a"}, oops, ' + '{"text": "b"}, ' * 100 + "]",
            r"record 2 is not JSON \(Expecting value",
        ),
        ("[", "record 1 is not JSON"),
        ('[{"text": "a"}] [{"text": "b"}]', "has more text after its array"),
        ("[" * 100_000, r"record 1 is not JSON \(too deeply nested\)"),
        ("[" + "1" * 5000 + "]", r"record 1 is not JSON \(a whole number has more digits"),
        ('["a\nb"]', r"record 1 is not JSON \(Invalid control character at character 3"),
    ],
)
def test_a_damaged_array_is_told_with_the_record(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json,? " + words) as caught:
        read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_single_object_over_lines_is_told_what_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "x"}]}, indent=1))
    with pytest.raises(
        ValueError,
        match=r"a.json, line 1 is not JSON .*one record per line, or, in .json, one array of records",
    ):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", lambda text: f'["fine", "{text}"]'),
        ("a.jsonl", lambda text: f'{{"text": "{text}"}}'),
        ("a.csv", lambda text: f"text\nfine\n{text}\n"),
        ("a.csv", lambda text: f'text\nfine\n"{text}\n'),
        ("a.csv", lambda text: "text\nfine\n" + '"a\n",' * (len(text) // 4)),
    ],
)
def test_a_record_that_is_too_long_is_refused(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(records, "RECORD_BYTES", 2**20)
    monkeypatch.setattr(encodings, "BLOCK", 2**16)
    (tmp_path / name).write_text(content("x" * 2**21))
    with pytest.raises(ValueError, match="longer than 1 MB, the limit for one record"):
        read(tmp_path / name)


# CSV


@pytest.mark.parametrize(
    "content, words",
    [
        (
            b"id,body\n1,a\n",
            r"a.csv has no field text \(its fields are id, body\): set data.text_field=NAME",
        ),
        (b"id,text\n1,a\n2,Hello, world\n", "a.csv, line 3 has 3 fields and the header has 2"),
        (b"id,text\n1,a\n2\n", "a.csv, line 3 has 1 field and the header has 2"),
        (
            b'id,text\n1,"never closed\n2,b\n',
            "a.csv, line 2 opens a quotation mark that is never closed",
        ),
        (
            b"id,text\n1,caf\xe9\n",
            "a.csv is not UTF-8: byte 0xe9 at offset 13 \\(line 2\\); it looks like latin-1",
        ),
        (b"id,text\n1,a\0b and more of it\n", "a.csv is not text: byte 0x00 at offset 11 \\(line 2\\)"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_by_its_line(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "a.csv")


def test_skipping_never_skips_the_rest_of_a_table(tmp_path):
    """A row that a download has cut is skipped; one that takes all the lines after it is an error."""
    (tmp_path / "a.csv").write_text('text\na\n"cut here')
    file = files.File(tmp_path / "a.csv", on_bad_record="skip")
    assert len(list(file.documents())) == 1 and file.bad_records == 1
    (tmp_path / "a.csv").write_text('text\na\n"open\nb\nc\n')
    with pytest.raises(ValueError, match="line 3 opens a quotation mark that is never closed"):
        list(files.File(tmp_path / "a.csv", on_bad_record="skip").documents())


@pytest.mark.parametrize("content", [b"", b"\n\n", b"text\n", b"id,text\n1,\n2,  \n"])
def test_a_table_without_texts_has_no_documents(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    assert read(tmp_path / "a.csv") == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_empty_json_files_have_no_documents(tmp_path, name):
    for content in (b"", b" \n\n", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == []


def test_a_field_longer_than_pythons_own_limit_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"x " * 300_000}"\n')
    assert read(tmp_path / "a.csv") == ["x " * 300_000]


def test_blank_lines_before_the_header_count_as_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\n \nid,text\n1,a\n2\n")
    with pytest.raises(ValueError, match=r"a.csv, line 5 has 1 field"):
        read(tmp_path / "a.csv")


def test_the_limit_of_a_record_is_not_one_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 100)
    (tmp_path / "a.csv").write_text("text\n" + f"{'x' * 90}\n" * 10)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"x" * 80}"}}\n' * 10)
    assert len(read(tmp_path / "a.csv")) == len(read(tmp_path / "a.jsonl")) == 10


# Parquet


def test_a_parquet_file_that_unpacks_to_much_more_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr("data.parquet.BOMB_BYTES", 2**22)
    parquet.write_table(
        pyarrow.table({"text": ["x" * 2**20] * 8}),
        tmp_path / "a.parquet",
        compression="zstd",
        use_dictionary=False,
    )
    with pytest.raises(
        ValueError, match=r"a.parquet decompresses .* bytes to 8 MB at once, like a decompression bomb"
    ):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "encodings, size, rows, at_once",
    [
        (("PLAIN", "RLE"), 2**22, 2**12, 1024),  # 1 KB a row
        (("PLAIN", "RLE", "BIT_PACKED"), 2**30, 2**12, 4),  # 256 KB a row
        (("PLAIN", "RLE", "RLE_DICTIONARY"), 1000, 10**6, 1024),
        (
            ("PLAIN", "RLE", "RLE_DICTIONARY"),
            2**20,
            10**6,
            64,
        ),  # each row may be all of the dictionary
        (("DELTA_BYTE_ARRAY", "RLE"), 2**26, 10**6, 1),
        (("PLAIN",), 2**30, 1, 1),
    ],
)
def test_rows_that_may_be_large_are_read_few_at_a_time(encodings, size, rows, at_once):
    assert batch_rows(encodings, size, rows) == at_once


@pytest.mark.parametrize("name", ["a.txt", "a.jl", "part-00000", "a.jsonl.txt", "a.txt.gz"])
def test_json_lines_named_as_plain_text_are_refused(tmp_path, name):
    content = b"\n" + lines(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=f"{name} has JSON records.*give it the extension .jsonl"):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ['{"a": 1}\n', "{x}\n{y}\n", '{\n"a": 1}\n', "[1]\n[2]\n", "1\n2\n"])
def test_text_with_braces_is_plain_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\n1,one\n")
    with pytest.raises(ValueError, match="several columns text: rename"):
        read(tmp_path / "a.csv")


def test_long_names_of_fields_are_cut_in_messages(tmp_path):
    (tmp_path / "a.csv").write_text("x" * 5000 + "\n1\n")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.csv")
    assert len(str(error.value)) < 300 + len(str(tmp_path))
