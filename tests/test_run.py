"""A run's folder: which one a name means."""

from __future__ import annotations

import json
import os

import pytest

from training.run import LOCK, find_run


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
    with pytest.raises(ValueError, match="run=mine is not there"):
        find_run(tmp_path, "mine")
