"""Cached checksums, and folders that are made once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from types import SimpleNamespace

import pytest

import atomic
import locks
from data import store
from data.store import lock_of, make_once, sha256_of


@pytest.fixture
def cache_all(monkeypatch):
    """The digests of small and new files are cached too."""
    monkeypatch.setattr(store, "LARGE", 1)
    monkeypatch.setattr(store, "SETTLED", -1)


def write_long_ago(path, content):
    path.write_bytes(content)
    os.utime(path, (time.time() - 100,) * 2)


def test_an_unchanged_file_is_not_read_again(tmp_path, fresh_data, cache_all, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")
    expected = [hashlib.sha256(b"one").hexdigest()]
    assert sha256_of([path]) == expected
    with monkeypatch.context() as patch:
        patch.setattr(store, "hash_file", lambda *args: pytest.fail("read again"))
        assert sha256_of([path]) == expected
    write_long_ago(path, b"two")  # of the same size
    assert sha256_of([path]) == [hashlib.sha256(b"two").hexdigest()]


def test_a_changed_file_with_its_old_time_is_read_again(tmp_path, fresh_data, cache_all):
    write_long_ago(path := tmp_path / "a", b"one")
    sha256_of([path])
    before = path.stat()
    path.write_bytes(b"two")
    while path.stat().st_ctime_ns == before.st_ctime_ns or path.stat().st_mtime_ns != before.st_mtime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_of([path]) == [hashlib.sha256(b"two").hexdigest()]


def test_a_file_of_many_blocks_is_read_completely(tmp_path, fresh_data, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 4)
    (tmp_path / "a").write_bytes(b"0123456789")
    assert sha256_of([tmp_path / "a"]) == [hashlib.sha256(b"0123456789").hexdigest()]


def test_a_small_file_is_read_each_time(tmp_path, fresh_data, monkeypatch):
    monkeypatch.setattr(store, "SETTLED", -1)
    write_long_ago(path := tmp_path / "a", b"two")
    sha256_of([path])
    assert not (fresh_data / "digests.json").exists()


@pytest.mark.parametrize("changed, hashed, cached", [
    ((50, 100), 104, True), ((50, 100), 102, False), ((100, 50), 102, False), ((50, 200), 150, False),
], ids=["long ago", "status just now", "content just now", "in the future"])
def test_the_digest_of_a_fresh_file_is_not_cached(tmp_path, fresh_data, monkeypatch, changed, hashed, cached):
    """With time stamps in whole seconds, the file could change again without a new time."""
    monkeypatch.setattr(store, "LARGE", 1)
    (path := tmp_path / "a").write_bytes(b"one")
    mtime, ctime = changed
    original, stat = path.stat(), type(path).stat

    def in_whole_seconds(one, **options):
        status = stat(one, **options)
        if one != path:
            return status
        return SimpleNamespace(st_size=3, st_mtime=mtime, st_ctime=ctime, st_mtime_ns=mtime * 10**9, st_ctime_ns=ctime * 10**9,
                               st_ino=original.st_ino, st_mode=status.st_mode, st_dev=status.st_dev)

    monkeypatch.setattr(type(path), "stat", in_whole_seconds)
    monkeypatch.setattr(store.time, "time", lambda: float(hashed))
    assert sha256_of([path]) == [hashlib.sha256(b"one").hexdigest()]
    path.write_bytes(b"two")
    monkeypatch.setattr(store.time, "time", lambda: hashed + 1000.0)
    assert sha256_of([path]) == [hashlib.sha256(b"one" if cached else b"two").hexdigest()]


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, fresh_data, cache_all, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")
    hash_file = store.hash_file
    monkeypatch.setattr(store, "hash_file", lambda *args: (hash_file(*args), path.write_bytes(b"three"))[0])
    sha256_of([path])
    assert not (fresh_data / "digests.json").exists()


def test_a_digest_cached_too_early_is_ignored(tmp_path, fresh_data, cache_all, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")
    sha256_of([path])
    memory = fresh_data / "digests.json"
    [key] = json.loads(memory.read_text())
    monkeypatch.setattr(store, "SETTLED", 3)
    for value in (["wrong", path.stat().st_ctime + 1], "wrong"):
        memory.write_text(json.dumps({key: value}))
        assert sha256_of([path]) == [hashlib.sha256(b"one").hexdigest()]


def test_a_read_error_names_the_file(tmp_path, fresh_data, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")

    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(OSError, match=re.escape(f"Input/output error: '{path}'")):
        sha256_of([path])


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": 1}', b'{"a": ["b", 1.5]}', b"[" * 100_000])
def test_a_damaged_or_read_only_cache_is_no_error(tmp_path, fresh_data, cache_all, content, monkeypatch):
    write_long_ago(path := tmp_path / "a", b"one")
    fresh_data.mkdir()
    (fresh_data / "digests.json").write_bytes(content)
    assert sha256_of([path]) == [hashlib.sha256(b"one").hexdigest()]

    def refuse(*args):
        raise OSError("full")

    monkeypatch.setattr("atomic.write_bytes", refuse)
    write_long_ago(path, b"two")
    assert sha256_of([path]) == [hashlib.sha256(b"two").hexdigest()]


def test_deleted_files_leave_the_cache(tmp_path, fresh_data, cache_all):
    for name in "ab":
        write_long_ago(tmp_path / name, b"one")
        sha256_of([tmp_path / name])
        (tmp_path / name).unlink()
    assert (fresh_data / "digests.json").read_text().count(str(tmp_path)) == 1


def test_an_existing_folder_is_not_made_again(tmp_path):
    make_once(tmp_path / "a", lambda partial: (partial / "x.json").write_text("1"))
    make_once(tmp_path / "a", lambda partial: pytest.fail("made again"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "x.json").read_text() == "1"


def test_an_existing_folder_needs_no_lock(tmp_path, monkeypatch):
    """It may be read-only."""
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(store, "wait_for", lambda *args: pytest.fail("asked for the lock"))
    make_once(tmp_path / "a", lambda partial: pytest.fail("made again"))


def test_a_folder_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    synced, sync = [], atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda folder: synced.append((folder.name, (tmp_path / "a").exists())) or sync(folder))
    make_once(tmp_path / "a", lambda partial: (partial / "x.json").write_text("1"))
    assert synced == [(".building-a", False), (tmp_path.name, True)]


def test_partial_files_of_a_kill_are_removed(tmp_path):
    (tmp_path / ".building-a").mkdir()
    for name in (".partial-x.json-1234", "whole.json"):
        (tmp_path / ".building-a" / name).write_text("1")
    make_once(tmp_path / "a", lambda partial: (partial / "x.json").write_text("1"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["whole.json", "x.json"]


@pytest.mark.parametrize(("failure", "begun", "stays"), [
    (KeyboardInterrupt(), True, True), (OSError(errno.EIO, "the disk is gone"), True, True), (ValueError("no text"), True, False),
    (KeyboardInterrupt(), False, False)])
def test_a_failure_keeps_only_what_can_resume(tmp_path, failure, begun, stays):
    def make(partial):
        if begun:
            (partial / "progress.json").write_text("1")
        (partial / ".partial-x-1234").write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        make_once(tmp_path / "a", make)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [".building-a/progress.json"] * stays
    assert (tmp_path / ".building-a").exists() == stays


def test_making_leaves_no_file_open(tmp_path):
    descriptors = len(os.listdir("/dev/fd"))
    for name in "abc":
        make_once(tmp_path / name, lambda partial: (partial / "x.json").write_text("1"))
        assert not locks.is_locked(lock_of(tmp_path / f".building-{name}"))
    assert len(os.listdir("/dev/fd")) == descriptors


def test_the_lock_file_of_a_dead_process_is_not_in_use(tmp_path):
    (tmp_path / ".lock-a").write_text("process 1")
    assert [locks.is_locked(lock_of(tmp_path / ".building-a")) for _ in range(3)] == [False] * 3


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "is full .*: free some space, and the same command resumes"), (errno.EDQUOT, "is full"),
    (errno.EACCES, r"is not writable \(Permission denied\): set NANOHYDRA_DATA"), (errno.EPERM, "is not writable"), (errno.EROFS, "is not writable"),
    (errno.EIO, "^[^:]*Input/output error: '[^']*x'$")])
def test_a_write_error_says_what_to_do(tmp_path, number, words):
    def make(partial):
        raise OSError(number, os.strerror(number), str(partial / "x"))

    with pytest.raises(OSError, match=words):
        make_once(tmp_path / "a", make)


def test_an_unreadable_source_is_named_as_it_is(tmp_path):
    def make(partial):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/secret.txt")

    with pytest.raises(PermissionError, match=r"/elsewhere/secret\.txt"):
        make_once(tmp_path / "a", make)
