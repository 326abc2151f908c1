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
from training.estimate import Pace, measure_pace, update_seconds

CPU = Device("cpu", "fp32")


class Clock:
    """Stands in for `seconds_of`: a sequence takes its time, the first call more."""

    def __init__(self, monkeypatch, seconds_per_sequence, first=0.5):
        self.calls, self.seconds_per_sequence, self.first = [], seconds_per_sequence, first
        monkeypatch.setattr(estimate, "seconds_of", self)
        monkeypatch.setattr(estimate, "update_seconds", lambda *arguments: 0.2)

    def __call__(self, call, device):
        call()
        return self.calls[-1] * self.seconds_per_sequence + (self.first if len(self.calls) == 1 else 0.0)

    def loss(self, sequences):
        self.calls.append(sequences)
        return torch.zeros((), requires_grad=True)

    def measure(self, micro_steps=3, windows=64, compiled=False, **limits):
        limits = TrainingConfig(**{"max_steps": 100, "batch_size": 16} | limits)
        return measure_pace(self.loss, {}, OptimConfig(), CPU, limits, micro_steps, windows, compiled)


@pytest.mark.parametrize(("seconds", "limits", "calls"), [
    (0.001, {}, [2, 2, 16, 16, 16, 16, 16, 16, 16, 16]), (0.05, {}, [2, 2, 16, 16, 16]),  # the last is an evaluation
    (0.2, {}, [2, 2, 2]), (0.05, {"max_steps": 3}, [2, 2, 2]), (0.05, {"batch_size": 1}, [1, 1, 1])])
def test_whole_micro_steps_are_timed_where_that_is_short(monkeypatch, seconds, limits, calls):
    clock = Clock(monkeypatch, seconds)
    pace = clock.measure(**limits)
    assert clock.calls == calls
    assert pace.step == pytest.approx(3 * limits.get("batch_size", 16) * seconds + 0.2)
    assert pace.evaluation == pytest.approx(64 * seconds)


def test_a_slow_model_is_timed_once(monkeypatch):
    clock = Clock(monkeypatch, 20.0)
    assert clock.measure().step == pytest.approx(3 * 16 * 20, rel=0.1) and clock.calls == [2, 2]


def test_a_compiled_model_is_timed_in_its_own_shape(monkeypatch):
    clock = Clock(monkeypatch, 0.01)
    clock.measure(compiled=True)
    assert set(clock.calls) == {16}


@pytest.mark.parametrize(("limits", "step", "expected"), [
    ({}, 0, (100, 1)), ({"eval_every": 30}, 60, (40, 2)), ({"eval_every": 10}, 100, (0, 0)),
    ({"max_seconds": 50.0, "eval_every": 10}, 0, (25, 3)), ({"max_seconds": 500.0}, 0, (100, 1))])
def test_the_work_left_is_counted_in_steps_and_evaluations(limits, step, expected):
    limits = TrainingConfig(**{"max_steps": 100, "eval_every": 0} | limits)
    pace = Pace(2.0, 5.0)
    assert pace.work_left(limits, step, 0.0) == expected
    assert pace.seconds_left(limits, step, 0.0) == expected[0] * 2.0 + expected[1] * 5.0


def test_the_time_is_said_with_its_parts():
    said = Pace(2.0, 5.0).describe(TrainingConfig(max_steps=100, eval_every=50))
    assert said == "about 3.5 minutes on this machine: 100 steps of 2 s, 2 evaluations of 5 s"


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
            monkeypatch.setattr(story, "measure_pace", lambda *_: Pace(1.0, 1.0))
        story.train(compose_tiny("training.max_steps=3", "model.dropout=0.1", f"name={name}"))
        found.append(story.store.list_checkpoints(tmp_path / "runs" / name / "checkpoints")[-1])
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
