"""The rules of muP: what they equal, and that standard models do not change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from checkpointing.state import new_state
from conf.settings import Settings
from model import GPT, GPTConfig
from model.formats import layout_for
from model.pretrained import weights_from, weights_to
from training import optim
from training.config import OptimConfig
from training.device import Device
from training.distributed import World
from training.optim import Optimizers

BASE = GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16)
# Four times as wide and twice as deep.
LARGE = replace(BASE, n_embd=64, n_head=8, n_layer=4, parametrization="mup", mup_base_width=16,
                mup_base_depth=2)
UNTIED = {"tie_head": False, "norm": "rms", "bias": False}
IDS = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def make(config):
    torch.manual_seed(0)
    return GPT(config)


def trained(model, optimizer, rates, steps=3):
    """The logits after some steps."""
    config = OptimConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.5, grad_clip=0.0)
    optimizers = Optimizers(model.parameters_by_role(), config, rates=rates)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(steps):
        model(IDS[:, :-1], IDS[:, 1:]).backward()
        norm = optimizers.gradient_norm(scaler)
        optimizers.step(scaler, norm, config.grad_clip)
    return model(IDS[:, :-1]).detach()


@BOTH
def test_the_base_model_is_bit_identical_to_a_standard_one(optimizer):
    mup = replace(BASE, parametrization="mup", mup_base_width=16, mup_base_depth=2,
                  mup_base_head_width=8)
    model = make(mup)
    logits = trained(model, optimizer, model.rate_scales(optimizer))
    assert torch.equal(logits, trained(make(BASE), optimizer, None))


@BOTH
@pytest.mark.parametrize("flags", [{}, UNTIED], ids=["tied", "untied"])
def test_rates_and_initial_sizes_equal_factors_in_the_model(monkeypatch, optimizer, flags):
    """1 / L on each branch and 1 / m on the logits, with rates and initial sizes without them."""
    monkeypatch.setattr(optim, "ADAM_EPSILON", 1e-20)
    # AdamW enlarges differences in rounding: in fp64, there are none.
    model, other = (make(replace(LARGE, **flags)).double() for _ in range(2))
    rates = model.rate_scales(optimizer)
    with torch.no_grad():
        for name, weights in other.named_parameters():
            factor = 2 if ".c_proj." in name else 1
            if name.startswith("lm_head" if flags else "ln_f"):
                factor = 4
            weights *= factor
            rates[name] *= factor
    for block in other.h:
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(lambda _, __, output: output / 2)
    other.ln_f.register_forward_hook(lambda _, __, output: output / 4)
    deviations = {name: weights.std().item() for name, weights in other.named_parameters()}
    for name in ("attn.c_attn", "mlp.c_fc"):
        assert deviations[f"h.1.{name}.weight"] == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    # Four branches in the base model.
    assert deviations["h.1.mlp.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(4 * 4), rel=0.1)
    assert deviations["lm_head.weight" if flags else "wte.weight"] == pytest.approx(0.02, rel=0.1)
    for name, rate in rates.items():
        is_hidden = name.endswith("weight") and (".attn." in name or ".mlp." in name)
        assert rate == (1 / 4 if is_hidden and optimizer == "adamw" else 1)

    before = model(IDS[:, :-1]).detach()
    logits = trained(model, optimizer, model.rate_scales(optimizer))
    expected = trained(other, optimizer, rates)
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)


def test_attention_scores_shrink_with_the_width_of_heads():
    config = replace(LARGE, n_head=2, mup_base_head_width=8)
    attention = make(config).h[0].attn
    x = torch.randn(1, 8, 64)
    q, k, _ = attention.project_qkv(x, None, None)
    plain, _, _ = make(replace(config, parametrization="standard")).h[0].attn.project_qkv(x, None, None)
    torch.manual_seed(0)
    scores = q @ k.mT / math.sqrt(32)
    weights = attention.c_attn(x).view(1, 8, -1, 32).transpose(1, 2)
    torch.testing.assert_close(scores, weights[:, :2] @ weights[:, 2:4].mT * math.sqrt(8) / 32)
    assert plain.shape == q.shape


@pytest.mark.parametrize(("changes", "said"), [
    ({"n_head": 2}, "heads of width n_embd / n_head = 32 do not divide mup_base_width=16"),
    ({"norm": "rms"}, "norm=rms has none: choose norm=rms_gain or tie_head=false"),
    ({"mup_base_width": 0}, "mup_base_width=0 must be at least 1"),
])
def test_unsupported_shapes_of_mup_are_refused(changes, said):
    problems = " ".join(replace(LARGE, **changes).problems())
    assert said in problems
    if "mup_base_width" not in changes:
        assert not list(replace(LARGE, **changes, parametrization="standard").problems())


@BOTH
def test_a_training_uses_the_rates_of_its_model(optimizer):
    settings = Settings(model=LARGE, optim=OptimConfig(optimizer=optimizer, lr=0.1, muon_lr=0.2))
    state = new_state(settings, World({}), Device("cpu"), sharded=False)
    names, rates = state.optimizers.names, {}
    for one in state.optimizers.all:
        for group in one.param_groups:
            rates |= {names[weights]: group["initial_lr"] for weights in group["params"]}
    assert rates["wte.weight"] == 0.1
    assert rates["ln_f.weight"] == 0.1 / 4
    assert rates["h.0.mlp.c_fc.weight"] == (0.2 if optimizer == "muon" else 0.1 / 4)
    assert rates["h.0.mlp.c_proj.weight"] == (0.2 / 2 if optimizer == "muon" else 0.1 / 8)
    smallest = 1 / 8 if optimizer == "adamw" else 1 / 4
    assert state.optimizers.all[-1].defaults["eps"] == 1e-8 * smallest
    # Weights decay by the same part in each step.
    for one in state.optimizers.all:
        products = {round(group["lr"] * group["weight_decay"], 9) for group in one.param_groups}
        assert len(products - {0.0}) == 1


@pytest.mark.parametrize("layout", ["gpt2", "gguf-gpt2"])
def test_exported_weights_need_no_rules_of_mup(layout):
    model = make(LARGE)
    assert layout_for(LARGE, gguf="gguf" in layout) == layout
    published = dict(weights_to(layout, LARGE, model.state_dict()))
    standard = GPT(replace(BASE, n_embd=64, n_head=8, n_layer=4))
    standard.load_state_dict(weights_from(layout, standard.config, published))
    assert torch.equal(standard(IDS[:, :-1]), model(IDS[:, :-1]))


def test_a_scaled_attention_is_not_exported():
    with pytest.raises(ValueError, match="do not scale attention"):
        layout_for(replace(LARGE, mup_base_head_width=8, n_head=2))
