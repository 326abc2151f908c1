"""A loss or gradient that is NaN or infinite stops the run, or is skipped or rolled back, deterministically."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_runs import last, last_step, same

import atomic
import train as program
import trainer
from checkpointing.spec import MODEL
from data.loader import Loader
from data.prepare import prepare
from data.shards import open_parts
from model import GPT
from scripts.verify_resume import read_metrics
from training import nonfinite


@pytest.fixture
def plant(monkeypatch):
    """Make the loss of certain batches NaN, or only its gradient: they are known by their tokens."""
    def planted(settings, batches, how="loss"):
        loader = Loader(open_parts(prepare(settings.data), "train"), settings.model.block_size,
                                settings.training.batch_size, settings.training.micro_steps(settings.model.block_size), settings.seed)
        bad = [loader.batch(batch)[0] for batch in batches]

        def forward(model, idx, targets=None, cache=None, document_ids=None):
            loss = original(model, idx, targets, cache, document_ids)
            if model.training and targets is not None and any(torch.equal(idx, one) for one in bad):
                return loss * math.nan if how == "loss" else loss + (loss * 0.0).sqrt()  # whose gradient is 0 * inf
            return loss

        monkeypatch.setattr(GPT, "forward", forward)

    original = GPT.forward
    return planted


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/tiny"


def reports(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run / "nonfinite").iterdir())]


WORDS = ["training.max_steps=10", "training.checkpoint_every=2", "training.eval_every=100"]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_nan_stops_the_run_and_leaves_a_report(compose_tiny, run, plant, how):
    plant(compose_tiny(), [5], how)
    with pytest.raises(ValueError, match=r"Step 6 had a loss of .*nonfinite/01-step_00000005.json.* Saved so far: 4 steps. Try optim"):
        program.train(compose_tiny(*WORDS))
    (found,) = reports(run)
    losses = [row["loss"] for row in read_metrics(run)]
    assert found["step"] == 5 and found["action"] == "stop" and found["last_losses"] == losses and len(losses) == 5
    assert found["loss"] == "nan" if how == "loss" else math.isfinite(found["loss"])
    assert found["batch"]["index"] == 5 and len(found["batch"]["sequences_start_at"]) == 4
    assert found["gradient_norms"].keys() == {"wte", "wpe", "h.0", "h.1", "ln_f"} and set(found["gradient_norms"].values()) == {"nan"}
    assert last_step(run) == 4


def test_a_skipped_batch_counts_as_a_step(compose_tiny, run, plant):
    plant(compose_tiny(), [3, 5])
    assert program.train(compose_tiny(*WORDS, "training.on_nonfinite=skip")) == 0
    rows = [row for row in read_metrics(run) if "lr_scale" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if row.get("skipped")] == [4, 6] and all("loss" in row for row in rows if not row.get("skipped"))
    assert [one["step"] for one in reports(run)] == [3, 5]
    assert last(run).state["nonfinite"] == 2 and last(run).state["batches_skipped"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last(run).folder / MODEL).values())


def test_a_skipped_batch_leaves_the_weights_unchanged(compose_tiny, run, plant):
    plant(compose_tiny(), [0])
    program.train(compose_tiny("training.max_steps=1", "training.on_nonfinite=skip"))
    torch.manual_seed(compose_tiny().seed)
    weights = load_file(last(run).folder / MODEL)
    fresh = GPT(replace(compose_tiny().model, vocab_size=weights["wte.weight"].size(0))).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in weights.items())


def test_a_rollback_skips_the_batches_since_the_checkpoint(compose_tiny, run, plant, monkeypatch):
    """Steps 0-3 are kept (the checkpoint of 4), batches 4 and 5 are skipped: step 4 reads batch 6."""
    plant(compose_tiny(), [5])
    read, batch = [], Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda loader, step, *place: read.append(step) or batch(loader, step, *place))
    assert program.train(compose_tiny(*WORDS, "training.on_nonfinite=rollback")) == 0
    assert read[1:] == [*range(6), *range(6, 12)]  # the first one is for the time
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 11))
    assert (last_step(run), last(run).state["batches_skipped"], last(run).state["nonfinite"]) == (10, 2, 1)


def test_a_rollback_deletes_the_checkpoints_after_it(compose_tiny, run, plant, interrupt_at):
    """Interrupted at step 5, before the NaN and again after it: the second checkpoint of step 5 differs."""
    plant(compose_tiny(), [6])
    words = ["training.max_steps=8", "training.checkpoint_every=4", "training.on_nonfinite=rollback"]
    skipped = []
    for time in (1, 2):
        interrupt_at(5, time=time)
        assert program.train(compose_tiny(*words)) == 130
        skipped.append((last_step(run), last(run).state["batches_skipped"]))
    assert skipped == [(5, 0), (5, 3)]


def test_a_rollback_can_return_to_the_start(compose_tiny, run, plant):
    plant(compose_tiny(), [2])
    assert program.train(compose_tiny("training.max_steps=4", "training.on_nonfinite=rollback")) == 0
    assert last(run).state["batches_skipped"] == 3


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("precision, stops", [
    ("fp32", [5]), *(pytest.param(precision, [3, 6, 7], marks=pytest.mark.slow) for precision in ("fp32", "fp16"))])
def test_answers_do_not_depend_on_interruptions(compose_tiny, run, plant, interrupt_at, action, precision, stops):
    words = [*WORDS, f"training.on_nonfinite={action}", f"training.precision={precision}", "model.dropout=0.1", "optim=muon"]
    plant(compose_tiny(), [5, 8])
    program.train(compose_tiny(*words, "name=straight"))
    for stop in stops:
        interrupted = run.with_name(f"interrupted{stop}")
        interrupt_at(stop)
        while program.train(compose_tiny(*words, f"name={interrupted.name}")) == 130:
            interrupt_at(99)
        assert same(run.with_name("straight"), interrupted)
        assert reports(run.with_name("straight")) == reports(interrupted)


def test_a_report_that_cannot_be_written_does_not_end_the_run(compose_tiny, plant, monkeypatch, capsys):
    plant(compose_tiny(), [2])
    write = atomic.write_bytes

    def full(path, content):
        if "nonfinite" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(nonfinite.atomic, "write_bytes", full)
    assert program.train(compose_tiny("training.max_steps=4", "training.on_nonfinite=skip")) == 0
    assert "could not be written (No space left on device)" in capsys.readouterr().out


@pytest.mark.parametrize(("action", "limit"), [("skip", 0), ("skip", 2), ("rollback", 2)])
def test_answers_are_limited_in_number(compose_tiny, run, plant, action, limit):
    plant(compose_tiny(), [2, 3, 4, 6, 7, 9])
    with pytest.raises(ValueError, match=rf"It is number {limit + 1} in this run, and training.nonfinite_limit={limit}"):
        program.train(compose_tiny(*WORDS, f"training.on_nonfinite={action}", f"training.nonfinite_limit={limit}"))
    assert [one["action"] for one in reports(run)] == [action] * limit + ["stop"]


def test_a_sample_of_a_diverged_model_does_not_end_the_run(compose_tiny, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "evaluate", lambda loss_fn, *words: (loss_fn.model.wte.weight.data.fill_(math.nan), 1.0)[1])
    with pytest.raises(ValueError, match="had a loss of nan"):
        program.train(compose_tiny("training.max_steps=4", "training.eval_every=1", "training.sample_tokens=8"))
    assert "output is NaN or infinite" in capsys.readouterr().out
