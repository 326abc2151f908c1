"""Saving in the background: what waits for it, and where its errors are reported."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from test_checkpoint import snapshot

from checkpointing import saver, store
from checkpointing.saver import Saver
from checkpointing.spec import MODEL


@pytest.fixture
def slow(tmp_path):
    """A saver that starts to write when `go` is set, and its warnings."""
    go, warnings = threading.Event(), []

    def make(stop_on_error=False):
        return Saver(tmp_path, 2, 0, lambda: go.wait(60), warnings.append, stop_on_error), go, warnings
    return make


def test_training_continues_while_a_checkpoint_is_written(slow, tmp_path):
    one, go, _ = slow()
    with one:
        state = snapshot(1)
        one.save(state)
        one.check()
        state.model["w"].zero_()
        assert one.saved == 0 and not list(tmp_path.glob("step_*"))
        go.set()
        one.finish()
        assert one.saved == 1
    (found,) = store.list_checkpoints(tmp_path)
    assert torch.equal(found.load_tensors(MODEL, state.model)["w"], snapshot(1).model["w"])


def test_an_error_waits_for_the_save_and_ctrl_c_does_not(slow, tmp_path):
    one, go, _ = slow()
    with pytest.raises(ValueError), one:
        one.save(snapshot(1))
        threading.Timer(0.2, go.set).start()
        raise ValueError
    assert [found.step for found in store.list_checkpoints(tmp_path)] == [1]
    other, go, _ = slow()
    go.clear()
    with pytest.raises(KeyboardInterrupt), other:
        other.save(snapshot(2))
        raise KeyboardInterrupt
    assert other.thread.is_alive()
    go.set()
    other.thread.join()


def test_a_limit_on_threads_saves_in_this_thread(slow, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    one, go, _ = slow()
    go.set()
    monkeypatch.setattr("threading.Thread.start", refuse)
    with one:
        one.save(snapshot(1))
    assert one.saved == 1


@pytest.mark.parametrize("stop", [True, False])
def test_a_write_error_is_a_warning_or_raised_by_finish(slow, monkeypatch, stop):
    one, go, warnings = slow(stop)
    go.set()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with one:
        one.save(snapshot(1))
        if stop:
            with pytest.raises(OSError, match="could not be written"):
                one.finish()
        else:
            one.finish()
    assert one.saved == 0 and len(warnings) == (not stop)


def test_a_bug_is_not_reported_as_a_full_disk(slow, monkeypatch):
    one, go, _ = slow()
    go.set()
    monkeypatch.setattr(saver.store, "prune", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError), one:
        one.save(snapshot(1))
        one.finish()
