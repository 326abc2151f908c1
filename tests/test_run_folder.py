"""A run folder is found by name, refuses links, is locked by one process, and is noticed when it is moved."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from test_atomic import KINDS, special, tree
from test_locks import without_locks

import train as program
import trainer
from checkpointing import store
from checkpointing.find_runs import find_run, lowest_bits_per_byte
from checkpointing.run_folder import FILES, FOLDERS, LOCK, Run, check_file_types
from report.history import open_history


@pytest.fixture
def make_run(tmp_path):
    """Make the folder of a run with these bits per byte; each is saved after the ones before."""
    def make(name, *results, file="metrics.jsonl"):
        folder = tmp_path / name
        (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
        (folder / LOCK).touch()
        (folder / "config.yaml").touch()
        lines = [json.dumps({"step": 1, "bits_per_byte": result}) for result in results]
        (folder / file).write_text("\n".join(["{", "3", *lines, '{"step": 2, "loss": 0.1}']))
        made.append(folder)
        os.utime(folder / "checkpoints", (len(made), len(made)))
        return folder

    made = []
    return make


def test_the_best_run_of_a_sweep_is_found_and_named(make_run, tmp_path, capsys):
    (tmp_path / "sweep" / "logs").mkdir(parents=True)
    make_run("sweep/a", 2.5, 2.1)
    best = make_run("sweep/b", 2.5, 1.9, 2.6)
    make_run("sweep/diverged", None)
    make_run("sweep/cut", file="other")
    assert find_run(tmp_path, "") == find_run(tmp_path, "sweep") == best
    assert find_run(tmp_path, str(tmp_path / "sweep")) == find_run(tmp_path / "sweep", "") == best
    assert f"The best of 4 runs in {tmp_path}/sweep: b, 1.9000 bits per byte" in capsys.readouterr().err
    assert find_run(tmp_path, "sweep/a") == tmp_path / "sweep/a"


def test_a_run_saved_after_a_sweep_is_found(make_run, tmp_path):
    (tmp_path / "sweep" / "logs").mkdir(parents=True)
    make_run("sweep/a", 1.0)
    later = make_run("later", 2.0)
    assert find_run(tmp_path, "") == later


def test_without_results_the_last_run_of_a_sweep_is_found(make_run, tmp_path):
    (tmp_path / "sweep" / "logs").mkdir(parents=True)
    make_run("sweep/a")
    last = make_run("sweep/b")
    assert find_run(tmp_path, "sweep") == last


def test_a_folder_without_logs_is_not_a_sweep(make_run, tmp_path):
    make_run("mine/a", 1.0)
    last = make_run("mine/b", 2.0)
    assert find_run(tmp_path, "") == last
    with pytest.raises(ValueError, match="run=mine is not a run"):
        find_run(tmp_path, "mine")


def test_of_many_runs_the_closest_and_some_are_listed(tmp_path):
    for number in range(30):
        (tmp_path / f"lr={number}" / "checkpoints/step_00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run=LR=17 does not exist \(did you mean lr=17\?\). There are: lr=0, .* and 10 more.$") as refusal:
        find_run(tmp_path, "LR=17")
    assert str(refusal.value).count(", ") == 19


def test_runs_are_found_by_name_path_and_age(tmp_path):
    for name in ("old", "sweep/lr=0.1"):
        (tmp_path / name / "checkpoints/step_00000001").mkdir(parents=True)
    os.utime(tmp_path / "old" / "checkpoints", (1, 1))
    assert find_run(tmp_path, "old") == tmp_path / "old"
    assert find_run(tmp_path, "sweep/lr=0.1") == tmp_path / "sweep/lr=0.1"
    assert find_run(tmp_path / "elsewhere", str(tmp_path / "old")) == tmp_path / "old"
    assert find_run(tmp_path, "") == tmp_path / "sweep/lr=0.1"
    with pytest.raises(ValueError, match=r"run=new does not exist. There are: old, sweep/lr=0.1"):
        find_run(tmp_path, "new")
    with pytest.raises(ValueError, match=r"elsewhere has no run with a checkpoint: train one with python train.py"):
        find_run(tmp_path / "elsewhere", "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/lock").touch()
    (tmp_path / "new/config.yaml").touch()
    with pytest.raises(ValueError, match=r"run=new has no checkpoint yet: the first is saved after training.checkpoint_every steps"):
        find_run(tmp_path, "new")


# Links and pipes in a run folder


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_links_and_pipes_in_a_run_are_refused(tmp_path, monkeypatch, name):
    """At once, by one sentence, and without a change, also if a link leads to a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/.partial-kept").touch()
    kinds = [*KINDS, "link to a folder"] if name in FILES else [*(set(KINDS) - {"folder"}), "file", "link to a folder"]
    for number, kind in enumerate(kinds):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        if kind == "file":
            (folder / name).touch()
        elif kind == "link to a folder":
            (folder / name).symlink_to(tmp_path / "theirs")
        else:
            special(Path(name), kind)
        before = sorted(os.listdir(folder))
        said = {"FIFO": "a pipe", "folder": "a folder", "file": "a file", "socket": "a socket or a device"}.get(kind, "a link")
        with pytest.raises(ValueError, match=f"{name} is {said}, but .*move it away") as refusal:
            Run(folder)
        assert "\n" not in str(refusal.value) and sorted(os.listdir(folder)) == before
    assert list(tree(tmp_path / "theirs")) == [".partial-kept"]


