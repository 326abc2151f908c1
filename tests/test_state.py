"""The training state: what a checkpoint holds of it, and what is refused."""

from __future__ import annotations

import pytest
import torch

from checkpointing.checkpoint import Checkpoint, DamagedCheckpoint
from checkpointing.snapshot import save_checkpoint
from checkpointing.spec import step_name
from checkpointing.state import State, is_scaler_state, new_state
from model import GPT, GPTConfig
from model.loss import LossOptions
from training.config import OptimConfig
from training.device import Device
from training.distributed import World
from training.optim import Optimizers

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
FACTS = {"max_steps": 9, "settings": {}, "model": {}, "environment": {}}
SCALER = {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 3}


def make_state(optimizer="muon", seed=0):
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer=optimizer))
    return State(model, optimizers, torch.amp.GradScaler("cpu", enabled=False))


def take_steps(state, steps):
    for _ in range(steps):
        ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(state.step))
        state.model(ids, ids.roll(-1, 1)).backward()
        norm = state.optimizers.gradient_norm(state.scaler)
        state.optimizers.step(state.scaler, norm, 1.0)
        state.step += 1


def save(state, folder):
    folder.mkdir()
    save_checkpoint(folder, state.snapshot(1.5, True, {"kind": "byte"}, FACTS))
    return Checkpoint.open(folder / step_name(state.step))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_state_continues_bit_identically(tmp_path, optimizer):
    state, other = make_state(optimizer), make_state(optimizer, seed=1)
    take_steps(state, 2)
    state.seconds, state.best_val_loss, state.stale_evaluations = 1.5, 2.5, 3
    other.restore(save(state, tmp_path / "run"))
    assert (other.step, other.seconds, other.best_val_loss, other.stale_evaluations) == (2, 1.5, 2.5, 3)
    for one in (state, other):
        take_steps(one, 1)
    for mine, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_optimizer_is_refused_unchanged(tmp_path):
    saved = save(make_state("adamw"), tmp_path / "run")
    state = make_state("muon", seed=1)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(DamagedCheckpoint):
        state.restore(saved)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_rollback_skips_the_batches_since_the_checkpoint(tmp_path):
    state = make_state()
    saved = save(state, tmp_path / "run")
    take_steps(state, 3)
    state.nonfinite = 1
    state.roll_back(saved)
    assert (state.step, state.batch, state.nonfinite) == (0, 4, 1)


def test_a_loss_that_is_not_finite_is_never_the_best():
    state = make_state()
    for loss in (float("nan"), 2.0, float("inf"), 3.0):
        state.note_evaluation(loss)
    assert (state.best_val_loss, state.stale_evaluations) == (2.0, 2)


@pytest.mark.parametrize(("change", "expected"), [
    ({}, True), ({"scale": 2.0, "_growth_tracker": 0}, True), ({"scale": 0.0}, False), ({"scale": 1}, False),
    ({"_growth_tracker": True}, False), ({"_growth_tracker": -1}, False), ({"growth_factor": 3.0}, False), ({"other": 1}, False)])
def test_only_the_scale_and_count_of_a_scaler_may_differ(change, expected):
    assert is_scaler_state(SCALER | change, SCALER) is expected


def test_a_missing_scaler_has_an_empty_state():
    assert is_scaler_state({}, {}) and not is_scaler_state(SCALER, {}) and not is_scaler_state({}, SCALER)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_only_fp16_scales_the_loss(precision, compose_tiny):
    state = new_state(compose_tiny(), World({}), Device("cpu", precision), sharded=False)
    assert state.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize(("choice", "fused"), [("auto", True), ("true", True), ("false", False)])
def test_the_loss_on_a_gpu_is_compiled_if_nothing_else_is(choice, fused, compose_tiny, monkeypatch):
    """Unless that is turned off."""
    monkeypatch.setattr("checkpointing.state.loss_options", lambda device, fused: LossOptions(2**24, 64, fused))
    state = new_state(compose_tiny(f"training.compile={choice}"), World({}), Device("cpu"), sharded=False)
    assert state.model.loss_options == LossOptions(2**24, 64, fused)
