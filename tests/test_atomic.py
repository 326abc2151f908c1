"""What has its final name is whole, whatever goes wrong while it is being made."""

import errno
import hashlib
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

import atomic


def disk_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def journal(monkeypatch):
    """What is asked of the disk, in order: ("sync", name) and ("rename", from, to)."""
    calls = []
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(handle):
        calls.append(("sync", Path(f"/proc/self/fd/{handle}").resolve().name))
        originals["fsync"](handle)

    def rename(name):
        def renamed(source, target):
            calls.append(("rename", Path(source).name, Path(target).name))
            originals[name](source, target)
        return renamed

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, rename(name))
    return calls


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")


# A folder


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    final = tmp_path / "checkpoints" / "step_1"
    with atomic.new_folder(final) as partial:
        assert partial.parent == final.parent and partial.name.startswith(atomic.PARTIAL)
        assert not any(partial.iterdir())
        (partial / "a").write_bytes(b"one")
        (partial / "b").write_bytes(b"two")
        assert not final.exists()
    assert tree(tmp_path) == {"checkpoints/step_1/a": b"one", "checkpoints/step_1/b": b"two"}
    assert list(final.parent.iterdir()) == [final]
    assert final.stat().st_mode & 0o777 == 0o755  # others may read it, unlike what mkdtemp makes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_whose_making_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic.new_folder(tmp_path / "final") as partial:
        (partial / "a").write_bytes(b"one")
        raise error
    assert not any(tmp_path.iterdir())


def test_a_folder_whose_place_was_removed_does_not_come_back(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.new_folder(tmp_path / "run/checkpoints/step_1"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_already_there_stays_as_it_is(tmp_path):
    final = tmp_path / "final"
    with atomic.new_folder(final) as partial:
        (partial / "a").write_bytes(b"mine")
        final.mkdir()  # another process was faster
        (final / "a").write_bytes(b"theirs")
    assert tree(tmp_path) == {"final/a": b"theirs"}
    assert list(tmp_path.iterdir()) == [final]


def test_a_file_in_the_folders_place_is_an_error_and_stays(tmp_path):
    (tmp_path / "final").write_bytes(b"a file")
    with pytest.raises(OSError), atomic.new_folder(tmp_path / "final"):
        pass
    assert tree(tmp_path) == {"final": b"a file"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), atomic.new_folder(tmp_path / "final") as partial:
        (partial / "a").write_bytes(b"one")
    assert not any(tmp_path.iterdir())


def test_a_kill_leaves_no_folder_of_the_final_name_and_the_next_attempt_works(tmp_path):
    program = ("import atomic, os, pathlib, sys\n"
               "with atomic.new_folder(pathlib.Path(sys.argv[1])) as partial:\n"
               "    (partial / 'a').write_bytes(b'half')\n"
               "    os._exit(9)")
    final = tmp_path / "final"
    assert subprocess.run([sys.executable, "-c", program, final], cwd=Path(atomic.__file__).parent).returncode == 9
    [leftover] = tmp_path.iterdir()
    assert leftover.name.startswith(atomic.PARTIAL)
    with atomic.new_folder(final) as partial:
        (partial / "a").write_bytes(b"whole")
    assert (final / "a").read_bytes() == b"whole"


@needs_proc
def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, journal):
    with atomic.new_folder(tmp_path / "final") as partial:
        for name in ("a", "b"):
            atomic.write_file(partial / name, [b"content"])
    *before, rename, parent = journal
    assert before == [("sync", "a"), ("sync", "b"), ("sync", partial.name)]
    assert rename == ("rename", partial.name, "final")
    assert parent == ("sync", tmp_path.name)


# A file


def test_a_file_is_written_and_replaced(tmp_path):
    final = tmp_path / "deep" / "down" / "config.yaml"
    for content in (b"old", b"", b"new\r\n\0"):
        atomic.write_bytes(final, content)
        assert tree(tmp_path) == {"deep/down/config.yaml": content}
    assert final.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    atomic.write_bytes(tmp_path / "final", b"old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write_bytes(tmp_path / "final", b"new")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write_bytes(tmp_path / "first", b"new")
    assert tree(tmp_path) == {"final": b"old"}


@needs_proc
def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, journal):
    atomic.write_bytes(tmp_path / "final", b"content")
    file, rename, parent = journal
    assert file[0] == "sync" and file[1].startswith(atomic.PARTIAL)
    assert rename == ("rename", file[1], "final")
    assert parent == ("sync", tmp_path.name)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    contents = [bytes([digit]) * 100_000 for digit in b"0123456789"]
    atomic.write_bytes(tmp_path / "final", contents[0])

    def rewrite():
        for content in contents * 3:
            atomic.write_bytes(tmp_path / "final", content)
            time.sleep(0.002)

    writer = Thread(target=rewrite)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add((tmp_path / "final").read_bytes())
    writer.join()
    assert seen <= set(contents)


def test_a_file_is_written_in_pieces_and_its_sum_returned(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "PIECE_BYTES", 7)
    content = os.urandom(100)
    assert atomic.write_file(tmp_path / "a", [content[:33], b"", memoryview(content[33:])]) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "a").read_bytes() == content
    with pytest.raises(FileExistsError):
        atomic.write_file(tmp_path / "a", [b"other"])


