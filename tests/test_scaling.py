"""Scaling laws: the fit and its intervals, and python -m scripts.scaling on runs with made-up losses."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import yaml

from conf.scaling import ScalingSettings
from conf.schema import compose
from evaluation.scaling_law import LogLaw, ScalingLaw, draw_noise, fit_law
from scripts import scaling, scaling_grid
from scripts.scaling_grid import isoflop_grid
from training.estimate import Pace

# Besiroglu et al. 2024 (arXiv:2404.10102), their replication of Chinchilla's.
LAW = ScalingLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
needs_scipy = pytest.mark.skipif(not find_spec("scipy"), reason="needs scipy")


def runs_of(law, budgets=(1e18, 4e18, 1.6e19, 6.4e19), noise=0.0, seed=0):
    """Sizes, tokens and losses of a grid with five sizes at each budget."""
    size = np.concatenate([law.best(budget)[0] * np.geomspace(0.25, 4, 5) for budget in budgets])
    tokens = np.repeat(budgets, 5) / 6 / size
    errors = np.random.default_rng(seed).normal(0, noise, len(size))
    return size, tokens, law.loss(size, tokens) * np.exp(errors)


@needs_scipy
@pytest.mark.parametrize("law", [LAW, ScalingLaw(1.0, 60.0, 900.0, 0.25, 0.45)], ids=["published", "unequal"])
def test_a_fit_finds_the_law_of_exact_losses(law):
    assert asdict(fit_law(*runs_of(law), draws=0).law) == pytest.approx(asdict(law), rel=1e-3)


@needs_scipy
def test_intervals_cover_the_true_law():
    """95% of 25 are 24; docs/scaling.md has a long simulation."""
    covered = 0
    for seed in range(5):
        fit = fit_law(*runs_of(LAW, noise=0.003, seed=seed), draws=30)
        for name in asdict(LAW):
            low, high = fit.interval(lambda law, name=name: getattr(law, name))
            covered += low <= getattr(LAW, name) <= high
        assert high - low < 0.2  # of beta: a wide interval would say nothing
    assert covered >= 21


@needs_scipy
def test_a_fit_without_e_has_intervals_that_cover_it():
    """The noise of these nine runs hides E. A redrawn fit that starts from zero can leave it."""
    law = ScalingLaw(2.6, 30.0, 300.0, 0.25, 0.4)
    size, tokens = np.repeat([9e4, 2.7e5, 8e5], 3), np.tile([1e6, 4e6, 1.6e7], 3)
    errors = np.random.default_rng(5).normal(0, 0.01, 9)
    fit = fit_law(size, tokens, law.loss(size, tokens) * np.exp(errors), draws=12)
    assert fit.law.E == 0
    for name in ("E", "A", "alpha"):
        low, high = fit.interval(lambda law, name=name: getattr(law, name))
        assert low <= getattr(law, name) <= high
    assert np.isfinite([law.best(1e14) for law in fit.laws]).all()


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_noise_of_one_size_is_drawn_as_correlated_as_it_is(correlation):
    rng = np.random.default_rng(0)
    size, tokens = np.repeat(np.geomspace(1e8, 1e10, 16), 8), np.tile(np.geomspace(1e9, 1e12, 8), 16)
    of_sizes, of_runs = np.repeat(rng.normal(size=16), 8), rng.normal(size=128)
    residuals = 0.01 * (math.sqrt(correlation) * of_sizes + math.sqrt(1 - correlation) * of_runs)
    grid = LogLaw(size, tokens)
    terms = grid.terms(np.array([0.5, -1.0, -1.0, 0.35, 0.36]))
    jacobian = grid.jacobian(terms, np.logaddexp.reduce(terms))
    # Changes of the constants are no noise.
    noise, of_new = draw_noise(residuals + jacobian @ np.ones(5), jacobian, size, 400, rng)
    found = np.corrcoef(noise.T)
    assert found[0, 1:8].mean() == pytest.approx(correlation, abs=0.2)
    assert abs(found[0, 8:].mean()) < 0.1
    assert [noise.std(), of_new.std()] == pytest.approx([0.01, 0.01], rel=0.3)


@needs_scipy
def test_losses_of_noise_alone_give_finite_intervals():
    fit = fit_law(*runs_of(LAW, noise=0.5), draws=20)
    assert np.isfinite([fit.interval(lambda law: law.best(1e21)[0]), fit.interval_of_run(1e10, 1e12)]).all()


def test_the_best_size_has_the_lowest_loss():
    size, tokens = LAW.best(1e21)
    others = np.geomspace(size / 10, size * 10, 2001)
    assert 6 * size * tokens == pytest.approx(1e21)
    assert others[LAW.loss(others, 1e21 / 6 / others).argmin()] == pytest.approx(size, rel=0.01)


def test_a_grid_leaves_out_short_and_long_runs():
    runs = isoflop_grid([1e4, 1e5, 1e6], [1.2e11, 1.2e12], tokens_per_step=1000, max_tokens=3e6)
    assert runs == [(0, 2000, 1.2e11), (1, 200, 1.2e11), (1, 2000, 1.2e12), (2, 200, 1.2e12)]


@needs_scipy
@pytest.mark.parametrize(("budgets", "message"), [((1e18,), "at least 8 finished runs.* there are 5"), ((1e18, 1e18), "there are 10, of 5 and 1")])
def test_too_few_runs_are_not_fitted(budgets, message):
    size, tokens, losses = runs_of(LAW, budgets)
    with pytest.raises(ValueError, match=message):
        fit_law(size, np.full_like(tokens, tokens[0]) if len(budgets) > 1 else tokens, losses)


# The script.


MADE_UP = ScalingLaw(1.0, 5.0, 20.0, 0.3, 0.5)


def write_run(folder, settings, error, steps=None, loss=None):
    """A run's folder as training leaves it; its loss is that of MADE_UP."""
    model = replace(settings.model, vocab_size=40)
    steps = steps or settings.training.max_steps
    tokens = steps * scaling.tokens_of_step(settings)
    folder.mkdir(parents=True)
    values = asdict(replace(settings, model=model))
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    rows = [{"step": steps, "loss": 2.0, "tokens": tokens, "seconds": 1.0},
            {"step": steps, "val_loss": loss or MADE_UP.loss(scaling.size_of(model), tokens) * math.exp(error)}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def command(tmp_path, book, monkeypatch, fresh_data):
    """`command("hours=1", ...)` runs the script; its trainings only write their results."""
    def train(plan):
        errors = np.random.default_rng(1).normal(0, 1e-3, len(plan.composed))
        for number, ((name, (_, settings)), error) in enumerate(zip(plan.composed.items(), errors, strict=True)):
            if not (plan.folder / name).exists():
                write_run(plan.folder / name, settings, error, *({3: (50,), 5: (None, 9.0)}.get(number, ())))
        return 0, []

    monkeypatch.setattr(scaling, "run_plan", train)
    monkeypatch.setattr(scaling_grid, "pace_of", lambda *arguments: Pace(1.0, 1.0))
    monkeypatch.setattr(scaling, "fit_law", partial(fit_law, draws=30))
    space = tmp_path / "isoflop.yaml"
    space.write_text("space: {model.n_embd: [16, 24, 32, 48]}")
    of_runs = ["model=nano", "model.block_size=8", "training.batch_size=1", "data=text", f"data.path={book}", "data.tokenizer=char"]

    def run(*words, train=True):
        words = [*(of_runs if train else []), f"sweep={space}", f"runs_dir={tmp_path}", "budgets=3", *words]
        return scaling.main(compose(ScalingSettings, words))
    return run


@needs_scipy
def test_a_grid_is_planned_fitted_and_used(command, tmp_path, capsys):
    assert command("hours=100") == 0
    said = capsys.readouterr().out
    assert "Left out: n_embd=" in said and "is not finished (50 of " in said and "diverged: its loss is 9" in said
    grid = json.loads((tmp_path / "isoflop/grid.json").read_text())
    assert 10 <= len(grid["runs"]) <= 12 and f"Law of {len(grid['runs']) - 2} runs" in said
    # A larger run, which is not in the fit.
    settings = compose("config", [*list(grid["runs"].values())[-1]["overrides"], "name=-", "model.n_embd=96"])
    write_run(tmp_path / "larger", settings, 0)
    assert command("predict=1e11", "held_out=larger", train=False) == 0
    said = capsys.readouterr().out
    assert "larger: N = " in said and "inside the interval" in said and "Note: that is" in said
    size, _ = MADE_UP.best(1e11)
    found = float(re.search(r"Best for 1e\+11 FLOPs: N = ([\d,]+)", said)[1].replace(",", ""))
    assert found == pytest.approx(size, rel=0.2)
    width = int(re.search(r"python train.py .* model.n_embd=(\d+)", said)[1])
    nearest = min(range(4, 400, 4), key=lambda width: abs(scaling.size_of(replace(settings.model, vocab_size=40, n_embd=width)) - found))
    assert width == nearest
    assert (tmp_path / "isoflop/scaling.png").exists() == bool(find_spec("matplotlib"))
    for damage in ({"runs": {}}, {"runs": {"a": {}}}, {"seconds": "1"}, {"varied": [1]}):
        (tmp_path / "isoflop/grid.json").write_text(json.dumps(grid | damage))
        with pytest.raises(ValueError, match=r"grid.json is damaged: use another name="):
            command("predict=1e11", train=False)
    (tmp_path / "isoflop/grid.json").write_text(json.dumps(grid))
    with pytest.raises(ValueError, match=r"planned otherwise: hours was 100.0, now 2.0. Use another name="):
        command("hours=2")
    write_run(tmp_path / "other", replace(settings, data=replace(settings.data, separator="x")), 0)
    with pytest.raises(ValueError, match="other was trained on other tokens than the grid"):
        command("held_out=other", train=False)


@needs_scipy
@pytest.mark.parametrize(("words", "message"), [
    (["hours=0.01"], r"hours=0.01 is too short: the smallest grid of 8 runs takes .* hours on this machine"),
    (["hours=1", "training.batch_size=64"], "tokens, too few for a grid of 8 runs in one epoch"),
    (["dry_run=true"], "has no grid yet: say how long it may train, as in hours=0.5"),
    (["hours=100", "held_out=nothing"], "^nothing is neither a folder in .* nor a path of one")])
def test_a_grid_that_cannot_be_planned_is_refused(command, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        command(*words)
    assert not list(tmp_path.rglob("grid.json"))  # nothing was trained


def test_scipy_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match="need SciPy: pip install scipy"):
        scaling.main(ScalingSettings())
