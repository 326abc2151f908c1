"""Whole runs, tiny: what they learn, what they say, what they leave behind."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train as program
import trainer
from checkpointing import memory_plan, store
from conf.presets import options
from conf.schema import compose
from data.loader import Loader, Validation
from data.prepare import prepare
from data.shards import open_parts
from generation.engine import open_checkpoint
from model import GPT
from scripts.verify_resume import read_metrics
from training.device import Device
from training.distributed import World
from training.step import BatchLoss, evaluate

ROOT = Path(__file__).parent.parent


def test_a_run_learns_and_writes_its_files(compose_tiny, tmp_path, capsys):
    settings = compose_tiny("training.max_steps=40", "training.checkpoint_every=10", "training.keep_last=2", "training.sample_tokens=20")
    assert program.train(settings) == 0
    run = tmp_path / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "log.txt", "environment.jsonl", "checkpoints", "lock"}
    rows = read_metrics(run)
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
    found = store.list_checkpoints(run / "checkpoints")
    assert [one.step for one in found][-2:] == [30, 40] and len(found) <= 3
    assert {path.name for path in found[-1].folder.iterdir()} == {
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"}


def test_reported_validation_loss_is_that_of_the_saved_model(compose_tiny, tmp_path):
    settings = compose_tiny("training.max_steps=10")
    program.train(settings)
    saved = store.list_checkpoints(tmp_path / "runs/tiny/checkpoints")[-1]
    model = open_checkpoint(tmp_path / "runs/tiny", "last", Device("cpu", "fp32")).model
    prepared = prepare(settings.data)
    validation = Validation(open_parts(prepared, "val"), 32, 4, 512)
    assert evaluate(BatchLoss(model, Device("cpu", "fp32")), validation, World({})) == pytest.approx(saved.state["val_loss"], abs=1e-6)


def test_a_crash_while_sampling_loses_no_checkpoint(compose_tiny, tmp_path, monkeypatch):
    """As of a process that a library kills: what is on the disk by then is all that remains."""
    def crash(*arguments):
        found.extend(one.step for one in store.list_checkpoints(tmp_path / "runs/tiny/checkpoints"))
        raise SystemError

    found = []
    monkeypatch.setattr(trainer, "short_sample", crash)
    with pytest.raises(SystemError):
        program.train(compose_tiny("training.max_steps=20", "training.checkpoint_every=10", "training.sample_tokens=5"))
    assert found == [10]


def test_a_mixture_is_trained_on_and_resumes(compose_tiny, book, tmp_path, capsys):
    (tmp_path / "digits.txt").write_text("0123456789 " * 300)
    mix = f"data.mix={book}:2 {tmp_path / 'digits.txt'}:1"
    program.train(compose_tiny(mix, "name=straight", "training.max_steps=8"))
    assert "steps an epoch" in capsys.readouterr().out
    for steps in (4, 8):
        program.train(compose_tiny(mix, "name=twice", f"training.max_steps={steps}", "optim.schedule=constant"))
    program.train(compose_tiny(mix, "name=once", "training.max_steps=8", "optim.schedule=constant"))
    once, twice = (load_file(tmp_path / "runs" / name / "checkpoints/step_00000008/model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(weights, twice[name]) for name, weights in once.items())


def test_evaluating_more_often_does_not_change_the_weights(compose_tiny, tmp_path):
    program.train(compose_tiny("name=seldom", "model.dropout=0.1", "training.max_steps=6", "training.eval_every=100"))
    program.train(compose_tiny("name=often", "model.dropout=0.1", "training.max_steps=6", "training.eval_every=1",
                             "training.checkpoint_every=2"))
    seldom, often = (load_file(tmp_path / "runs" / name / "checkpoints/step_00000006/model.safetensors") for name in ("seldom", "often"))
    assert all(torch.equal(weights, often[name]) for name, weights in seldom.items())


def test_accumulated_micro_steps_equal_one_large_batch(compose_tiny, tmp_path):
    """The first step's loss and gradient agree to rounding; later ones drift, as AdamW turns rounding of zeros into steps."""
    program.train(compose_tiny("name=one", "training.batch_size=8", "training.max_steps=5"))
    program.train(compose_tiny("name=four", "training.batch_size=2", "training.tokens_per_step=256", "training.max_steps=5"))
    one, four = read_metrics(tmp_path / "runs/one"), read_metrics(tmp_path / "runs/four")
    assert one[0]["loss"] == pytest.approx(four[0]["loss"], rel=1e-6)
    assert one[0]["gradient_norm"] == pytest.approx(four[0]["gradient_norm"], rel=1e-5)
    assert [row["tokens"] for row in one[:5]] == [row["tokens"] for row in four[:5]] == [256, 512, 768, 1024, 1280]
    assert one[4]["loss"] == pytest.approx(four[4]["loss"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "modern-nano"])
