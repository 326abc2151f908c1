"""The checkpoints of a run are listed, loaded and pruned; a damaged one is renamed and the one before it used."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
from contextlib import suppress

import pytest
from test_checkpoint import LIKE, load_all, save

import atomic
from checkpointing import store
from checkpointing.checkpoint import DamagedCheckpoint
from checkpointing.find_runs import find_run
from checkpointing.spec import FILES, MANIFEST, MODEL


def test_pruning_keeps_the_newest_best_and_scheduled(tmp_path):
    for step, loss, scheduled in [(1, 3.0, True), (2, 1.0, True), (3, 2.0, True), (4, None, False), (5, 2.5, False)]:
        save(tmp_path, step, loss, scheduled)
    (tmp_path / f"{atomic.PARTIAL}step_00000006-x").mkdir()
    store.prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003", "step_00000005"]
    chosen = {which: store.load_checkpoint(tmp_path, which, store.verified, pytest.fail).step for which in store.ORDERS}
    assert chosen == {"best": 2, "last": 5, "scheduled": 3}


def test_without_evaluations_the_newest_is_the_best(tmp_path):
    assert store.load_checkpoint(tmp_path, "best", store.verified, pytest.fail) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert store.load_checkpoint(tmp_path, "best", store.verified, pytest.fail).step == 2


def test_a_partial_checkpoint_is_not_listed(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / f"{atomic.PARTIAL}step_00000002-abc")
    assert [one.step for one in store.list_checkpoints(tmp_path)] == [1]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


HARMS = {"flipped": flipped, "cut": lambda content: content[:-1], "longer": lambda content: content + b" ",
         "empty": lambda content: b"", "missing": None}


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, name):
    """One warning names the damaged file; pruning keeps the damaged checkpoint."""
    harms = [harm for harm in HARMS if (name, harm) != (MANIFEST, "longer")]  # white space does not change JSON
    for harm in harms:
        folder = tmp_path / harm
        save(folder, 1)
        path = save(folder, 2) / name
        content = path.read_bytes()
        path.unlink()
        if HARMS[harm]:
            path.write_bytes(HARMS[harm](content))
        warnings = []
        assert store.load_checkpoint(folder, "last", store.verified, warnings.append, rename_damaged=True).step == 1
        (warning,) = warnings
        assert str(path) in warning and "using step_00000001 instead" in warning
        store.prune(folder, keep_last=1)
        assert sorted(one.name for one in folder.iterdir()) == ["damaged-step_00000002", "step_00000001"]


def test_if_all_checkpoints_are_damaged_none_is_renamed(tmp_path):
    (save(tmp_path, 1) / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged: .*model.safetensors .*restart=true"):
        store.load_checkpoint(tmp_path, "last", store.verified, pytest.fail, rename_damaged=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


# System errors are not damage

SYSTEM_ERRORS = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.EINTR, errno.ENOMEM, errno.EACCES, errno.ESTALE]


@pytest.mark.parametrize("call", ["open", "lstat", "scandir"])
def test_a_system_error_renames_nothing(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    save(tmp_path, 2)
    original = getattr(os, call)
    for code in SYSTEM_ERRORS:
        def failing(path, *words, code=code, **options):
            if "step_00000002" in str(path) or call == "scandir":
                raise OSError(code, os.strerror(code), str(path))
            return original(path, *words, **options)

        with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)) as refusal:
            patch.setattr(os, call, failing)
            store.load_checkpoint(tmp_path, "last", store.verified, pytest.fail, rename_damaged=True)
        if call != "scandir":
            assert "move" in str(refusal.value) and "\n" not in str(refusal.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_too_many_open_files_damage_nothing(tmp_path):
    """With the system's own limit, at each call that opens a file, until the checkpoint can be read."""
    save(tmp_path, 2)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, before[1]))
    refused = 0
    try:
        for limit in range(taken[0] + 1, taken[0] + 20):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            try:
                store.load_checkpoint(tmp_path, "last", lambda one: load_all(one, LIKE), pytest.fail, rename_damaged=True)
                break
            except OSError:
                refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(taken[0])
    assert 0 < refused < 18
    assert [one.name for one in tmp_path.iterdir()] == ["step_00000002"]


def test_a_link_to_the_checkpoints_is_refused(tmp_path):
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoints is a link"):
        store.load_checkpoint(tmp_path / "checkpoints", "last", store.verified, pytest.fail)


# Reading while a training saves and prunes


@pytest.mark.slow
@pytest.mark.parametrize("which", store.ORDERS)
def test_reading_during_training_always_succeeds(tmp_path, which, nothing_waits_for_the_disk, monkeypatch):
    """Another thread replaces the newest and the best checkpoint all the time, and may run at any point."""
    monkeypatch.setattr(os, "fsync", nothing_waits_for_the_disk)  # else that thread would leave no time to read
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.parent.mkdir()
    save(checkpoints, 1, 100.0)
    ended = threading.Event()

    def train():
        step = 1
        while not ended.is_set():
            step += 1
            save(checkpoints, step, 100 / step)
            store.prune(checkpoints, keep_last=1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for _ in range(50):
            assert find_run(tmp_path, "") == tmp_path / "run"
            assert store.load_checkpoint(checkpoints, which, lambda one: load_all(one, LIKE), pytest.fail)
    finally:
        ended.set()
        trainer.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("failure", [FileNotFoundError, NotADirectoryError, OSError, DamagedCheckpoint])
def test_an_error_of_a_deleted_checkpoint_is_retried(tmp_path, failure):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def load(one):
        if one.step == 2:
            with suppress(FileNotFoundError):
                atomic.remove(one.folder)
            raise failure("gone")
        return one.step

    assert store.load_checkpoint(tmp_path, "last", load, pytest.fail) == 1


def test_a_dangling_link_counts_as_a_used_name(tmp_path):
    (tmp_path / "tiny.old").symlink_to(tmp_path / "nowhere")
    assert atomic.unused_name(tmp_path / "tiny.old") == tmp_path / "tiny.old-2"
