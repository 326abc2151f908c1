"""What follows a step."""

from __future__ import annotations

import pytest

from training.config import TrainingConfig
from training.decision import Decision, decide

LIMITS = TrainingConfig(max_steps=10, max_seconds=100, eval_every=4, checkpoint_every=3)


@pytest.mark.parametrize(("step", "seconds", "expected"), [
    (1, 1.0, Decision()),
    (3, 1.0, Decision(save=True)),
    (4, 1.0, Decision(evaluate=True)),
    (10, 1.0, Decision(limit="max_steps", evaluate=True, save=True)),
    (5, 100.0, Decision(limit="max_seconds", evaluate=True, save=True)),
])
def test_steps_and_seconds_decide_what_follows(step, seconds, expected):
    assert decide(LIMITS, step, seconds, True, 0, False) == expected


def test_an_interrupt_ends_the_run():
    assert decide(LIMITS, 1, 1.0, True, 0, interrupted=True).ends_run
    assert not decide(LIMITS, 1, 1.0, True, 0, interrupted=False).ends_run


@pytest.mark.parametrize(("answer", "before", "action"), [
    ("stop", 0, "stop"), ("skip", 0, "skip"), ("skip", 4, "skip"), ("skip", 5, "stop"),
    ("rollback", 4, "rollback"), ("rollback", 5, "stop"),
])
def test_nonfinite_steps_are_answered_up_to_the_limit(answer, before, action):
    limits = TrainingConfig(on_nonfinite=answer, nonfinite_limit=5)
    assert decide(limits, 1, 1.0, False, before, False).action == action


def test_a_skipped_step_is_evaluated_and_saved_as_planned():
    limits = TrainingConfig(on_nonfinite="skip", eval_every=4, checkpoint_every=4)
    assert decide(limits, 4, 1.0, False, 0, False) == Decision("skip", evaluate=True, save=True)


def test_patience_ends_the_run_and_saves_improvements():
    limits = TrainingConfig(patience=2)
    evaluated = Decision(evaluate=True)
    assert evaluated.after_evaluation(limits, 0).save
    assert evaluated.after_evaluation(limits, 1) == evaluated
    assert evaluated.after_evaluation(limits, 2).limit == "patience"
    assert evaluated.after_evaluation(TrainingConfig(), 0) == evaluated