def test_bf16_stays_close_to_fp32(model, compose_tiny, tmp_path):
    """The distance that docs/benchmarks.md states."""
    for precision in ("fp32", "bf16", "fp16"):
        program.train(compose_tiny(f"name={precision}", f"model={model}", f"training.precision={precision}", "training.max_steps=20"))
    losses = {precision: read_metrics(tmp_path / "runs" / precision)[-1]["val_loss"] for precision in ("fp32", "bf16", "fp16")}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [name for name in options("experiment")
                                        if not name.startswith("finetune_")])  # see test_pretrained_files.py
def test_every_experiment_takes_its_first_step(experiment, book, tmp_path):
    small = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "training.batch_size=2",
             "training.tokens_per_step=64", "training.max_steps=1", "training.eval_tokens=64", f"data.path={book}", "data.tokenizer=byte",
             f"runs_dir={tmp_path}", "name=first"]
    data = [] if "shakespeare" in experiment else ["data=text"]
    assert program.train(compose("config", [f"experiment={experiment}", *data, *small])) == 0
    assert store.list_checkpoints(tmp_path / "first/checkpoints")[-1].step == 1


@pytest.fixture
def compose_letters(compose_tiny, tmp_path):
    """Settings of a tiny run on many short documents."""
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03}.txt").write_text(f"Dear {number}, " + "abcdefghij"[number % 10] * (number % 23) + ".")
    return lambda *overrides: compose_tiny(f"data.path={folder}", "data.tokenizer=byte", *overrides)


def test_documents_are_trained_and_evaluated_separately(compose_letters, tmp_path):
    settings = compose_letters("data.respect_documents=true", "training.max_steps=10")
    assert program.train(settings) == 0
    prepared = prepare(settings.data)
    assert prepared == prepare(compose_letters().data)  # the same tokens

    def losses(model, inputs, targets) -> float:
        """Document by document, each a sequence of its own; rows begin within one."""
        total = 0.0
        for row, aims in zip(inputs, targets, strict=True):
            cuts = [0, *(at for at in range(1, len(row)) if row[at] == 256), len(row)]
            for start, end in pairwise(cuts):
                total += model(row[None, start:end], aims[None, start:end]).item() * (end - start)
        return total / inputs.numel()

    torch.manual_seed(settings.seed)
    model, device = GPT(replace(settings.model, vocab_size=257)), Device("cpu", "fp32")
    batch = Loader(open_parts(prepared, "train"), 32, 4, 1, settings.seed).batch(0)
    rows = read_metrics(tmp_path / "runs/tiny")
    assert rows[0]["loss"] == pytest.approx(losses(model, *batch), abs=1e-6)
    assert abs(rows[0]["loss"] - BatchLoss(model, device)(batch).item()) > 1e-4

    model = open_checkpoint(tmp_path / "runs/tiny", "last", device).model
    validation = Validation(open_parts(prepared, "val"), 32, 4, 512)
    by_hand = sum(losses(model, *batch) * weight for *batch, weight in validation)
    val_loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert val_loss == pytest.approx(by_hand, abs=1e-5)
    assert abs(val_loss - evaluate(BatchLoss(model, device), validation, World({}))) > 1e-4