def test_reading_a_run_follows_no_links(compose_tiny, tmp_path):
    """Neither does sampling, nor a report, nor a sweep that asks whether the run is finished."""
    program.train(compose_tiny("training.max_steps=1"))
    run = tmp_path / "runs/tiny"
    for name in ("checkpoints", "metrics.jsonl", "config.yaml"):
        (run / name).rename(tmp_path / "elsewhere")
        (run / name).symlink_to(tmp_path / "elsewhere")
        for read in (lambda: find_run(tmp_path / "runs", "tiny"), lambda: open_history(run, "tiny"), lambda: check_file_types(run)):
            with pytest.raises(ValueError, match=f"{name} is a link"):
                read()
        (run / name).unlink()
        (tmp_path / "elsewhere").rename(run / name)


def test_a_run_and_runs_dir_may_be_links(compose_tiny, tmp_path):
    """As to a larger disk."""
    (tmp_path / "disk/tiny").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert program.train(compose_tiny("training.max_steps=1")) == 0
    (tmp_path / "disk/other").mkdir()
    (tmp_path / "disk/linked").symlink_to(tmp_path / "disk/other")
    assert program.train(compose_tiny("training.max_steps=1", "name=linked")) == 0
    assert len(store.list_checkpoints(tmp_path / "disk/other/checkpoints")) == 1


def at_step(monkeypatch, step, change):
    """Do `change` at the beginning of a step."""
    def lr_scale(now, *arguments):
        if now == step:
            change()
        return plain(now, *arguments)

    plain = trainer.lr_scale
    monkeypatch.setattr(trainer, "lr_scale", lr_scale)


@pytest.mark.parametrize("change, locks", [
    ("moved", True), ("removed", True), ("its runs_dir moved", True), ("replaced by another run", True), ("replaced by another run", False)])
def test_a_run_stops_when_its_folder_is_gone(compose_tiny, tmp_path, monkeypatch, capsys, change, locks):
    """At the next step, by one sentence; nothing is written at the old place, and another run there is left alone."""
    runs = tmp_path / "runs"
    others: list[Run] = []  # which has checkpoints of its own

    def do():
        if change == "removed":
            while (runs / "tiny").exists():  # a checkpoint may be written meanwhile
                shutil.rmtree(runs / "tiny", ignore_errors=True)
        elif change == "its runs_dir moved":
            runs.rename(tmp_path / "moved")
        else:
            (runs / "tiny").rename(runs / "moved")
        if "replaced" in change:
            others.append(Run(runs / "tiny"))
            (runs / "tiny/checkpoints").mkdir()

    if not locks:
        without_locks(monkeypatch)
    at_step(monkeypatch, 3, do)
    with pytest.raises(ValueError, match=r"tiny was moved, removed or replaced during training: the steps since the last"):
        program.train(compose_tiny("training.max_steps=5", "training.checkpoint_every=2"))
    assert "could not be written" not in capsys.readouterr().out
    if others:
        others[0].check_not_moved()
        assert set(tree(runs / "tiny")) <= {LOCK, f"{LOCK}.held"} and not any((runs / "tiny/checkpoints").iterdir())
        (runs / "tiny/checkpoints").rmdir()
        with others[0]:
            pass
    assert not (runs / "tiny").exists()
    if change != "removed":
        monkeypatch.undo()
        moved = (tmp_path / "moved/tiny") if "runs_dir" in change else runs / "moved"
        moved.rename(tmp_path / "back")
        runs.mkdir(exist_ok=True)
        (tmp_path / "back").rename(runs / "again")
        assert program.train(compose_tiny("training.max_steps=5", "name=again")) == 0


def test_without_locks_a_run_trains_and_is_held(compose_tiny, tmp_path, monkeypatch):
    """Also when it is moved aside; nothing is left of what stands for its lock."""
    without_locks(monkeypatch, errno.EOPNOTSUPP)
    assert program.train(compose_tiny("training.max_steps=1")) == 0
    with Run(tmp_path / "runs/tiny"), pytest.raises(ValueError, match=rf"is being trained by process {os.getpid()} on"):
        program.train(compose_tiny("training.max_steps=1"))
    assert program.train(compose_tiny("training.max_steps=1", "restart=true")) == 0
    assert sorted(path.name for path in (tmp_path / "runs").rglob("lock*")) == ["lock", "lock"]


def test_a_result_that_is_no_float_is_not_the_best(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"bits_per_byte": 2.5}}\n{{"bits_per_byte": -1{"0" * 400}}}\n')
    assert lowest_bits_per_byte(tmp_path) == 2.5
