"""Whole runs, tiny: what they leave behind, that they go on exactly, and what stops them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train as story
from conf.schema import compose, options
from model import GPT
from sample import open_checkpoint
from training import checkpoint
from training.device import Device

ROOT = Path(__file__).parent.parent


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.find(run / "checkpoints")[-1].model_tensors()


def metrics_of(run: Path) -> list[dict]:
    """The metrics without the fields that tell the time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("step_ms", "seconds")} for row in rows]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def interrupt_at(monkeypatch):
    """Send this process a signal in the middle of step `step`."""
    def plan(step, number=signal.SIGINT):
        def at_step(now, *arguments):
            if now == step:
                os.kill(os.getpid(), number)
            return lr_scale(now, *arguments)

        lr_scale = story.lr_scale
        monkeypatch.setattr(story, "lr_scale", at_step)
    yield plan


def test_a_run_learns_and_leaves_all_it_should(compose_tiny, tmp_path, capsys):
    settings = compose_tiny("training.max_steps=40", "training.checkpoint_every=10", "training.keep_last=2")
    assert story.train(settings) == 0
    run = tmp_path / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "log.txt", "checkpoints"}
    rows = metrics_of(run)
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    assert [row["step"] for row in evaluations] == [10, 20, 30, 40]
    assert losses[-1] < losses[0] - 0.5
    last = evaluations[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2))  # ASCII characters: one byte a token
    said = capsys.readouterr().out
    for words in ("parameters (embedding", "FLOPs a token", "tokens (1 x 4 sequences of 32)", "Time: about", "bits per byte",
                  "--- 3 of 3", "cpu, "):
        assert words in said
    found = checkpoint.find(run / "checkpoints")
    assert [one.step for one in found][-2:] == [30, 40] and len(found) <= 3
    assert {path.name for path in found[-1].folder.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"}


def test_reported_validation_loss_is_the_loss_of_the_saved_model(compose_tiny, tmp_path):
    settings = compose_tiny("training.max_steps=10")
    story.train(settings)
    saved = checkpoint.find(tmp_path / "runs/tiny/checkpoints")[-1]
    model, _ = open_checkpoint(saved, Device("cpu", "fp32"))
    prepared = story.prepare(settings.data)
    validation = story.Validation(story.Tokens.open(prepared, "val"), 32, 4, 512)
    assert story.evaluate(model, validation, Device("cpu", "fp32")) == pytest.approx(saved.state["val_loss"], abs=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("extra", [[], ["training.tokens_per_step=256", "model.dropout=0.2"], ["training.precision=bf16"],
                                   ["training.precision=fp16"]], ids=["plain", "accumulation+dropout", "bf16", "fp16"])
def test_an_interrupted_run_goes_on_exactly(compose_tiny, tmp_path, interrupt_at, optim, extra):
    straight = compose_tiny(f"optim={optim}", *extra, "training.max_steps=14", "name=straight")
    assert story.train(straight) == 0
    stopped = compose_tiny(f"optim={optim}", *extra, "training.max_steps=14", "name=stopped")
    interrupt_at(6)
    assert story.train(stopped) == 130
    runs = tmp_path / "runs"
    assert checkpoint.find(runs / "stopped/checkpoints")[-1].step == 7  # the step that ran is finished and saved
    assert story.train(stopped) == 0
    assert same(weights_of(runs / "straight"), weights_of(runs / "stopped"))
    assert metrics_of(runs / "straight") == metrics_of(runs / "stopped")


def test_sigterm_saves_too_and_exits_with_143(compose_tiny, tmp_path, interrupt_at):
    interrupt_at(3, signal.SIGTERM)
    assert story.train(compose_tiny()) == 143
    assert checkpoint.find(tmp_path / "runs/tiny/checkpoints")[-1].step == 4


def test_looking_more_often_does_not_change_what_is_learned(compose_tiny, tmp_path):
    story.train(compose_tiny("name=seldom", "model.dropout=0.1", "training.max_steps=6", "training.eval_every=100"))
    story.train(compose_tiny("name=often", "model.dropout=0.1", "training.max_steps=6", "training.eval_every=1",
                             "training.checkpoint_every=2"))
    assert same(weights_of(tmp_path / "runs/seldom"), weights_of(tmp_path / "runs/often"))


def test_accumulated_micro_steps_equal_one_large_batch(compose_tiny, tmp_path):
    """The first step's loss and gradient agree to rounding; later ones drift, as AdamW turns rounding of zeros into steps."""
    story.train(compose_tiny("name=one", "training.batch_size=8", "training.max_steps=5"))
    story.train(compose_tiny("name=four", "training.batch_size=2", "training.tokens_per_step=256", "training.max_steps=5"))
    one, four = metrics_of(tmp_path / "runs/one"), metrics_of(tmp_path / "runs/four")
    assert one[0]["loss"] == pytest.approx(four[0]["loss"], rel=1e-6)
    assert one[0]["gradient_norm"] == pytest.approx(four[0]["gradient_norm"], rel=1e-5)
    assert [row["tokens"] for row in one[:5]] == [row["tokens"] for row in four[:5]] == [256, 512, 768, 1024, 1280]
    assert one[4]["loss"] == pytest.approx(four[4]["loss"], abs=2e-3)


def test_bf16_stays_close_to_fp32(compose_tiny, tmp_path):
    for precision in ("fp32", "bf16", "fp16"):
        story.train(compose_tiny(f"name={precision}", f"training.precision={precision}", "training.max_steps=20"))
    losses = {precision: metrics_of(tmp_path / "runs" / precision)[-1]["val_loss"] for precision in ("fp32", "bf16", "fp16")}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=0.02)


def test_a_finished_run_samples_and_changes_nothing(compose_tiny, tmp_path, capsys):
    story.train(compose_tiny("training.max_steps=3"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert story.train(compose_tiny("training.max_steps=3")) == 0
    said = capsys.readouterr().out
    assert "is finished: 3 steps" in said and "raise training.max_steps" in said and "--- 3 of 3" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_finished_run_can_be_extended(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=3"))
    assert story.train(compose_tiny("training.max_steps=5")) == 0
    assert checkpoint.find(tmp_path / "runs/tiny/checkpoints")[-1].step == 5


def test_max_seconds_ends_a_run(compose_tiny, tmp_path, capsys):
    assert story.train(compose_tiny("training.max_steps=1e6", "training.max_seconds=0.5", "training.eval_every=1e6")) == 0
    last = checkpoint.find(tmp_path / "runs/tiny/checkpoints")[-1]
    assert 0.5 <= last.state["seconds"] < 5 and last.state["val_loss"] is not None
    assert story.train(compose_tiny("training.max_steps=1e6", "training.max_seconds=0.5")) == 0
    assert "raise training.max_seconds" in capsys.readouterr().out


def test_another_run_under_the_same_name_is_refused(compose_tiny, tmp_path):
    story.train(compose_tiny("training.max_steps=2"))
    with pytest.raises(ValueError, match=r"model.n_layer was 2 and is now 3.*another name="):
        story.train(compose_tiny("model.n_layer=3"))
    with pytest.raises(ValueError, match=r"data.val_fraction was 0.1 and is now 0.2"):
        story.train(compose_tiny("data.val_fraction=0.2"))


def test_a_changed_text_is_another_run(compose_tiny, tmp_path, book):
    text = tmp_path / "mine.txt"
    text.write_text(book.read_text())
    story.train(compose_tiny(f"data.path={text}", "training.max_steps=2"))
    text.write_text(book.read_text() + "\nOne more sentence.")
    with pytest.raises(ValueError, match=r"data.prepared was"):
        story.train(compose_tiny(f"data.path={text}"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_batch(compose_tiny, tmp_path, monkeypatch):
    calls = []

    def forward(model, idx, targets=None, cache=None):
        loss = plain(model, idx, targets, cache)
        calls.append(1)
        return loss * math.nan if model.training and len(calls) > 12 else loss

    plain = GPT.forward
    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(ValueError, match=r"The loss is nan at step \d+ .*sequences start at the training tokens \d+"):
        story.train(compose_tiny("training.eval_every=100", "training.checkpoint_every=4"))
    last = checkpoint.find(tmp_path / "runs/tiny/checkpoints")[-1]
    assert last.step == 8 and all(tensor.isfinite().all() for tensor in last.model_tensors().values())


def test_texts_too_short_are_refused_with_both_numbers_before_a_run_exists(compose_tiny, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x" * 200)
    with pytest.raises(ValueError, match=r"validation split has 20 tokens, one context needs 33"):
        story.train(compose_tiny(f"data.path={text}"))
    text.write_text("x" * 20)
    with pytest.raises(ValueError, match=r"training split has 18 tokens, one context needs 33"):
        story.train(compose_tiny(f"data.path={text}"))
    assert not (tmp_path / "runs").exists()


def test_a_disk_too_small_for_two_checkpoints_is_said_before_step_0(compose_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"0 MB free, two checkpoints need \d"):
        story.train(compose_tiny("model.n_embd=128"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_takes_its_first_step_scaled_down(experiment, book, tmp_path):
    small = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "training.batch_size=2",
             "training.tokens_per_step=64", "training.max_steps=1", "training.eval_tokens=64", f"data.path={book}", "data.tokenizer=byte",
             f"runs_dir={tmp_path}", "name=first"]
    data = [] if "shakespeare" in experiment else ["data=text"]
    assert story.train(compose("config", [f"experiment={experiment}", *data, *small])) == 0
    assert checkpoint.find(tmp_path / "first/checkpoints")[-1].step == 1


def run_program(*words: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_the_program_survives_kill_9_and_ends_cleanly_on_sigint(book, tmp_path):
    words = ["train.py", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke", "name=tiny",
             "training.max_steps=1e5", "training.sample_tokens=0", "training.eval_every=1e5", f"runs_dir={tmp_path}"]
    checkpoints = tmp_path / "tiny" / "checkpoints"

    def wait_for(condition):
        until = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < until and program.poll() is None, program.stderr.read()
            time.sleep(0.05)

    program = run_program(*words)
    wait_for(lambda: len(list(checkpoints.glob("step_*"))) >= 2)
    program.kill()
    program.communicate()
    reached = checkpoint.find(checkpoints)[-1].step
    assert reached >= 20

    program = run_program(*words)
    wait_for(lambda: checkpoint.find(checkpoints)[-1].step > reached)
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=60)
    assert program.returncode == 130
    assert f"from step {reached}" in said and "Interrupted" in said


@pytest.mark.slow
def test_a_sweep_runs_each_job_and_lists_the_one_that_fails(book, tmp_path):
    """The second job's context is longer than the validation split, which only shows once the text is read."""
    program = run_program("train.py", "-m", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke",
                          "training.max_steps=2", "training.sample_tokens=0", f"runs_dir={tmp_path}", "name=sweep",
                          "model.block_size=16,1e6", "optim.lr=1e-3")
    said, complaints = program.communicate(timeout=300)
    assert program.returncode == 1
    assert "1 of 2 jobs finished" in said and "exit code 1: model.block_size=1" in said and "Traceback" not in complaints
    assert checkpoint.find(tmp_path / "sweep/model.block_size=16/checkpoints")[-1].step == 2
    assert not (ROOT / "outputs").exists() and not (ROOT / "multirun").exists()