def test_respecting_documents_resumes_and_is_part_of_identity(compose_letters, tmp_path):
    respectful = "data.respect_documents=true", "model.dropout=0.1", "optim.schedule=constant"
    program.train(compose_letters("name=whole", *respectful, "training.max_steps=6"))
    program.train(compose_letters("name=halves", *respectful, "training.max_steps=3"))
    program.train(compose_letters("name=halves", *respectful, "training.max_steps=6"))
    whole, halves = (load_file(tmp_path / "runs" / name / "checkpoints/step_00000006/model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(weights, halves[name]) for name, weights in whole.items())
    with pytest.raises(ValueError, match=r"data\.respect_documents was true, now false"):
        program.train(compose_letters("name=whole", *respectful[1:], "training.max_steps=6"))


def test_respect_documents_is_refused_for_a_single_document(compose_tiny, tmp_path):
    with pytest.raises(ValueError, match=r"data\.respect_documents=true needs several documents"):
        program.train(compose_tiny("data.respect_documents=true"))
    assert not (tmp_path / "runs").exists()


def run_program(*words: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_batch_that_does_not_fit_in_memory_is_refused(compose_tiny, tmp_path, monkeypatch):
    """Before anything is written; and with the activations computed again, it fits."""
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 600e3)
    with pytest.raises(ValueError, match=r"batch_size=64 sequences at once take [\d.]+ MB of memory, 586 KB are free: choose a smaller"):
        program.train(compose_tiny("training.batch_size=64", "training.max_steps=1"))
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 6e6)
    with pytest.raises(ValueError, match=r"or training\.recompute=true"):
        program.train(compose_tiny("training.batch_size=64", "training.max_steps=1"))
    assert program.train(compose_tiny("training.batch_size=64", "training.max_steps=1", "training.recompute=true")) == 0


def test_memory_check_does_not_count_logits_of_all_chunks(monkeypatch):
    """All logits would take 0.8 GB."""
    settings = compose("config", ["model.block_size=128", "model.n_layer=1", "model.n_head=1", "model.n_embd=16", "training.batch_size=32"])
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 400e6)
    memory_plan.check_memory(settings, Device("cpu", "fp32"))
    with pytest.raises(ValueError, match=r"47\.7 MB are free"):  # for each of 8 processes on this machine
        memory_plan.check_memory(settings, Device("cpu", "fp32"), 8)


@pytest.mark.slow
def test_train_survives_kill_9_and_saves_on_sigint(book, tmp_path):
    words = ["train.py", "model=nano", "data=text", f"data.path={book}", "data.tokenizer=char", "training=smoke", "name=tiny",
             "training.max_steps=1e5", "training.sample_tokens=0", "training.eval_every=1e5", f"runs_dir={tmp_path}"]
    checkpoints = tmp_path / "tiny" / "checkpoints"

    def wait_for(condition):
        until = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < until and process.poll() is None, process.stderr.read()
            time.sleep(0.05)

    process = run_program(*words)
    wait_for(lambda: len(list(checkpoints.glob("step_*"))) >= 2)
    process.kill()
    process.communicate()
    reached = store.list_checkpoints(checkpoints)[-1].step
    assert reached >= 20

    process = run_program(*words)
    wait_for(lambda: store.list_checkpoints(checkpoints)[-1].step > reached)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"from step {reached}" in said and "Interrupted" in said


@pytest.mark.parametrize(("native", "device"), [("0", "; fp32 (no faster precision"), ("1", "; bf16 (native here)")])
def test_muon_trains_with_and_without_native_bf16(compose_tiny, tmp_path, monkeypatch, capsys, native, device):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    program.train(compose_tiny("optim=muon", "training.max_steps=30", "training.precision=auto"))
    losses = [row["loss"] for row in read_metrics(tmp_path / "runs/tiny") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5 and device in capsys.readouterr().out


def test_a_run_resumes_only_with_the_same_native_bf16(compose_tiny, monkeypatch):
    """Muon's products follow it."""
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "0")
    program.train(compose_tiny("optim=muon", "training.max_steps=2"))
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "1")
    with pytest.raises(ValueError, match="native_bf16 was false, now true"):
        program.train(compose_tiny("optim=muon", "training.max_steps=3"))
