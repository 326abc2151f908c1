"""Learning-rate schedules, and what a run is told when its length changes."""

from __future__ import annotations

import pytest

from training.config import OptimConfig
from training.schedule import extension, lr_scale, same_rates

SCHEDULES = pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])


def test_schedules_follow_their_equations():
    cosine = OptimConfig(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    scales = [lr_scale(step, cosine, 110) for step in (0, 10, 60, 110, 500)]
    assert scales == pytest.approx([1 / 11, 1.0, 0.55, 0.1, 0.1])
    wsd = OptimConfig(schedule="wsd", decay_fraction=0.5, min_lr_ratio=0.0)
    assert [lr_scale(step, wsd, 100) for step in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])
    constant = OptimConfig(schedule="constant", warmup_steps=1)
    assert [lr_scale(step, constant, 100) for step in (0, 1, 99)] == [0.5, 1.0, 1.0]


@SCHEDULES
def test_a_rate_rises_in_the_warm_up_and_never_again(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=20)
    scales = [lr_scale(step, config, 200) for step in range(200)]
    assert scales[:21] == sorted(scales[:21])
    assert scales[20:] == sorted(scales[20:], reverse=True)
    assert max(scales) == 1.0 and min(scales) > 0


@SCHEDULES
def test_extending_tells_whether_earlier_rates_change(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=20, decay_fraction=0.5)
    for max_steps in (101, 150, 400):
        for step in (1, 20, 21, 49, 50, 51, 100):
            old = [lr_scale(s, config, 100) for s in range(step)]
            new = [lr_scale(s, config, max_steps) for s in range(max_steps)]
            same = old == new[:step]
            assert same_rates(step, config, 100, max_steps) == same
            said = extension(step, config, 100, max_steps, replanned=False)
            assert ("it becomes that run" in said) == same
            if not same:
                assert all(f"{rate:.0%}" in said for rate in (old[-1], new[step], new[-1]))


def test_a_run_with_other_rates_never_becomes_the_longer_one():
    said = extension(5, OptimConfig(schedule="constant"), 100, 200, replanned=True)
    assert "it becomes that run" not in said
