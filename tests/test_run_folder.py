"""A run's folder: which one a name means, what may lie in it, who holds it, and what happens when it is moved."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from test_atomic import KINDS, special, tree
from test_locks import without_locks

import train as story
from checkpointing import store
from checkpointing.run_folder import FILES, FOLDERS, LOCK, Run, check_file_types, find_run
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


def test_of_a_sweep_the_best_run_is_found_and_named(make_run, tmp_path, capsys):
    (tmp_path / "sweep" / "logs").mkdir(parents=True)
    make_run("sweep/a", 2.5, 2.1)
    best = make_run("sweep/b", 2.5, 1.9, 2.6)
    make_run("sweep/diverged", None)
    make_run("sweep/cut", file="other")
    assert find_run(tmp_path, "") == find_run(tmp_path, "sweep") == best
    assert find_run(tmp_path, str(tmp_path / "sweep")) == find_run(tmp_path / "sweep", "") == best
    assert f"The best of 4 runs in {tmp_path}/sweep: b, 1.9000 bits per byte" in capsys.readouterr().err
    assert find_run(tmp_path, "sweep/a") == tmp_path / "sweep/a"


def test_a_run_that_was_saved_after_a_sweep_is_found(make_run, tmp_path):
    (tmp_path / "sweep" / "logs").mkdir(parents=True)
    make_run("sweep/a", 1.0)
    later = make_run("later", 2.0)
    assert find_run(tmp_path, "") == later


def test_without_results_the_last_run_of_a_sweep_is_found(make_run, tmp_path):
    (tmp_path / "sweep" / "logs").mkdir(parents=True)
    make_run("sweep/a")
    last = make_run("sweep/b")
    assert find_run(tmp_path, "sweep") == last


def test_runs_in_a_plain_folder_are_no_sweep(make_run, tmp_path):
    make_run("mine/a", 1.0)
    last = make_run("mine/b", 2.0)
    assert find_run(tmp_path, "") == last
    with pytest.raises(ValueError, match="run=mine does not exist"):
        find_run(tmp_path, "mine")


# What may lie in a run's folder


RUN_ENTRIES = [(name, kind) for name in FILES for kind in KINDS] + [
    (name, kind) for name in FOLDERS for kind in [*KINDS, "file"] if kind != "folder"]


@pytest.mark.parametrize("name, kind", RUN_ENTRIES)
def test_links_and_pipes_in_a_run_are_refused(tmp_path, monkeypatch, name, kind):
    """At once, by one sentence, and without a change; a folder's place can also be taken by a link to a folder."""
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    if kind == "file":
        (tmp_path / "tiny" / name).touch()
    elif kind == "link" and name in FOLDERS:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs/.partial-kept").touch()
        (tmp_path / "tiny" / name).symlink_to(tmp_path / "theirs")
    else:
        special(tmp_path.joinpath("tiny", name).relative_to(tmp_path / "tiny"), kind)
    before = sorted(os.listdir(tmp_path / "tiny"))
    with pytest.raises(ValueError, match=f"{name} is .*move it away") as refusal:
        Run(tmp_path / "tiny")
    assert "\n" not in str(refusal.value) and sorted(os.listdir(tmp_path / "tiny")) == before
    assert name not in FOLDERS or kind != "link" or list(tree(tmp_path / "theirs")) == [".partial-kept"]


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "config.yaml"])
def test_reading_a_run_follows_no_links(compose_tiny, tmp_path, name):
    """Neither sampling, nor a report, nor a sweep that asks whether the run is finished."""
    story.train(compose_tiny("training.max_steps=1"))
    run = tmp_path / "runs/tiny"
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    for read in (lambda: find_run(tmp_path / "runs", "tiny"), lambda: open_history(run, "tiny"), lambda: check_file_types(run)):
        with pytest.raises(ValueError, match=f"{name} is a link"):
            read()


def test_a_run_or_runs_dir_may_be_a_link_itself(compose_tiny, tmp_path):
    """As to a larger disk."""
    (tmp_path / "disk/tiny").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert story.train(compose_tiny("training.max_steps=1")) == 0
    (tmp_path / "disk/other").mkdir()
    (tmp_path / "disk/linked").symlink_to(tmp_path / "disk/other")
    assert story.train(compose_tiny("training.max_steps=1", "name=linked")) == 0
    assert len(store.list_checkpoints(tmp_path / "disk/other/checkpoints")) == 1


def at_step(monkeypatch, step, change):
    """Do `change` at the beginning of a step."""
    def lr_scale(now, *arguments):
        if now == step:
            change()
        return plain(now, *arguments)

    plain = story.lr_scale
    monkeypatch.setattr(story, "lr_scale", lr_scale)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize("change", ["moved", "removed", "its runs_dir moved", "replaced by another run"])
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
    at_step(monkeypatch, 7, do)
    with pytest.raises(ValueError, match=r"tiny was moved, removed or replaced during training. The run stops"):
        story.train(compose_tiny("training.max_steps=20", "training.checkpoint_every=5"))
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
        assert story.train(compose_tiny("training.max_steps=20", "name=again")) == 0


def test_without_locks_a_run_trains_and_is_held(compose_tiny, tmp_path, monkeypatch):
    """Also when it is moved aside; nothing is left of what stands for its lock."""
    without_locks(monkeypatch, errno.EOPNOTSUPP)
    assert story.train(compose_tiny("training.max_steps=1")) == 0
    with Run(tmp_path / "runs/tiny"), pytest.raises(ValueError, match=rf"is being trained by process {os.getpid()} on"):
        story.train(compose_tiny("training.max_steps=1"))
    assert story.train(compose_tiny("training.max_steps=1", "restart=true")) == 0
    assert sorted(path.name for path in (tmp_path / "runs").rglob("lock*")) == ["lock", "lock"]
