"""python -m scripts.coordinate_check: the sizes of activations in wider models."""

from __future__ import annotations

import pytest

from conf.schema import compose
from model import gpt, parametrization
from scripts import coordinate_check
from scripts.coordinate_check import CoordinateCheckSettings

TINY = ["widths=16 64", "model=modern-nano", "model.n_layer=1"]


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


@pytest.mark.parametrize(("rule", "of", "layer"), [
    ("rate_scale", parametrization.is_hidden, "mlp.c_fc"),
    ("rate_scale", lambda name: name.startswith("lm_head"), "logits"),
    ("initial_scale", parametrization.is_hidden, "attn.c_attn"),
])
def test_a_broken_rule_is_found(monkeypatch, rule, of, layer):
    right = getattr(gpt, rule)
    monkeypatch.setattr(gpt, rule, lambda config, name, *rest: 1.0 if of(name) else right(config, name, *rest))
    optim = "muon" if rule == "initial_scale" else "adamw"
    with pytest.raises(ValueError, match=rf"under mup, the size of .*\b{layer}\b.* depends on the width"):
        check(f"optim={optim}")


def test_a_diverged_model_is_no_success():
    with pytest.raises(ValueError, match=r"under mup, the size of .*logits"):
        check("optim=adamw", "optim.lr=1e9")


def test_invalid_widths_are_refused():
    with pytest.raises(ValueError, match="widths=64 must be two or more different numbers"):
        compose(CoordinateCheckSettings, ["widths=64"])


def test_the_sizes_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "check.png"
    assert check(f"out={picture}", "optim=muon") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
