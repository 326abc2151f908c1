"""The announced time: by a few sequences and updates, and without a change to what is trained."""

from __future__ import annotations

import pytest
import torch

import train as story
from model import GPT, GPTConfig
from progress import ProgressBar
from training import estimate
from training.config import OptimConfig, TrainingConfig
from training.device import Device
from training.estimate import micro_step_seconds, update_seconds

CPU = Device("cpu", "fp32")


def clock(monkeypatch, *times):
    """Let calls take these times, one after the other."""
    left = iter(times)
    monkeypatch.setattr(estimate, "seconds_of", lambda call, device: call() or next(left))


@pytest.mark.parametrize(("times", "rows", "expected"), [
    ((0.01, 0.08), [2, 20], 0.08),  # fast: all sequences
    ((0.2, 0.9), [2, 10], 1.8),  # half of them
    ((3.0, 2.5), [2, 2], 25),  # all would be a wait
    ((0.9, 1.0), [2, 10], 2.0),  # the first pass was a slow one
    ((0.2, 30.0), [2, 10], 2.0)])  # the second was disturbed
def test_a_part_of_a_micro_step_tells_its_time(monkeypatch, times, rows, expected):
    seen = []
    clock(monkeypatch, *times)
    assert micro_step_seconds(seen.append, 20, CPU, compiled=False) == pytest.approx(expected)
    assert seen == rows


def test_a_compiled_model_is_timed_in_its_own_shape(monkeypatch):
    seen = []
    clock(monkeypatch, 5.0)
    assert micro_step_seconds(seen.append, 20, CPU, compiled=True) == 5.0 and seen == [20]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_of_parts_is_scaled_to_all(monkeypatch, optimizer):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=4, n_embd=768, vocab_size=50_304))
    roles = model.parameters_by_role()
    numbers = []

    def seconds_of(call, device):
        (optimizers,) = call.__defaults__[:1]
        call()
        numbers.append(sum(weights.numel() for weights in optimizers.parameters))
        return 1e-6 * numbers[-1]

    monkeypatch.setattr(estimate, "seconds_of", seconds_of)
    expected = 1e-6 * sum(weights.numel() for weights in model.parameters())
    found = update_seconds(roles, OptimConfig(optimizer=optimizer), CPU)
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(numbers) <= 768 * 4 * 768  # one matrix at most


def test_an_estimate_changes_nothing_that_is_trained(compose_tiny, tmp_path, monkeypatch):
    found = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(story, "expected_seconds", lambda *_: 1.0)
        story.train(compose_tiny("training.max_steps=3", "model.dropout=0.1", f"name={name}"))
        found.append(story.shelf.find(tmp_path / "runs" / name / "checkpoints")[-1])
    weights = [one.folder.joinpath("model.safetensors").read_bytes() for one in found]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("step", "steps", "every", "expected"), [
    (0, 260, 130, 2), (130, 130, 130, 1), (0, 100, 30, 4), (0, 5, 0, 1), (5, 0, 5, 0), (29, 2, 30, 2)])
def test_the_evaluations_of_a_span_are_counted(step, steps, every, expected):
    limits = TrainingConfig(eval_every=every, max_steps=step + steps)
    seen = {at for at in range(step + 1, step + steps + 1) if limits.evaluates(at)}
    if steps:
        seen.add(step + steps)
    assert limits.evaluations(step, steps) == expected == len(seen)


def test_the_first_time_left_is_the_estimate(monkeypatch):
    now = [100.0]
    bar = ProgressBar(total=100, initial=0)
    monkeypatch.setattr(bar, "_time", lambda: now[0])
    bar.expect(200)
    now[0] += 10  # slow first steps
    bar.n = 1
    assert 1 / bar.format_dict["rate"] == pytest.approx((10 * 2 + 10) / 11)
    now[0] += 390
    bar.n = 100
    assert 1 / bar.format_dict["rate"] == pytest.approx((10 * 2 + 400) / 110)
    bar.close()
