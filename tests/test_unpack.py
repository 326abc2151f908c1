"""Compressed files, and those that unpack to far more than they are."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc

import pytest

from data import files, unpack


def zstd(content):
    return pytest.importorskip("zstandard").compress(content)


def xz(content):
    # A compressor of the default preset clears 100 MB for each text.
    return lzma.compress(content, preset=0)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": xz, ".zst": zstd}


def read(path):
    return ["".join(document.pieces()) for document in files.File(path).documents()]


@pytest.mark.parametrize("ending", PACK)
def test_several_compressed_files_end_to_end_are_one(tmp_path, ending):
    parts = [f"{number} word".encode() for number in range(100)]
    content = b"".join(map(PACK[ending], [b"", *parts, b""]))
    (tmp_path / f"a.txt{ending.upper()}").write_bytes(content)
    assert read(tmp_path / f"a.txt{ending.upper()}") == [b"".join(parts).decode()]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_damaged_compression_is_one_sentence(tmp_path, ending, name):
    text = {"a.txt": "{}", "a.jsonl": '{{"text": "{}"}}', "a.json": '["{}"]', "a.csv": "text\n{}"}[
        name
    ]
    content = PACK[ending](text.format(" ".join(map(str, range(20_000)))).encode())
    for damage in (
        content[:-7],
        content[: len(content) // 2],
        b"",
        b"no such format",
        content[:8] + b"\xff" * 8 + content[16:],
        content + b"no such format",
    ):
        (tmp_path / f"{name}{ending}").write_bytes(damage)
        if not damage and ending == ".gz":
            assert read(tmp_path / f"{name}{ending}") == []
            continue
        with pytest.raises(ValueError, match=f"{name}{ending} is damaged") as caught:
            read(tmp_path / f"{name}{ending}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line, ending", [(b"a line of text\n", ".zst"), (b"x", ".xz"), (b"x", ".bz2")]
)
def test_a_small_file_of_much_text_takes_little_memory(tmp_path, ending, line):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](line * (2**25 // len(line))))
    tracemalloc.start()
    try:
        assert sum(map(len, files.File(path).text_pieces())) > 2**25 - 20
        assert tracemalloc.get_traced_memory()[1] < 2**24 + 2**23
    finally:
        tracemalloc.stop()


def test_a_small_file_may_not_ask_for_a_large_window(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(b"text " * 1000) + packer.flush())
    with pytest.raises(
        ValueError,
        match=r"a.txt.zst is damaged, or needs more memory than .*compress it again",
    ):
        read(tmp_path / "a.txt.zst")
    # As if the file were large, like those of zstd --long=30.
    monkeypatch.setattr(unpack, "WINDOW_PER_BYTE", 2**30)
    assert read(tmp_path / "a.txt.zst") == ["text " * 1000]


def test_xz_may_not_ask_for_a_large_dictionary(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 2**28}]
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text", filters=filters))
    with pytest.raises(ValueError, match=r"a.txt.xz is damaged, or needs more memory"):
        read(tmp_path / "a.txt.xz")
