"""Patience ends a run at the same step however it is interrupted; evaluations can be left out."""

from __future__ import annotations

import json
import math

import pytest
from test_runs import last_step, same

import train as program
import trainer
from checkpointing import store
from checkpointing.resume import is_finished
from conf.schema import ConfigError

EVERY_2 = ["training.eval_every=2", "training.checkpoint_every=5", "training.max_steps=20"]
PATIENT = [*EVERY_2, "training.patience=3"]
LOSSES = dict(zip(range(2, 21, 2), [3.0, 2.0, 2.5, 2.0, math.nan, 2.1, 1.5, 1.6, 1.7, 1.8], strict=True))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/tiny"


@pytest.fixture
def losses(monkeypatch):
    """Give the evaluations of a training these losses, by the step at which they are made."""
    def given(by_step):
        def note_step(now, *arguments):
            steps.append(now + 1)
            return lr_scale(now, *arguments)

        steps, lr_scale = [], trainer.lr_scale
        monkeypatch.setattr(trainer, "lr_scale", note_step)
        monkeypatch.setattr(trainer, "evaluate", lambda *arguments: by_step[steps[-1]])
    return given


def test_a_run_stops_without_a_lower_loss(compose_tiny, run, losses, capsys):
    losses(LOSSES)
    assert program.train(compose_tiny(*PATIENT)) == 0
    assert "Stopped early: the validation loss was lowest, 2.0000, 3 evaluations ago" in capsys.readouterr().out
    saved = store.list_checkpoints(run / "checkpoints")
    assert saved[-1].step == 10 and min(saved, key=store.by_val_loss).step == 4
    assert '"stopped_early": true' in (run / "metrics.jsonl").read_text().splitlines()[-1]
    # It is finished until patience is raised.
    assert is_finished(compose_tiny(*PATIENT), run)
    program.train(compose_tiny(*PATIENT))
    assert "It stopped early. To train further, raise training.patience, as in training.patience=6" in capsys.readouterr().out
    assert last_step(run) == 10
    program.train(compose_tiny(*EVERY_2, "training.patience=5"))
    assert last_step(run) == 20  # 14 is a new lowest loss, and 20 the end


@pytest.mark.slow
def test_an_interrupted_run_stops_early_at_the_same_step(compose_tiny, run, losses, interrupt_at, monkeypatch):
    losses(LOSSES)
    program.train(compose_tiny(*PATIENT, "name=straight"))
    for stop in (3, 4, 9):  # before an evaluation, after one, and after stale ones
        name = f"name=stopped_at_{stop}"
        interrupt_at(stop)
        assert program.train(compose_tiny(*PATIENT, name)) == 130
        assert program.train(compose_tiny(*PATIENT, name)) == 0
        assert last_step(run.with_name(f"stopped_at_{stop}")) == 10
        assert same(run.with_name("straight"), run.with_name(f"stopped_at_{stop}"))
    lr_scale = trainer.lr_scale

    def killed_at_9(now, *arguments):
        if now == 9:
            raise RuntimeError("killed")
        return lr_scale(now, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(trainer, "lr_scale", killed_at_9)
        program.train(compose_tiny(*PATIENT))
    # No checkpoint knows the two evaluations after step 5.
    assert last_step(run) == 5
    assert program.train(compose_tiny(*PATIENT)) == 0
    assert same(run.with_name("straight"), run)


def test_the_evaluation_at_the_end_does_not_use_up_patience(compose_tiny, run, losses):
    """Otherwise an extended run would stop earlier than one that was planned as long."""
    losses(LOSSES | {5: 9.0})
    program.train(compose_tiny(*PATIENT, "training.max_steps=5"))
    program.train(compose_tiny(*PATIENT))
    assert last_step(run) == 10


def test_eval_every_0_evaluates_and_saves_the_last_step(compose_tiny, run):
    program.train(compose_tiny("training.eval_every=0", "training.checkpoint_every=0", "training.max_steps=3"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [3]
    assert [one.step for one in store.list_checkpoints(run / "checkpoints")] == [3]


def test_without_checkpoints_an_interrupted_run_is_saved(compose_tiny, run, interrupt_at):
    interrupt_at(2)
    assert program.train(compose_tiny("training.checkpoint_every=0", "training.max_steps=3")) == 130
    assert last_step(run) == 2


@pytest.mark.parametrize(("words", "problem"), [
    (["training.patience=-1"], "patience=-1 must be at least 0"), (["training.eval_every=-1"], "eval_every=-1 must be at least 0"),
    (["training.patience=2", "training.eval_every=0"], "eval_every=0"), (["training.eval_tokens=0"], "at least 1")])
def test_evaluations_that_make_no_sense_are_refused(compose_tiny, words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose_tiny(*words)