def test_what_is_kept_of_a_file_needs_no_room_when_it_is_its_beginning(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"one\ntwo\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk_full)
        atomic.truncate(tmp_path / "a", b"one\n")
    assert tree(tmp_path) == {"a": b"one\n"}
    (tmp_path / "a").write_bytes(b"one\ntwo\n")
    atomic.truncate(tmp_path / "a", b"two\n")
    assert tree(tmp_path) == {"a": b"two\n"}


def test_a_folder_loses_its_name_before_its_content(tmp_path, monkeypatch):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "a").write_bytes(b"one")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *words, **options: None)  # killed here
        atomic.remove(tmp_path / "step_1")
    [leftover] = tmp_path.iterdir()
    assert leftover.name.startswith(f"{atomic.PARTIAL}step_1-")
    atomic.remove(leftover)
    assert not any(tmp_path.iterdir())


# Lines


def test_lines_are_appended_at_once_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw")
    lines = atomic.LineFile(path)
    assert path.read_bytes() == b"one\n"
    lines.add("2")
    assert path.read_bytes() == b"one\n2\n"
    lines.sync()
    lines.close()


def test_a_line_that_is_half_taken_is_taken_back_and_offered_again(tmp_path, monkeypatch):
    lines = atomic.LineFile(tmp_path / "lines")
    lines.add("first")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, content: write(handle, content[:3]))
        lines.add("second")
        assert (tmp_path / "lines").read_bytes() == b"first\n"
        with pytest.raises(OSError, match="takes no more lines"):
            lines.sync()
    lines.add("third")
    assert (tmp_path / "lines").read_bytes() == b"first\nsecond\nthird\n"
    lines.close()


# A lock


HOLD = "import atomic, pathlib, sys, time; atomic.Lock(pathlib.Path(sys.argv[1]), 'the first'); print('held', flush=True); time.sleep(99)"


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "run" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=Path(atomic.__file__).parent, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    for _ in range(2):
        with pytest.raises(BlockingIOError) as refusal:
            atomic.Lock(path, "the second")
        assert refusal.value.strerror == "the first"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = atomic.Lock(path, "me")
    assert path.read_text() == "me"
    with pytest.raises(BlockingIOError):
        atomic.Lock(path, "me again")
    lock.release()
    atomic.Lock(path, "x").release()


def test_a_lock_moves_with_its_folder(tmp_path):
    lock = atomic.Lock(tmp_path / "run" / "lock", "me")
    (tmp_path / "run").rename(tmp_path / "run.old")
    atomic.Lock(tmp_path / "run" / "lock", "another").release()
    with pytest.raises(BlockingIOError):
        atomic.Lock(tmp_path / "run.old" / "lock", "another")
    lock.release()


# Reading


def special(path: Path, kind: str) -> None:
    """Put something at `path` that is not a plain file."""
    if kind == "link":
        (path.parent / "elsewhere").write_bytes(b"theirs\n")
        path.symlink_to(path.parent / "elsewhere")
    elif kind == "link to a FIFO":
        os.mkfifo(path.parent / "elsewhere")
        path.symlink_to(path.parent / "elsewhere")
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


