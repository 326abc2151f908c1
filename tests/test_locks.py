"""A lock names its holder, ends with its process, and works on file systems without locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from test_atomic import tree

import locks

HOLD = "import locks, pathlib, sys, time; locks.Lock(pathlib.Path(sys.argv[1]), 'the first'); print('held', flush=True); time.sleep(99)"


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "run" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=Path(locks.__file__).parent, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    for _ in range(2):
        with pytest.raises(BlockingIOError) as refusal:
            locks.Lock(path, "the second")
        assert refusal.value.strerror == "the first"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = locks.Lock(path, "me")
    assert path.read_text() == "me"
    with pytest.raises(BlockingIOError):
        locks.Lock(path, "me again")
    lock.release()
    locks.Lock(path, "x").release()


def test_a_lock_moves_with_its_folder(tmp_path):
    lock = locks.Lock(tmp_path / "run" / "lock", "me")
    (tmp_path / "run").rename(tmp_path / "run.old")
    locks.Lock(tmp_path / "run" / "lock", "another").release()
    with pytest.raises(BlockingIOError):
        locks.Lock(tmp_path / "run.old" / "lock", "another")
    lock.release()


def test_a_full_disk_is_named_with_the_lock(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/lock'"):
        locks.Lock(tmp_path / "lock", "me")


# A file system without locks

NO_LOCK_CODES = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL]


def without_locks(monkeypatch, code=errno.ENOLCK):
    def flock(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", flock)


@pytest.mark.parametrize("code", NO_LOCK_CODES, ids=errno.errorcode.get)
def test_a_marker_replaces_a_lock_that_is_not_supported(tmp_path, monkeypatch, code):
    without_locks(monkeypatch, code)
    lock = locks.Lock(tmp_path / "lock", "the first")
    with pytest.raises(BlockingIOError) as refusal:
        locks.Lock(tmp_path / "lock", "the second")
    assert refusal.value.strerror == "the first" and lock.in_place()
    lock.release()
    assert sorted(tree(tmp_path)) == ["lock"]
    locks.Lock(tmp_path / "lock", "the second").release()


@pytest.mark.parametrize("supported", [True, False])
def test_a_look_at_a_lock_refuses_no_one(tmp_path, monkeypatch, supported):
    """`is_locked` has the lock for a moment, in which another process may ask for it."""
    if not supported:
        without_locks(monkeypatch)
    look, asked = locks.Lock(tmp_path / "lock", locks.LOOKER), []
    thread = Thread(target=lambda: asked.append(locks.Lock(tmp_path / "lock", "me")))
    thread.start()
    time.sleep(0.03)
    look.release()
    thread.join()
    asked[0].release()
    assert (tmp_path / "lock").read_text() == "me"


def test_other_errors_of_locking_are_raised(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        locks.Lock(tmp_path / "lock", "me")


def test_the_marker_of_a_killed_process_is_replaced(tmp_path, monkeypatch):
    """Also while it is a zombie, because its parent has not waited for it."""
    path = tmp_path / "lock"
    refuse = "import locks; locks.fcntl.flock = lambda *words: (_ for _ in ()).throw(OSError(37, 'No locks')); "
    holder = subprocess.Popen([sys.executable, "-c", refuse + HOLD, path], cwd=Path(locks.__file__).parent,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    without_locks(monkeypatch)
    with pytest.raises(BlockingIOError, match="the first"):
        locks.Lock(path, "the second")
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lock = locks.Lock(path, "the second")
    holder.communicate()
    assert lock.in_place()
    lock.release()


@pytest.mark.parametrize("content, held", [
    ({"host": "elsewhere", "process": 1, "started": "", "holder": "x"}, True),
    ({"host": socket.gethostname(), "process": os.getpid(), "started": "another boot 1", "holder": "x"}, False),
    ({"host": socket.gethostname(), "process": 2**22 + 1, "started": "", "holder": "x"}, False),
    ({"host": socket.gethostname(), "process": -1, "started": "", "holder": "x"}, False),
    ({"host": socket.gethostname(), "process": 2**80, "started": "", "holder": "x"}, False),
    ({}, False), ([], False), ("", False)], ids=range(8))
def test_only_stale_markers_are_replaced(tmp_path, monkeypatch, content, held):
    without_locks(monkeypatch)
    (tmp_path / "lock.held").write_text(json.dumps(content) if content != "" else "")
    if held:
        with pytest.raises(BlockingIOError, match=r"if it has ended, delete .*lock.held"):
            locks.Lock(tmp_path / "lock", "me")
    else:
        locks.Lock(tmp_path / "lock", "me").release()
        assert sorted(tree(tmp_path)) == ["lock"]


def test_one_of_several_threads_replaces_a_stale_marker(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    for _ in range(5):
        (tmp_path / "lock.held").write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1, "started": ""}))
        taken = []

        def take(taken=taken):
            with suppress(BlockingIOError):
                taken.append(locks.Lock(tmp_path / "lock", "me"))

        threads = [Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lock.in_place() for lock in taken) == 1
        for lock in taken:
            lock.release()


def test_a_marker_that_was_just_replaced_is_put_back(tmp_path):
    """Another process found the same stale marker, and was faster."""
    marker = locks.Marker(tmp_path / "lock", "the faster one")
    marker._remove_stale({"host": socket.gethostname(), "process": 2**22 + 1, "started": ""})
    assert locks.is_same_file(tmp_path / "lock.held", marker.descriptor)
    marker.release()


def test_an_error_while_a_file_is_locked_is_not_about_the_lock(tmp_path):
    with pytest.raises(BlockingIOError, match="of a pipe"), locks.exclusive_lock(tmp_path / "out"):
        raise BlockingIOError("of a pipe")


def test_exclusive_lock_works_without_locks(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    with (locks.exclusive_lock(tmp_path / "out"), pytest.raises(BlockingIOError, match="is being written by another process"),
          locks.exclusive_lock(tmp_path / "out")):
        pass
    assert sorted(tree(tmp_path)) == ["out"]


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("change", ["moved", "removed", "replaced", "followed"])
def test_a_lock_notices_that_its_file_was_moved(tmp_path, monkeypatch, supported, change):
    if not supported:
        without_locks(monkeypatch)
    run = tmp_path / "run"
    lock = locks.Lock(run / "lock", "me")
    assert lock.in_place()
    if change == "removed":
        shutil.rmtree(run)
    else:
        run.rename(tmp_path / "moved")
    if change == "replaced":
        other = locks.Lock(run / "lock", "another")
        assert other.in_place()
    if change == "followed":
        lock.follow(tmp_path / "moved/lock")
    assert lock.in_place() == (change == "followed")
    lock.release()
    assert change != "replaced" or other.in_place()


def test_a_network_error_is_not_a_moved_file(tmp_path, monkeypatch):
    lock = locks.Lock(tmp_path / "lock", "me")

    def lstat(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(locks.os, "lstat", lstat)
    assert lock.in_place()
