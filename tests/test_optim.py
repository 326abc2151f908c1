"""Optimizers and schedules."""

from __future__ import annotations

import math

import pytest
import torch

from model import GPT, GPTConfig
from training.optim import OptimConfig, Optimizers, extension, lr_scale, same_rates

NANO = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
PLAIN = torch.amp.GradScaler("cpu", enabled=False)


def take_step(optimizers: Optimizers, grad_clip: float) -> torch.Tensor:
    norm = optimizers.gradient_norm(PLAIN)
    optimizers.step(PLAIN, norm, grad_clip)
    return norm


def model_with_gradients(config: GPTConfig = NANO, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
    ids = torch.randint(11, (3, 8))
    model(ids, ids.roll(-1, 1)).backward()
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_partition_the_parameters(optimizer, tie_head, bias):
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, tie_head=tie_head, bias=bias))
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer=optimizer))
    ids = [id(weights) for one in optimizers.all for group in one.param_groups for weights in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(weights) for weights in model.parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_vectors_are_never_decayed_and_the_rest_is(optimizer):
    optimizers = Optimizers(GPT(NANO).parameters_by_role(), OptimConfig(optimizer=optimizer, weight_decay=0.3))
    for one in optimizers.all:
        for group in one.param_groups:
            for weights in group["params"]:
                assert group["weight_decay"] == (0.0 if weights.dim() == 1 else 0.3)


def test_muon_takes_the_matrices_of_the_blocks_and_each_optimizer_has_its_rate():
    model = GPT(NANO)
    muon, adamw = Optimizers(model.parameters_by_role(), OptimConfig(optimizer="muon", lr=0.5, muon_lr=0.25)).all
    assert {id(w) for group in muon.param_groups for w in group["params"]} == {
        id(w) for name, w in model.named_parameters() if name.startswith("h.") and w.dim() == 2}
    assert {group["lr"] for group in muon.param_groups} == {0.25}
    assert {group["lr"] for group in adamw.param_groups} == {0.5}


def test_adamw_step_equals_its_published_equations():
    config = OptimConfig(lr=0.1, weight_decay=0.2, grad_clip=0.0)
    model = model_with_gradients()
    before = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    gradients = {name: weights.grad.clone() for name, weights in model.named_parameters()}
    take_step(Optimizers(model.parameters_by_role(), config), config.grad_clip)
    for name, weights in model.named_parameters():
        decayed = before[name] * (1 - 0.1 * (0.2 if weights.dim() > 1 else 0.0))
        first_step = decayed - 0.1 * gradients[name] / (gradients[name].abs() + 1e-8)  # both moments, bias-corrected
        torch.testing.assert_close(weights.detach(), first_step, rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_norm_and_reports_it_unclipped(monkeypatch):
    model = model_with_gradients()
    norm = math.sqrt(sum(weights.grad.square().sum().item() for weights in model.parameters()))
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig())
    clipped = []
    step = optimizers.all[0].step
    monkeypatch.setattr(optimizers.all[0], "step", lambda: (clipped.extend(w.grad.square().sum().item() for w in model.parameters()), step()))
    assert take_step(optimizers, norm / 4) == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(clipped)) == pytest.approx(norm / 4, rel=1e-3)
    assert all(weights.grad is None for weights in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_out_and_comes_back_exactly(optimizer):
    """Two steps, against one step, a round trip through `tensors`, and the other step."""
    config = OptimConfig(optimizer=optimizer, lr=0.01)

    def step(model: GPT, optimizers: Optimizers, seed: int) -> None:
        torch.manual_seed(seed)
        ids = torch.randint(11, (3, 8))
        model(ids, ids.roll(-1, 1)).backward()
        take_step(optimizers, 1.0)

    straight = model_with_gradients()
    straight.zero_grad()
    other = GPT(NANO)
    other.load_state_dict(straight.state_dict())
    optimizers = Optimizers(straight.parameters_by_role(), config)
    step(straight, optimizers, 1)
    weights, state = {k: v.clone() for k, v in straight.state_dict().items()}, {k: v.clone() for k, v in optimizers.tensors().items()}
    step(straight, optimizers, 2)

    other.load_state_dict(weights)
    resumed = Optimizers(other.parameters_by_role(), config)
    resumed.load_tensors(state)
    step(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_clearing_drops_the_gradients_and_changes_nothing_else(optimizer):
    model = model_with_gradients()
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer=optimizer))
    before = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    optimizers.gradient_norm(PLAIN)
    optimizers.clear(PLAIN)
    assert all(torch.equal(weights, before[name]) and weights.grad is None for name, weights in model.named_parameters())
    assert all(not tensor.any() for tensor in optimizers.tensors().values())


def test_set_scale_multiplies_the_full_rates():
    optimizers = Optimizers(GPT(NANO).parameters_by_role(), OptimConfig(optimizer="muon", lr=0.5, muon_lr=0.25))
    optimizers.set_scale(0.5)
    optimizers.set_scale(0.1)
    assert [group["lr"] for one in optimizers.all for group in one.param_groups] == pytest.approx([0.025, 0.05, 0.05])


def test_schedules():
    cosine = OptimConfig(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert lr_scale(0, cosine, 110) == pytest.approx(1 / 11)
    assert lr_scale(10, cosine, 110) == 1.0
    assert lr_scale(60, cosine, 110) == pytest.approx(0.55)
    assert lr_scale(110, cosine, 110) == pytest.approx(0.1)
    assert lr_scale(500, cosine, 110) == pytest.approx(0.1)
    wsd = OptimConfig(schedule="wsd", decay_fraction=0.5, min_lr_ratio=0.0)
    assert [lr_scale(step, wsd, 100) for step in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])
    constant = OptimConfig(schedule="constant", warmup_steps=1)
    assert [lr_scale(step, constant, 100) for step in (0, 1, 99)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_schedule_rises_in_the_warm_up_and_never_rises_again(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=20)
    scales = [lr_scale(step, config, 200) for step in range(200)]
    assert scales[:21] == sorted(scales[:21]) and scales[20:] == sorted(scales[20:], reverse=True)
    assert max(scales) == 1.0 and min(scales) > 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("step", [1, 20, 21, 49, 50, 51, 100])
@pytest.mark.parametrize("max_steps", [101, 150, 400])
def test_extending_says_whether_the_run_becomes_the_longer_one(schedule, step, max_steps):
    """It does where all rates so far are the same; else the sentence gives the rates on both sides."""
    config = OptimConfig(schedule=schedule, warmup_steps=20, decay_fraction=0.5)
    so_far = [lr_scale(s, config, 100) == lr_scale(s, config, max_steps) for s in range(step)]
    said = extension(step, config, 100, max_steps, replanned=False)
    assert ("it becomes that run" in said) == all(so_far) == same_rates(step, config, 100, max_steps)
    assert "it becomes that run" not in extension(step, config, 100, max_steps, replanned=True)
    if not all(so_far):
        for rate in (lr_scale(step - 1, config, 100), lr_scale(step, config, max_steps), lr_scale(max_steps - 1, config, max_steps)):
            assert f"{rate:.0%}" in said


@pytest.mark.parametrize("where", ["wte", "c_attn"])
def test_a_scale_that_was_too_high_stops_both_optimizers(where):
    """An overflow in the parameters of one passes the step over for the other too, and lowers the scale."""
    model = model_with_gradients()
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer="muon"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    before = [weights.detach().clone() for weights in model.parameters()]
    next(weights for name, weights in model.named_parameters() if where in name).grad.view(-1)[0] = math.inf
    optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 512.0 and not any(tensor.any() for tensor in optimizers.tensors().values())