KINDS = ["link", "link to a FIFO", "dangling link", "FIFO", "socket", "device", "folder"]
USES = {"lines": atomic.LineFile, "lock": lambda path: atomic.Lock(path, "me"), "json": atomic.read_json,
        "shorten": lambda path: atomic.truncate(path, b"")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_only_plain_files_are_read_and_written(tmp_path, monkeypatch, kind, use):
    """By one sentence, at once, and what a link points to stays as it is."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    special(Path("file"), kind)
    before = tree(tmp_path) if kind == "link" else {}
    with pytest.raises(atomic.NotRegularFile, match="file is not a plain file"):
        USES[use](Path("file"))
    assert (tree(tmp_path) if kind == "link" else {}) == before and not Path("nowhere").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"], ids=range(5))
def test_json_that_cannot_be_read_is_a_value_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError):
        atomic.read_json(tmp_path / "file")


def test_json_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", atomic.MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="file is larger than"):
        atomic.read_json(tmp_path / "file")


def test_a_link_among_leftovers_is_removed_and_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/kept").touch()
    (tmp_path / ".partial-x").symlink_to(tmp_path / "theirs")
    atomic.remove(tmp_path / ".partial-x")
    assert list(tree(tmp_path)) == ["theirs/kept"] and not os.path.lexists(tmp_path / ".partial-x")


# A file system without locks

NO_LOCK_CODES = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL]


def without_locks(monkeypatch, code=errno.ENOLCK):
    def flock(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)


@pytest.mark.parametrize("code", NO_LOCK_CODES, ids=errno.errorcode.get)
def test_a_marker_stands_for_a_lock_that_cannot_be(tmp_path, monkeypatch, code):
    without_locks(monkeypatch, code)
    lock = atomic.Lock(tmp_path / "lock", "the first")
    with pytest.raises(BlockingIOError) as refusal:
        atomic.Lock(tmp_path / "lock", "the second")
    assert refusal.value.strerror == "the first" and lock.in_place()
    lock.release()
    assert sorted(tree(tmp_path)) == ["lock"]
    atomic.Lock(tmp_path / "lock", "the second").release()


def test_other_errors_of_locking_are_not_swallowed(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        atomic.Lock(tmp_path / "lock", "me")


def test_a_killed_holders_marker_is_replaced(tmp_path, monkeypatch):
    """While it lives it is named; killed, also while its parent has not yet waited for it, it holds nothing."""
    path = tmp_path / "lock"
    refuse = "import atomic; atomic.fcntl.flock = lambda *words: (_ for _ in ()).throw(OSError(37, 'No locks')); "
    holder = subprocess.Popen([sys.executable, "-c", refuse + HOLD, path], cwd=Path(atomic.__file__).parent,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    without_locks(monkeypatch)
    with pytest.raises(BlockingIOError, match="the first"):
        atomic.Lock(path, "the second")
    holder.kill()
    time.sleep(0.2)
    lock = atomic.Lock(path, "the second")
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
def test_markers_of_others_hold_and_stale_ones_do_not(tmp_path, monkeypatch, content, held):
    without_locks(monkeypatch)
    (tmp_path / "lock.held").write_text(json.dumps(content) if content != "" else "")
    if held:
        with pytest.raises(BlockingIOError, match=r"if it has ended, delete .*lock.held"):
            atomic.Lock(tmp_path / "lock", "me")
    else:
        atomic.Lock(tmp_path / "lock", "me").release()
        assert sorted(tree(tmp_path)) == ["lock"]


def test_of_many_that_find_a_stale_marker_one_gets_it(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    for _ in range(20):
        (tmp_path / "lock.held").write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1, "started": ""}))
        locks = []

        def take(locks=locks):
            with suppress(BlockingIOError):
                locks.append(atomic.Lock(tmp_path / "lock", "me"))

        threads = [Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lock.in_place() for lock in locks) == 1
        for lock in locks:
            lock.release()


def test_files_are_written_in_turn_without_locks_too(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    with (atomic.exclusive_lock(tmp_path / "out"), pytest.raises(BlockingIOError, match="is being written by another process"),
          atomic.exclusive_lock(tmp_path / "out")):
        pass
    assert sorted(tree(tmp_path)) == ["out"]


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("change", ["moved", "removed", "replaced", "followed"])
def test_a_lock_knows_whether_it_is_in_place(tmp_path, monkeypatch, locks, change):
    if not locks:
        without_locks(monkeypatch)
    run = tmp_path / "run"
    lock = atomic.Lock(run / "lock", "me")
    assert lock.in_place()
    if change == "removed":
        shutil.rmtree(run)
    else:
        run.rename(tmp_path / "moved")
    if change == "replaced":
        other = atomic.Lock(run / "lock", "another")
        assert other.in_place()
    if change == "followed":
        lock.follow(tmp_path / "moved/lock")
    assert lock.in_place() == (change == "followed")
    lock.release()
    assert change != "replaced" or other.in_place()


def test_an_error_of_the_network_does_not_look_like_a_moved_file(tmp_path, monkeypatch):
    lock = atomic.Lock(tmp_path / "lock", "me")

    def lstat(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(atomic.os, "lstat", lstat)
    assert lock.in_place()
