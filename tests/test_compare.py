"""Comparisons of runs with several seeds: the statistics, by simulation, and the script."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from test_report import write_run

from conf.schema import compose
from evaluation import comparison
from evaluation.comparison import (
    ALPHA,
    POWER,
    SPEEDRUN_SCORE,
    Comparison,
    compare_all,
    p_value,
    paired_test,
    seeds_needed,
    speedrun_score,
    threshold,
    unpaired_test,
)
from scripts import compare as script

needs_scipy = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('scipy')", reason="needs scipy")


# The statistics.


@needs_scipy
def test_equal_arms_have_a_winner_in_at_most_5_percent():
    """Of 1,000 comparisons of equal arms, with a look after every seed from 2 to 20."""
    noise = np.random.default_rng(0).standard_normal((1000, 20))
    found = np.zeros(1000, bool)
    for n in range(2, 21):
        found |= paired_test(noise[:, :n])[1] <= ALPHA
    assert 0 < found.mean() <= ALPHA


@needs_scipy
@pytest.mark.parametrize("first, spread", [(2, 1), (2, 0.3), (5, 10), (20, 1), (20, 3)])
def test_equal_unpaired_arms_have_a_winner_in_at_most_5_percent(first, spread):
    """Also where only one arm gets more seeds, then the other, and where their noise differs."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((1000, 20)), spread * random.standard_normal((1000, 20))
    looks = [(min(first, n), n) for n in range(2, 21)] + [(n, 20) for n in range(first, 21)]
    found = np.zeros(1000, bool)
    for n_a, n_b in looks:
        found |= unpaired_test(a[:, :n_a], b[:, :n_b])[1] <= ALPHA
    assert found.mean() <= ALPHA


@needs_scipy
@pytest.mark.parametrize("effect", [0.7, 1.5, 4])
def test_the_promised_number_of_seeds_finds_the_difference(effect):
    random = np.random.default_rng(0)
    pairs = seeds_needed(effect, 1)
    found = paired_test(random.standard_normal((4000, pairs)) + effect)[1] <= ALPHA
    assert found.mean() > POWER - 0.02
    if effect < 2:
        assert found.mean() < POWER + 0.08  # no more seeds than that takes
    each = seeds_needed(effect, math.sqrt(2), paired=False)
    a, b = random.standard_normal((2, 4000, each))
    assert (unpaired_test(a, b + effect)[1] <= ALPHA).mean() > POWER - 0.02


@needs_scipy
def test_the_threshold_is_where_p_is_5_percent():
    n = np.arange(3, 30)
    assert p_value(threshold(n - 1, n), n - 1, n) == pytest.approx(np.full(27, ALPHA))
    assert threshold(1, 2) == math.inf  # two seeds cannot decide


@needs_scipy
def test_shared_seeds_are_paired_and_others_are_not():
    a = {0: 1.0, 1: 2.0, 2: 3.0, 9: 100.0}
    [paired] = compare_all({"a": a, "b": {0: 0.9, 1: 1.91, 2: 2.9}}, "a")
    assert paired.paired and paired.seeds == (3, 3) and paired.difference == pytest.approx(-0.29 / 3)
    assert paired.error < 0.01 and paired.is_decided
    [unpaired] = compare_all({"a": a, "b": {3: 0.9, 4: 1.91, 5: 2.9}}, "a")
    assert not unpaired.paired and unpaired.seeds == (4, 3) and unpaired.error > 1 and not unpaired.is_decided
    # Two pairs alone could decide nothing.
    noise = [0.1, 0.3, 0.2, 0.0, 0.2, 0.1, 0.3, 0.0]
    [few] = compare_all({"a": dict(enumerate(noise)), "b": dict(enumerate(np.add(noise, 2), 6))}, "a")
    assert few.seeds == (8, 8) and few.is_decided


