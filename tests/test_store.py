"""Checksums that are remembered, and folders that are made once."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from data import store
from data.store import made_once, sha256_of


@pytest.fixture
def large_is_small(monkeypatch):
    """So that small files are remembered too."""
    monkeypatch.setattr(store, "LARGE", 1)


def write_long_ago(path, content):
    path.write_bytes(content)
    os.utime(path, (time.time() - 100,) * 2)


def test_a_file_that_did_not_change_is_not_read_again(tmp_path, fresh_data, large_is_small, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")
    expected = [hashlib.sha256(b"one").hexdigest()]
    assert sha256_of([path]) == expected
    with monkeypatch.context() as patch:
        patch.setattr(store, "hash_file", lambda *args: pytest.fail("read again"))
        assert sha256_of([path]) == expected
    write_long_ago(path, b"two")  # of the same size
    assert sha256_of([path]) == [hashlib.sha256(b"two").hexdigest()]


def test_a_file_that_changed_just_now_or_is_small_is_read_each_time(tmp_path, fresh_data, large_is_small, monkeypatch):
    (path := tmp_path / "a").write_bytes(b"one")
    sha256_of([path])
    assert not (fresh_data / "digests.json").exists()
    monkeypatch.setattr(store, "LARGE", 4)
    write_long_ago(path, b"two")
    sha256_of([path])
    assert not (fresh_data / "digests.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": 1}'])
def test_a_memory_that_cannot_be_read_or_written_costs_time_only(tmp_path, fresh_data, large_is_small, content, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")
    fresh_data.mkdir()
    (fresh_data / "digests.json").write_bytes(content)
    assert sha256_of([path]) == [hashlib.sha256(b"one").hexdigest()]

    def refuse(*args):
        raise OSError("full")

    monkeypatch.setattr("atomic.write_bytes", refuse)
    write_long_ago(path, b"two")
    assert sha256_of([path]) == [hashlib.sha256(b"two").hexdigest()]


def test_files_that_are_gone_are_forgotten(tmp_path, fresh_data, large_is_small):
    for name in "ab":
        write_long_ago(tmp_path / name, b"one")
        sha256_of([tmp_path / name])
        (tmp_path / name).unlink()
    assert (fresh_data / "digests.json").read_text().count(str(tmp_path)) == 1


def test_what_is_there_is_not_made_again(tmp_path):
    made_once(tmp_path / "a", lambda partial: (partial / "x.json").write_text("1"))
    made_once(tmp_path / "a", lambda partial: pytest.fail("made again"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "x.json").read_text() == "1"
