"""AdamW, Muon, and which of them updates which parameter."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from training.config import OptimConfig
from training.distributed import World
from training.muon import Muon, orthogonalize
from training.optim import AdamW, Optimizers, load_state, state_tensors

NANO = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64), (16, 16), (48, 16), (1, 8), (16, 64)]
BOTH = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def take_step(optimizers, grad_clip=1.0):
    norm = optimizers.gradient_norm(NO_SCALER)
    optimizers.step(NO_SCALER, norm, grad_clip)
    return norm


def backward(model, seed):
    torch.manual_seed(seed)
    ids = torch.randint(11, (3, 8))
    model(ids, ids.roll(-1, 1)).backward()


def make(config=NANO, **settings):
    """A model with gradients, and its optimizers."""
    torch.manual_seed(0)
    model = GPT(config)
    backward(model, seed=0)
    return model, Optimizers(model.parameters_by_role(), OptimConfig(**settings))


def groups_of(optimizers):
    return [group for optimizer in optimizers.all for group in optimizer.param_groups]


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@BOTH
@pytest.mark.parametrize("options", [{}, {"tie_head": False, "bias": False}], ids=str)
def test_groups_partition_the_parameters(optimizer, options):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, **options)
    model, optimizers = make(config, optimizer=optimizer, weight_decay=0.3)
    ids = [id(weights) for group in groups_of(optimizers) for weights in group["params"]]
    assert sorted(ids) == sorted(id(weights) for weights in model.parameters())
    for group in groups_of(optimizers):
        for weights in group["params"]:
            assert group["weight_decay"] == (0.0 if weights.dim() == 1 else 0.3)


def test_muon_updates_the_matrices_of_the_blocks():
    model, optimizers = make(optimizer="muon", lr=0.5, muon_lr=0.25)
    muon, adamw = optimizers.all
    names = {optimizers.names[weights] for weights in muon.state}
    assert names == {name for name, weights in model.named_parameters()
                     if name.startswith("h.") and weights.dim() == 2}
    assert {group["lr"] for group in muon.param_groups} == {0.25}
    assert {group["lr"] for group in adamw.param_groups} == {0.5}


def test_adamw_follows_its_published_equations():
    model, optimizers = make(lr=0.1, weight_decay=0.2)
    before = clones(dict(model.named_parameters()))
    gradients = {name: weights.grad.clone() for name, weights in model.named_parameters()}
    take_step(optimizers, grad_clip=0.0)
    for name, weights in model.named_parameters():
        decay = 0.2 if weights.dim() > 1 else 0.0
        # In the first step, both bias-corrected moments are those of the gradient itself.
        expected = before[name] * (1 - 0.1 * decay)
        expected -= 0.1 * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(weights.detach(), expected, rtol=1e-4, atol=1e-5)


def steps_of_both(ours, theirs, one, other):
    """Ten steps of two optimizers on the same gradients; one parameter misses one step."""
    for step in range(10):
        for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = None if step == 3 and number == 2 else torch.randn(mine.shape)
            its.grad = None if mine.grad is None else mine.grad.clone()
        one.step()
        other.step()
        yield


def parameters():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return ours, copy.deepcopy(ours)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("decay, momentum, lr", [(0.1, 0.95, 0.02), (0.0, 0.8, 0.1)])
def test_muon_equals_torchs(monkeypatch, native, decay, momentum, lr):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    ours, theirs = parameters()
    one = Muon([{"params": ours, "weight_decay": decay}], lr, momentum)
    other = torch.optim.Muon(theirs, lr, momentum=momentum, weight_decay=decay)
    # torch's always multiplies in bf16: ten steps in fp32 may differ by a tenth of the rate.
    atol = 2e-4 if native == "1" else 0.1 * lr
    for _ in steps_of_both(ours, theirs, one, other):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(one.state[mine]["momentum_buffer"], other.state[its]["momentum_buffer"])


def test_adamw_is_bit_identical_to_torchs():
    ours, theirs = parameters()

    def groups(of):
        return [{"params": of[:4], "weight_decay": 0.1}, {"params": of[4:], "weight_decay": 0.0}]

    one = AdamW(groups(ours), 0.02, (0.9, 0.95))
    other = torch.optim.AdamW(groups(theirs), 0.02, (0.9, 0.95), fused=True)
    for _ in steps_of_both(ours, theirs, one, other):
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its)
            for key, tensor in other.state[its].items():
                assert torch.equal(one.state[mine][key], tensor)


@BOTH
def test_the_table_of_ngrams_can_have_a_rate_of_its_own(optimizer):
    config = replace(NANO, ngrams=2, ngram_rows=7)
    _, optimizers = make(config, optimizer=optimizer, lr=0.5, ngram_lr_ratio=0.25)
    optimizers.set_scale(0.5)
    rates = {}
    for group in groups_of(optimizers):
        for weights in group["params"]:
            rates[optimizers.names[weights]] = group["lr"]
    assert rates.pop("ngram.table.weight") == 0.0625
    assert rates["wte.weight"] == 0.25


@pytest.mark.parametrize(("native", "dtype"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_muon_uses_bf16_only_where_it_is_native(monkeypatch, native, dtype):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    dtypes = []
    monkeypatch.setattr("training.muon.orthogonalize",
                        lambda stack: dtypes.append(stack.dtype) or orthogonalize(stack))
    _, optimizers = make(optimizer="muon")
    take_step(optimizers)
    assert set(dtypes) == {dtype}


@pytest.mark.parametrize("native", ["0", "1"])
def test_muon_can_give_all_rows_of_an_update_one_norm(monkeypatch, native):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    updates = []
    for normalize_rows in (False, True):
        weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        torch.manual_seed(0)
        for matrix in weights:
            matrix.grad = torch.randn_like(matrix) * torch.rand(len(matrix), 1)
        Muon([{"params": weights}], 0.02, 0.9, normalize_rows).step()
        updates.append([matrix.detach() for matrix in weights])
    for usual, equal in zip(*updates, strict=True):
        rows = equal.norm(dim=1)
        torch.testing.assert_close(rows, rows.mean().expand(len(rows)), rtol=0.01, atol=0)
        torch.testing.assert_close(equal.norm(), usual.norm(), rtol=0.01, atol=0)
    # The rows of tall matrices have other norms without it.
    assert updates[0][0].norm(dim=1).std() > 0.1 * updates[0][0].norm(dim=1).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orthogonalized_matrices_have_singular_values_near_one(dtype):
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(5, 16, 40).to(dtype))
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.parametrize("columns", [31, 32, 40, 64])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_wide_matrices_are_orthogonalized_as_others(columns, rank):
    """In fp32, by products of squares: as in fp64 without them, for matrices of low rank too."""
    torch.manual_seed(0)
    matrices = torch.randn(5, 16, rank) @ torch.randn(5, rank, columns)
    matrices[0] *= 1e-6
    result = orthogonalize(matrices)
    torch.testing.assert_close(result, orthogonalize(matrices.double()).float(), rtol=1e-4, atol=1e-4)


def test_clipping_bounds_the_norm_and_reports_it_unclipped(monkeypatch):
    model, optimizers = make()
    norm = math.sqrt(sum(weights.grad.square().sum().item() for weights in model.parameters()))
    clipped = []
    monkeypatch.setattr(optimizers.all[0], "step", lambda: clipped.extend(
        weights.grad.square().sum().item() for weights in model.parameters()))
    assert take_step(optimizers, norm / 4) == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(clipped)) == pytest.approx(norm / 4, rel=1e-3)
    assert all(weights.grad is None for weights in model.parameters())


@BOTH
def test_state_is_named_by_parameter_and_can_be_restored(optimizer):
    """Two steps equal one step, a copy of weights and state, and another step."""
    model, optimizers = make(optimizer=optimizer)
    take_step(optimizers)
    weights, state = clones(model.state_dict()), clones(state_tensors(optimizers))
    assert {name.rpartition(".")[0] for name in state} == dict(model.named_parameters()).keys()
    key = "momentum_buffer" if optimizer == "muon" else "exp_avg"
    assert state[f"h.0.attn.c_attn.weight.{key}"].shape == (48, 16)

    other, resumed = make(optimizer=optimizer)
    other.load_state_dict(weights)
    other.zero_grad()
    load_state(resumed, state)
    for one, its in ((model, optimizers), (other, resumed)):
        backward(one, seed=2)
        take_step(its)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@BOTH
def test_the_state_has_its_size_before_the_first_step(optimizer):
    _, optimizers = make(optimizer=optimizer)
    before = {name: tensor.shape for name, tensor in state_tensors(optimizers).items()}
    take_step(optimizers)
    assert before == {name: tensor.shape for name, tensor in state_tensors(optimizers).items()}


@BOTH
def test_zero_grad_drops_gradients_and_nothing_else(optimizer):
    model, optimizers = make(optimizer=optimizer)
    before = clones(dict(model.named_parameters()))
    optimizers.gradient_norm(NO_SCALER)
    optimizers.zero_grad(NO_SCALER)
    for name, weights in model.named_parameters():
        assert torch.equal(weights, before[name]) and weights.grad is None
    assert all(not tensor.any() for tensor in state_tensors(optimizers).values())


def test_set_scale_multiplies_the_full_rates():
    _, optimizers = make(optimizer="muon", lr=0.5, muon_lr=0.25)
    optimizers.set_scale(0.5)
    optimizers.set_scale(0.1)
    assert [group["lr"] for group in groups_of(optimizers)] == pytest.approx([0.025, 0.05, 0.05])


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_attn.weight"])
def test_an_overflow_in_one_optimizer_skips_the_step_of_both(name):
    model, optimizers = make(optimizer="muon")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    before = clones(dict(model.named_parameters()))
    model.get_parameter(name).grad.view(-1)[0] = math.inf
    optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
    for name, weights in model.named_parameters():
        assert torch.equal(weights, before[name])
    assert scaler.get_scale() == 512.0
    assert all(not tensor.any() for tensor in state_tensors(optimizers).values())


def test_a_process_without_a_matrix_steps_with_a_scaler(monkeypatch):
    world = World({"TORCHELASTIC_RUN_ID": "", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2",
                   "LOCAL_WORLD_SIZE": "3"})
    monkeypatch.setattr(world, "share", lambda parts: None)
    table, matrix = torch.ones(8, 1024), torch.ones(4, 4)
    roles = {"attention": {"matrix": matrix}, "mlp": {}, "embedding": {"table": table},
             "head": {}, "vector": {}}
    optimizers = Optimizers(roles, OptimConfig(optimizer="muon"), world)
    monkeypatch.setattr(optimizers.norm, "measure", lambda: torch.ones(()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    (part,) = optimizers.own_parts
    part.tensor.grad = torch.ones_like(part.tensor)
    optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
    assert (part.tensor != 1).all()


@BOTH
def test_a_scaler_that_is_enabled_changes_nothing_else(optimizer):
    """Both optimizers work with torch's GradScaler, and unscaling by a power of two is exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    results = []
    for one in (NO_SCALER, scaler):
        model, optimizers = make(optimizer=optimizer)
        for weights in model.parameters():
            weights.grad = one.scale(weights.grad)
        optimizers.step(one, optimizers.gradient_norm(one), 1.0)
        results.append(list(model.parameters()))
    for plain, scaled in zip(*results, strict=True):
        assert torch.equal(plain, scaled)


@pytest.mark.slow
def test_a_step_does_not_import_torchs_compiler():
    """The import takes 2 s at the start of every run."""
    code = """
import sys, torch
from model import GPT, GPTConfig
from training.optim import OptimConfig, Optimizers
from training.optim import load_state, state_tensors
model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer="muon"))
scaler, ids = torch.amp.GradScaler("cpu", enabled=False), torch.zeros((1, 8), dtype=torch.int64)
model(ids, ids).backward()
optimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)
load_state(optimizers, state_tensors(optimizers))
print("torch._dynamo" in sys.modules)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