@needs_scipy
def test_more_than_two_arms_are_adjusted_by_holm():
    one = Comparison("a", "b", 1.0, 1.0, 0.0, (5, 5), True)
    adjusted = comparison.with_holm([Comparison("a", "b", 1.0, 1.0, p, (5, 5), True) for p in (0.04, 0.01, 0.03)])
    assert [each.p for each in adjusted] == pytest.approx([0.06, 0.03, 0.06])
    assert [each.p for each in comparison.with_holm([one])] == [0.0]
    results = {name: {seed: shift + seed % 2 + 0.01 * seed * shift for seed in range(5)} for name, shift in zip("abcd", (3, 1, 2, 4), strict=True)}
    assert {one.tests for one in compare_all(results, "a")} == {3}  # each with the reference
    best = compare_all(results)
    assert {one.tests for one in best} == {6} and len(best) == 3  # all pairs, since the results chose b
    assert all("b" in (one.first, one.second) for one in best)
    assert best[0].sentence("nats", 0.1).endswith("by Holm for 6 comparisons).")


@needs_scipy
@pytest.mark.parametrize("values, words", [
    ((-0.012, 0.002, 0.006, (5, 5), True), "B is better than A by 0.0120 ± 0.0020 bits (5 seeds, p = 0.006)."),
    ((0.012, 0.002, 1e-5, (5, 4), False), "A is better than B by 0.0120 ± 0.0020 bits (5 and 4 seeds, not in pairs, p < 0.001)."),
    ((-0.002, 0.002, 0.7, (5, 5), True), "between A and B: B is lower by 0.0020 ± 0.0020 bits (5 seeds, p = 0.7); about 14 more seeds would show one of 0.005."),
    ((-0.002, 0.0001, 0.06, (9, 9), True), "; one of 0.005 would probably have shown."),
    ((-0.02, 0.004, 0.07, (5, 5), True), "; about 2 more seeds would show one of 0.02."),
    ((-0.002, 0.9, 0.7, (5, 5), True), "; more than 1,000 seeds would be needed to show one of 0.005."),
])
def test_the_answer_is_one_sentence(values, words):
    difference, error, p, seeds, paired = values
    assert words in Comparison("A", "B", difference, error, p, seeds, paired).sentence("bits", 0.005)


@needs_scipy
def test_one_seed_seeds_without_effect_and_a_diverged_run():
    with pytest.raises(ValueError, match="b has 1 seed, and the noise"):
        compare_all({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}})
    with pytest.raises(ValueError, match="the seed has no effect"):
        compare_all({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.1, 1: 2.1}})
    with pytest.raises(ValueError, match="b with seed 3 diverged: its result is nan"):
        compare_all({"a": {0: 1.0, 3: 2.0}, "b": {0: 1.1, 3: math.nan}})
    [equal] = compare_all({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}})
    assert equal.p == 1 and "no difference" in equal.sentence("nats", 0.1).lower()


# Mean loss and seeds of results 1 to 46 of modded-nanogpt's track 3 (2026-06-19). The first three were accepted without
# passing the rule against the target, 3.28; all others pass.
TRACK_3 = """
3.2777 1 3.2790 1 3.2767 1 3.2741 5 3.2782 10 3.2788 20 3.2752 1 3.2778 10 3.2771 8 3.2789 20 3.2785 16 3.2790 20 3.2785 10
3.2776 4 3.2785 15 3.2784 8 3.2789 20 3.2776 9 3.2780 6 3.2790 30 3.2776 4 3.2774 4 3.2790 30 3.2782 10 3.2781 5 3.2785 10 3.2782 6
3.2790 25 3.2787 11 3.2784 16 3.2789 20 3.2778 9 3.2779 5 3.2781 8 3.2767 2 3.2787 10 3.2786 10 3.2786 9 3.2786 20 3.2788 16 3.2790 20
3.2789 16 3.2786 13 3.2789 20 3.2786 10 3.2783 8
"""


def test_the_speedrun_rule_gives_the_verdicts_of_its_table():
    numbers = TRACK_3.split()
    results = list(zip(map(float, numbers[::2]), map(int, numbers[1::2]), strict=True))
    assert len(results) == 46
    for number, (loss, seeds) in enumerate(results, 1):
        score = speedrun_score((3.28, loss), (3000, 3000), (math.inf, seeds))
        assert (score >= SPEEDRUN_SCORE) == (number > 3), number


