"""A file or folder that has its final name is complete, whatever failed while it was written."""

import errno
import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

import atomic
import locks


def disk_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def writes_wait_for_the_disk(nothing_waits_for_the_disk, monkeypatch):
    monkeypatch.setattr(os, "fsync", nothing_waits_for_the_disk)


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


def test_a_folder_gets_its_final_name_when_it_is_complete(tmp_path):
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


@pytest.mark.parametrize("umask, mode", [(0o022, 0o755), (0o077, 0o700)])
def test_a_folder_is_as_open_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic.new_folder(tmp_path / "final"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "final").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_folder(tmp_path, error):
    with pytest.raises(error), atomic.new_folder(tmp_path / "final") as partial:
        (partial / "a").write_bytes(b"one")
        raise error
    assert not any(tmp_path.iterdir())


def test_a_removed_parent_is_not_created_again(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.new_folder(tmp_path / "run/checkpoints/step_1"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(tmp_path):
    final = tmp_path / "final"
    with atomic.new_folder(final) as partial:
        (partial / "a").write_bytes(b"mine")
        final.mkdir()  # another process was faster
        (final / "a").write_bytes(b"theirs")
    assert tree(tmp_path) == {"final/a": b"theirs"}
    assert list(tmp_path.iterdir()) == [final]


def test_a_file_with_the_name_of_a_folder_is_kept(tmp_path):
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


def test_a_kill_leaves_no_folder_with_the_final_name(tmp_path):
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
def test_a_folder_is_synced_before_it_is_renamed(tmp_path, journal):
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
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    atomic.write_bytes(tmp_path / "final", b"old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write_bytes(tmp_path / "final", b"new")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write_bytes(tmp_path / "first", b"new")
    assert tree(tmp_path) == {"final": b"old"}


@needs_proc
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_the_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, disk_full)
    for write in (lambda path: atomic.write_bytes(path, b"new"), lambda path: atomic.write_file(path, [b"new"])):
        with pytest.raises(OSError, match="No space left on device") as raised:
            write(tmp_path / "file")
        assert raised.value.filename == str(tmp_path / "file")


def test_a_file_is_synced_before_it_is_renamed(tmp_path, journal):
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


def test_write_file_writes_chunks_and_returns_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "CHUNK_BYTES", 7)
    content = os.urandom(100)
    assert atomic.write_file(tmp_path / "a", [content[:33], b"", memoryview(content[33:])]) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "a").read_bytes() == content
    with pytest.raises(FileExistsError):
        atomic.write_file(tmp_path / "a", [b"other"])


def test_truncating_needs_no_disk_space(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"one\ntwo\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk_full)
        atomic.truncate(tmp_path / "a", b"one\n")
    assert tree(tmp_path) == {"a": b"one\n"}
    (tmp_path / "a").write_bytes(b"one\ntwo\n")
    atomic.truncate(tmp_path / "a", b"two\n")
    assert tree(tmp_path) == {"a": b"two\n"}


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
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


def test_an_incomplete_line_is_removed_on_opening(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw")
    lines = atomic.LineFile(path)
    assert path.read_bytes() == b"one\n"
    lines.add("2")
    assert path.read_bytes() == b"one\n2\n"
    lines.sync()
    lines.close()


def test_a_line_that_a_full_disk_cuts_is_written_again(tmp_path, monkeypatch):
    lines = atomic.LineFile(tmp_path / "lines")
    lines.add("first")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, content: write(handle, content[:3]) if len(content) > 4 else disk_full())
        lines.add("second")
        assert (tmp_path / "lines").read_bytes() == b"first\n"
        with pytest.raises(OSError, match=r"takes no more lines .No space"):
            lines.sync()
    lines.add("third")
    assert (tmp_path / "lines").read_bytes() == b"first\nsecond\nthird\n"
    lines.close()


# Reading


def special(path: Path, kind: str) -> None:
    """Put something at `path` that is not a regular file."""
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
USES = [atomic.LineFile, atomic.read_json, lambda path: atomic.truncate(path, b""), lambda path: locks.Lock(path, "me")]


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read_and_written(tmp_path, monkeypatch, kind):
    """Anything else is refused at once, by one sentence, and the target of a link is not changed."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    special(Path("file"), kind)
    before = tree(tmp_path) if kind == "link" else {}
    for use in USES:
        with pytest.raises(atomic.NotRegularFile, match="file is not a regular file"):
            use(Path("file"))
    # A new file takes the place of a link, but not that of a device.
    if "link" not in kind or kind == "link to a FIFO":
        with pytest.raises(atomic.NotRegularFile, match="use another name"):
            atomic.write_bytes(Path("file"), b"new")
    assert (tree(tmp_path) if kind == "link" else {}) == before and not Path("nowhere").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"], ids=range(5))
def test_invalid_json_is_a_value_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError):
        atomic.read_json(tmp_path / "file")


def test_json_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", atomic.MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="file is larger than"):
        atomic.read_json(tmp_path / "file")


def test_removing_a_link_keeps_its_target(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/kept").touch()
    (tmp_path / ".partial-x").symlink_to(tmp_path / "theirs")
    atomic.remove(tmp_path / ".partial-x")
    assert list(tree(tmp_path)) == ["theirs/kept"] and not os.path.lexists(tmp_path / ".partial-x")
