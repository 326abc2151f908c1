"""Checkpoints: whole or absent, found by looking, pruned, and nothing of theirs is pickle."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

import atomic
from training import checkpoint


def save(folder, step, val_loss=None):
    tensors = {"w": torch.arange(6.0).view(2, 3) + step}
    return checkpoint.save(folder, tensors, {"0.0.exp_avg": tensors["w"] * 2}, {"kind": "byte"}, {"step": step, "val_loss": val_loss})


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7, 1.5)
    (found,) = checkpoint.find(tmp_path)
    assert found.folder.name == "step_00000007" and found.step == 7 and found.state["val_loss"] == 1.5
    assert torch.equal(found.model_tensors()["w"], torch.arange(6.0).view(2, 3) + 7)
    assert torch.equal(found.optimizer_tensors()["0.0.exp_avg"], 2 * (torch.arange(6.0).view(2, 3) + 7))
    assert found.state["versions"]["torch"] == torch.__version__


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    checkpoint.save(tmp_path, {"w": torch.arange(6.0).view(2, 3).T}, {}, {"kind": "byte"}, {"step": 1})
    assert torch.equal(checkpoint.find(tmp_path)[0].model_tensors()["w"], torch.arange(6.0).view(2, 3).T)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)]:
        save(tmp_path, step, loss)
    (tmp_path / f"{atomic.PARTIAL}step_00000006-x").mkdir()
    checkpoint.prune(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004", "step_00000005"]
    assert checkpoint.best(checkpoint.find(tmp_path)).step == 2


def test_without_evaluations_the_newest_is_the_best(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.best(checkpoint.find(tmp_path)).step == 2
    assert checkpoint.best([]) is None


def test_a_full_disk_while_saving_leaves_the_old_checkpoints_and_no_half_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    save(tmp_path, 1)
    partial = tmp_path / f"{atomic.PARTIAL}step_00000002-abc"
    partial.mkdir()
    (partial / "state.json").write_text(json.dumps({"step": 2}))
    assert [one.step for one in checkpoint.find(tmp_path)] == [1]


def test_runs_are_found_by_name_path_and_age(tmp_path):
    save(tmp_path / "old" / "checkpoints", 1)
    os.utime(tmp_path / "old" / "checkpoints", (1, 1))
    save(tmp_path / "sweep" / "lr=0.1" / "checkpoints", 1)
    assert checkpoint.find_run(tmp_path, "old") == tmp_path / "old"
    assert checkpoint.find_run(tmp_path, "sweep/lr=0.1") == tmp_path / "sweep/lr=0.1"
    assert checkpoint.find_run(tmp_path / "elsewhere", str(tmp_path / "old")) == tmp_path / "old"
    assert checkpoint.find_run(tmp_path, "") == tmp_path / "sweep/lr=0.1"
    with pytest.raises(ValueError, match=r"run=new is not there. There are: old, sweep/lr=0.1"):
        checkpoint.find_run(tmp_path, "new")