@pytest.mark.parametrize("old, new, score", [
    ((3.2788, 3375, 20), (3.2790, 3325, 20), 0.00648),  # 12 against 6
    ((3.2778, 3250, 10), (3.2785, 3210, 16), 0.0027),  # 13 against 8, with its own number of seeds
    ((3.2785, 3225, 16), (3.2785, 3210, 10), 0.00167),  # 13 against 11
    ((3.2771, 3250, 8), (3.2785, 3225, 16), None),  # 11 against 9
    ((3.2790, 3125, 4), (3.2784, 3125, 8), None),  # 16 against 14
])
def test_the_speedrun_rule_gives_the_verdicts_of_its_pairs(old, new, score):
    found = speedrun_score(*zip(old, new, strict=True))
    assert (found >= SPEEDRUN_SCORE) == (score == 0.00648)
    if score:
        assert found == pytest.approx(score, abs=1e-4)


# The script.


def answer(tmp_path, *words):
    return script.main(compose(script.CompareSettings, [*words, f"runs_dir={tmp_path}"]))


@pytest.fixture
def arm(tmp_path):
    """Writes an arm of finished runs with other losses for each seed."""
    def make(name, shift=0.0, seeds=range(4), **changes):
        for seed in seeds:
            write_run(tmp_path / name / f"seed={seed}", end=3 + shift + (seed * 7 % 5) / 10 + shift * seed / 20, seed=seed, **changes)
    return make


@needs_scipy
def test_runs_are_compared_in_one_sentence(arm, tmp_path, capsys):
    arm("old", 1.0)
    arm("new", 0.0, optim__lr=0.01, steps=40, planned=40)
    assert answer(tmp_path, "old", "new") == 0
    *_, steps, _, _, last = capsys.readouterr().out.splitlines()
    assert steps == "The arms were trained for different numbers of steps: old 60 steps, new 40 steps."
    assert last.startswith("new is better than old by 0.5") and last.endswith(" bits per byte (4 seeds, p = 0.0047).")
    arm("newest", 0.5, optim__lr=0.1)
    answer(tmp_path, "old", "new", "newest", "metric=val_loss", "smallest=0.1")
    assert capsys.readouterr().out.count("by Holm for 2 comparisons") == 2
    answer(tmp_path, "old", "new", "rule=speedrun")
    assert "new is better than old by the rule of modded-nanogpt's track 3: its score is" in capsys.readouterr().out
    arm("broken", math.nan, optim__lr=9.0)
    for rule in ("sequential", "speedrun"):
        with pytest.raises(ValueError, match="broken with seed 0 diverged: its result is nan"):
            answer(tmp_path, "old", "broken", f"rule={rule}")


@needs_scipy
def test_a_sweep_with_seeds_is_several_arms(arm, tmp_path, capsys):
    for lr in (0.01, 0.1, 1.0):
        arm(f"sweep/lr={lr}", lr, optim__lr=lr)
    assert answer(tmp_path, "sweep") == 0
    printed = capsys.readouterr().out
    assert printed.count("3 comparisons") == 2 and "optim.lr=0.01 is better than optim.lr=1.0" in printed


@needs_scipy
def test_arms_of_two_sweeps_have_the_names_of_both(arm, tmp_path, capsys):
    for number, sweep in enumerate(("old", "new")):
        for lr in (0.01, 0.1):
            arm(f"{sweep}/lr={lr}", 1.0 - number, optim__lr=lr, optim__weight_decay=number)
    assert answer(tmp_path, "old", "new") == 0
    printed = capsys.readouterr().out
    assert all(f"{sweep} (optim.lr={lr}): " in printed for sweep in ("old", "new") for lr in (0.01, 0.1))


