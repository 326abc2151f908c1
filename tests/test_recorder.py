"""What a run tells: metrics on disk, W&B as a copy that may fail."""

from __future__ import annotations

import json
import sys
import types

import pytest

from training.recorder import LoggerConfig, Recorder, cut_back


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_words_go_to_the_runs_folder(tmp_path, capsys):
    with Recorder(tmp_path, 0, 3, LoggerConfig(), {"name": "x"}) as recorder:
        recorder.say("hello")
        recorder.record(1, loss=2.5)
        recorder.progress(1, loss="2.5")
        assert rows(tmp_path) == [{"step": 1, "loss": 2.5}]  # at once, not when the run ends
    assert "hello" in capsys.readouterr().out and (tmp_path / "log.txt").read_text() == "hello\n"


def test_going_on_cuts_off_what_was_recorded_after_the_checkpoint(tmp_path):
    with Recorder(tmp_path, 0, 9, LoggerConfig(), {}) as recorder:
        for step in range(1, 6):
            recorder.record(step, loss=step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line that a kill cut short
    with Recorder(tmp_path, 3, 9, LoggerConfig(), {}) as recorder:
        recorder.record(4, loss=40)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_cutting_back_what_is_not_there_is_nothing(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


class FakeWandb(types.ModuleType):
    """The part of wandb that the recorder uses; `broken` names the call that raises."""

    def __init__(self, broken=""):
        super().__init__("wandb")
        self.broken, self.inits, self.logged = broken, [], []
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        self.inits.append(arguments)
        self._break("init")
        return self

    def log(self, values, step):
        self._break("log")
        self.logged.append((step, values))

    def finish(self):
        self._break("finish")

    def _break(self, call):
        if call == self.broken:
            raise ConnectionError("the server\nis down")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_wandb_failure_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys, broken):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken))
    with Recorder(tmp_path, 0, 3, LoggerConfig(wandb="online"), {"name": "x"}) as recorder:
        recorder.record(1, loss=1.0)
        recorder.record(2, loss=1.0)
    said = capsys.readouterr().out
    assert said.count("Warning") == 1 and "the server" in said and "Traceback" not in said
    assert len(rows(tmp_path)) == 2


def test_a_missing_wandb_is_one_sentence_that_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Recorder(tmp_path, 0, 3, LoggerConfig(wandb="offline"), {"name": "x"}) as recorder:
        recorder.record(1, loss=1.0)
    assert "pip install wandb" in capsys.readouterr().out and len(rows(tmp_path)) == 1


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 1):
        with Recorder(tmp_path, step, 3, LoggerConfig(wandb="offline"), {"name": "x"}) as recorder:
            recorder.record(step + 1, loss=1.0)
    first, second = (arguments["id"] for arguments in fake.inits)
    assert first == second
    assert [step for step, _ in fake.logged] == [1, 2]


@pytest.mark.slow
def test_offline_wandb_works_without_an_account(tmp_path):
    pytest.importorskip("wandb")
    with Recorder(tmp_path, 0, 3, LoggerConfig(wandb="offline"), {"name": "x"}) as recorder:
        assert recorder.wandb is not None
        recorder.record(1, loss=1.0)
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
