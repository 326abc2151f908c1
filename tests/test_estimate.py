"""The estimated duration: of steps, updates and evaluations, without training anything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import startup
import train as story
from model import GPT, GPTConfig
from progress import ProgressBar
from training import estimate
from training.config import OptimConfig, TrainingConfig
from training.device import Device
from training.estimate import Pace, Workload, measure_pace, update_seconds

CPU = Device("cpu", "fp32")


class Timer:
    """A model whose sequences take `seconds` each, and its clock.

    The first loss takes `set_up` more, and the first with a number of sequences `first_of_size`.
    """

    def __init__(self, monkeypatch, seconds, set_up=0.0, first_of_size=0.0):
        self.calls, self.time, self.seconds, self.set_up = [], 0.0, seconds, set_up
        self.first_of_size = first_of_size
        monkeypatch.setattr(estimate, "now", lambda device: self.time)

    def loss(self, sequences):
        self.time += sequences * self.seconds
        if not self.calls:
            self.time += self.set_up
        if sequences not in self.calls:
            self.time += self.first_of_size
        self.calls.append(sequences)
        return torch.zeros((), requires_grad=True)

    def measure(self, micro_steps=3, compiled=False, world=None, **limits):
        limits = TrainingConfig(**{"max_steps": 100, "batch_size": 16} | limits)
        work = Workload(limits, OptimConfig(), {}, micro_steps, 64, compiled)
        return measure_pace(self.loss, work, CPU, world)


@pytest.mark.parametrize(("seconds", "limits", "calls"), [
    (0.05, {"max_steps": 1}, [1, 8]),  # half a micro-step, once
    (0.05, {}, [1, 8, 8]),  # twice, if that is little beside the run
    (0.05, {"max_seconds": 20}, [1, 8]),
    (0.001, {}, [1, 8, 8, 8, 8, 8]),  # repeated where it is short
    (2.0, {"max_steps": 1}, [1, 2]),  # fewer sequences where they are slow
    (20.0, {"max_steps": 1}, [1]),
    (0.05, {"batch_size": 1}, [1, 1, 1]),
    (0.2, {"batch_size": 1, "max_steps": 20}, [1])])  # a short run of single sequences
def test_half_a_micro_step_is_timed_where_that_is_short(monkeypatch, seconds, limits, calls):
    timer = Timer(monkeypatch, seconds)
    pace = timer.measure(**limits)
    assert timer.calls == calls
    assert pace.step == pytest.approx(3 * limits.get("batch_size", 16) * seconds)
    assert pace.evaluation == pytest.approx(64 * seconds / 3)


def test_the_set_up_of_a_device_is_not_counted(monkeypatch):
    assert Timer(monkeypatch, 0.05, set_up=0.5).measure().step == pytest.approx(3 * 16 * 0.05)


def test_the_cost_of_new_memory_is_not_counted(monkeypatch):
    timer = Timer(monkeypatch, 0.05, first_of_size=0.5)
    assert timer.measure().step == pytest.approx(3 * 16 * 0.05)


def test_evaluation_is_a_quarter_of_a_micro_step_with_recompute(monkeypatch):
    assert Timer(monkeypatch, 0.05).measure(recompute=True).evaluation == pytest.approx(64 * 0.05 / 4)


def test_a_compiled_model_is_timed_in_its_own_shape(monkeypatch):
    timer = Timer(monkeypatch, 0.01)
    timer.measure(compiled=True)
    assert timer.calls == [16, 16]


def test_the_update_is_part_of_a_step(monkeypatch):
    monkeypatch.setattr(estimate, "update_seconds", lambda *arguments: 0.2)
    assert Timer(monkeypatch, 0.05).measure().step == pytest.approx(3 * 16 * 0.05 + 0.2)


def test_processes_share_the_update_and_the_evaluation(monkeypatch):
    monkeypatch.setattr(estimate, "update_seconds", lambda *arguments: 0.2)
    four = SimpleNamespace(size=4, agree=lambda seconds, interrupted: (seconds, interrupted))
    pace = Timer(monkeypatch, 0.05).measure(world=four)
    assert pace.step == pytest.approx(3 * 16 * 0.05 + 0.2 / 4)
    assert pace.evaluation == pytest.approx(64 * 0.05 / 3 / 4)


@pytest.mark.parametrize(("limits", "step", "expected"), [
    ({}, 0, (100, 1)), ({"eval_every": 30}, 60, (40, 2)), ({"eval_every": 10}, 100, (0, 0)),
    ({"max_seconds": 50.0, "eval_every": 10}, 0, (25, 3)), ({"max_seconds": 500.0}, 0, (100, 1))])
def test_the_steps_and_evaluations_left_are_counted(limits, step, expected):
    limits = TrainingConfig(**{"max_steps": 100, "eval_every": 0} | limits)
    pace = Pace(2.0, 5.0)
    assert pace.work_left(limits, step, 0.0) == expected
    assert pace.seconds_left(limits, step, 0.0) == expected[0] * 2.0 + expected[1] * 5.0


def test_the_time_is_described_with_its_parts():
    said = Pace(2.0, 5.0).describe(TrainingConfig(max_steps=100, eval_every=50))
    assert said == "about 3.5 minutes on this machine: 100 steps of 2 s, 2 evaluations of 5 s"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_update_of_a_sample_is_extrapolated(monkeypatch, optimizer):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=50_304))
    time, updated = [0.0], []

    class Optimizers(estimate.Optimizers):
        """Takes a microsecond for each number."""

        def step(self, *arguments):
            updated.append(sum(weights.numel() for weights in self.parameters))
            time[0] += 1e-6 * updated[-1]

    monkeypatch.setattr(estimate, "Optimizers", Optimizers)
    monkeypatch.setattr(estimate, "now", lambda device: time[0])
    found = update_seconds(model.parameters_by_role(), OptimConfig(optimizer=optimizer), CPU)
    expected = 1e-6 * sum(weights.numel() for weights in model.parameters())
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(updated) <= 256 * 4 * 256  # the largest matrix


def test_an_estimate_does_not_change_the_training(compose_tiny, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(startup, "measure_pace", measure_pace)
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(startup, "measure_pace", lambda *_: Pace(1.0, 1.0))
        story.train(compose_tiny("training.max_steps=3", "model.dropout=0.1", f"name={name}"))
        last = story.store.list_checkpoints(tmp_path / "runs" / name / "checkpoints")[-1]
        found.append((last.folder / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(("step", "steps", "every", "expected"), [
    (0, 260, 130, 2), (0, 100, 30, 4), (0, 5, 0, 1), (5, 0, 5, 0), (29, 2, 30, 2)])
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