@needs_scipy
def test_arms_of_the_same_settings_need_other_seeds(arm, tmp_path, capsys):
    arm("a")
    arm("b")
    with pytest.raises(ValueError, match="a and b are the same settings with the same seeds"):
        answer(tmp_path, "a", "b")
    arm("c", seeds=range(4, 8))
    answer(tmp_path, "a", "c")
    assert "have the same settings, with other seeds" in capsys.readouterr().out


@needs_scipy
@pytest.mark.parametrize("changes, words, complaint", [
    ({}, ["a"], "Two arms are needed, not 1"), ({}, ["optim=muon", "seeds=2"], "not 1"), ({}, [], "not 0"), ({}, ["a", "nope"], "nope is neither"),
    ({"steps": 30}, ["a", "b"], r"seed=0 is not finished \(30 of 60 steps\)"),
    ({"data__path": "other.txt"}, ["a", "b"], r"validated on different texts \(data.path\)"),
    ({"training__eval_tokens": 7}, ["a", "b"], r"different texts \(training.eval_tokens\)"),
    ({"data__tokenizer": "byte"}, ["a", "b", "metric=val_loss"], "different tokenizers"),
    ({"data__tokenizer": "byte"}, ["a", "b", "rule=speedrun"], "different tokenizers"),
    ({"seeds": [0], "optim__lr": 1.0}, ["a", "b"], "b has 1 seed"),
    ({}, ["optim=muon seed=3", "optim=adamw"], "seed=3 is set for all arms"),
    ({}, ["optim=muon optim.lr='1", "optim=adamw"], "optim.lr='1 cannot be split into overrides"),
    ({}, ["a", "model.n_layr=3"], "model.n_layr .* is not a setting"),
    ({}, ["optim=adamw", "optim=adamw optim.optimizer=adamw", "seeds=2"], "are the same settings with the same seeds"),
])
def test_what_cannot_be_compared_is_one_sentence(arm, tmp_path, changes, words, complaint):
    arm("a")
    arm("b", **changes)
    with pytest.raises(ValueError, match=complaint):
        answer(tmp_path, *words)


def test_a_run_has_the_fingerprint_of_its_tokens(tiny_runs):
    assert script.open_finished(tiny_runs / "tiny", "tiny").settings["data.prepared"]


@needs_scipy
def test_a_seed_that_is_not_a_number_is_named(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, seed=[1, 2])
    with pytest.raises(ValueError, match=r"a has the seed \[1, 2\], which is not a whole number"):
        answer(tmp_path, "a", "b")


@needs_scipy
def test_tokenizers_are_compared_by_bits_per_byte(arm, tmp_path, capsys):
    arm("a")
    arm("b", 1.0, data__tokenizer="byte")
    assert answer(tmp_path, "a", "b") == 0
    assert "a is better than b" in capsys.readouterr().out


@needs_scipy
def test_arms_of_overrides_are_swept_over_seeds(arm, tmp_path, capsys, monkeypatch):
    plans = []

    def run_plan(plan):
        plans.append(plan)
        optim = {"optim__lr": len(plans)}
        arm(plan.folder.name, len(plans), seeds=range(4), **optim)
        return 0, []

    monkeypatch.setattr(script, "run_plan", run_plan)
    words = ["optim=adamw", "optim=muon optim.lr=0.02", "seeds=2", "base=training=smoke model=nano", "jobs=2"]
    assert answer(tmp_path, *words) == 0
    assert "optim=adamw is better than optim=muon optim.lr=0.02 by" in capsys.readouterr().out
    assert list(plans[1].composed) == ["seed=0", "seed=1"] and plans[1].own.jobs == 2
    _, settings = plans[1].composed["seed=1"]
    assert (settings.optim.lr, settings.training.max_steps, settings.seed) == (0.02, 20, 1)
    monkeypatch.setattr(script, "run_plan", lambda plan: (130, []))
    with pytest.raises(SystemExit) as stopped:
        answer(tmp_path, *words)
    assert stopped.value.code == 130


def test_a_missing_scipy_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match="pip install scipy"):
        answer(tmp_path, "optim=adamw", "optim=muon")
