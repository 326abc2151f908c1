"""python -m scripts.coordinate_check: the sizes of activations in wider models."""

from __future__ import annotations

import pytest

from conf.schema import compose
from model import GPTConfig, gpt, parametrization
from scripts import coordinate_check
from scripts.coordinate_check import CoordinateCheckSettings

TINY = ["widths=32 128", "model=modern-nano", "model.n_layer=1"]


def check(*overrides):
    return coordinate_check.main(compose(CoordinateCheckSettings, [*TINY, *overrides]))


@pytest.mark.parametrize("overrides", [["optim=muon"], ["optim=adamw", "heads=wider"],
                                       ["optim=adamw", "model.tie_head=true", "model.norm=rms_gain"]],
                         ids=" ".join)
def test_sizes_grow_with_the_width_only_without_mup(capsys, overrides):
    assert check(*overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    growing = lines[: lines.index(next(line for line in lines if line.startswith("mup")))]
    exponents = {line.split()[0]: float(line.split()[-1]) for line in growing[1:]}
    assert exponents["logits"] > 0.4 and exponents["mlp.c_fc"] > 0.3


def of_head(name):
    return name.startswith("lm_head")


def of_last_norm(name):
    return name.startswith("ln_f")


def of_projections(name):
    return ".c_proj." in name


ADAMW, MUON = ["optim=adamw"], ["optim=muon"]
TIED = ["optim=adamw", "model.tie_head=true", "model.norm=rms_gain"]
DEEP = ["optim=muon", "depths=1 4"]


@pytest.mark.parametrize(("rule", "of", "broken", "overrides"), [
    ("rate_scale", parametrization.is_hidden, "mlp.c_fc", ADAMW),
    ("rate_scale", of_head, "logits", ADAMW),
    ("rate_scale", of_last_norm, "effect of ln_f.weight", TIED),
    ("rate_scale", of_projections, "effect of attn.c_proj.weight", DEEP),
    ("initial_scale", parametrization.is_hidden, "attn.c_attn", MUON),
    ("initial_scale", of_last_norm, "logits", TIED),
])
def test_a_broken_rule_is_found(monkeypatch, rule, of, broken, overrides):
    right = getattr(gpt, rule)
    monkeypatch.setattr(gpt, rule, lambda config, name, *rest: 1.0 if of(name) else right(config, name, *rest))
    with pytest.raises(ValueError, match=rf"under mup, the size of .*\b{broken}\b.* depends on the (width|depth)"):
        check(*overrides)


def test_a_wrong_scale_of_attention_is_found(monkeypatch):
    monkeypatch.setattr(GPTConfig, "query_scale", 1.0)
    with pytest.raises(ValueError, match=r"the size of attn\.scores depends on the width"):
        check("optim=muon", "heads=wider", "widths=32 256")


def test_sizes_do_not_depend_on_the_depth():
    assert check(*DEEP) == 0


def test_a_diverged_model_is_no_success():
    with pytest.raises(ValueError, match=r"under mup, the size of .*logits"):
        check("optim=adamw", "optim.lr=1e9")


@pytest.mark.parametrize("word", ["widths=64", "depths=4", "depths=2 0"])
def test_invalid_sizes_are_refused(word):
    with pytest.raises(ValueError, match=f"{word} must be two or more different numbers"):
        compose(CoordinateCheckSettings, [word])


def test_the_sizes_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "check.png"
    assert check(f"out={picture}", "optim=muon") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
