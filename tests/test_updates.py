"""Updates are those of torch's own optimizers, without what making one of those takes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import updates
from training.updates import AdamW, Muon, orthogonalize

# How far ten steps in fp32 may be from ten in bf16, as a part of the learning rate.
NEAR = 0.1
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64), (16, 16), (48, 16), (1, 8), (16, 64)]


def steps_of_both(ours, theirs, one, other):
    """Ten steps of two optimizers on the same gradients; in one step, one parameter takes no part."""
    for step in range(10):
        for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = None if step == 3 and number == 2 else torch.randn(mine.shape)
            its.grad = None if mine.grad is None else mine.grad.clone()
        one.step()
        other.step()
        yield


def parameters() -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return ours, copy.deepcopy(ours)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"momentum": 0.8, "lr": 0.1}], ids=str)
def test_every_step_of_muon_is_that_of_torchs_own(monkeypatch, native, options):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1} | options
    ours, theirs = parameters()
    one = Muon([{"params": ours, "weight_decay": options["weight_decay"]}], options["lr"], options["momentum"])
    other = torch.optim.Muon(theirs, **options)
    for _ in steps_of_both(ours, theirs, one, other):
        for mine, its in zip(ours, theirs, strict=True):
            # torch's own multiplies in bf16.
            torch.testing.assert_close(mine, its, rtol=0, atol=2e-4 if native == "1" else NEAR * options["lr"])
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(one.state[mine]["momentum_buffer"], other.state[its]["momentum_buffer"])


def test_every_step_of_adamw_is_that_of_torchs_own_to_the_bit():
    ours, theirs = parameters()
    def groups(of): return [{"params": of[:4], "weight_decay": 0.1}, {"params": of[4:], "weight_decay": 0.0}]
    one, other = AdamW(groups(ours), 0.02, (0.9, 0.95)), torch.optim.AdamW(groups(theirs), 0.02, (0.9, 0.95), fused=True)
    for _ in steps_of_both(ours, theirs, one, other):
        assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))
        assert all(torch.equal(one.state[mine][what], tensor) for mine, its in zip(ours, theirs, strict=True)
                   for what, tensor in other.state[its].items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_torchs_compiler_is_not_imported_for_a_step(optimizer):
    """It takes a second."""
    code = ("import sys, torch\nfrom model import GPT, GPTConfig\nfrom training.optim import OptimConfig, Optimizers\n"
            "model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))\n"
            f"optimizers = Optimizers(model.parameters_by_role(), OptimConfig(optimizer={optimizer!r}))\n"
            "scaler, ids = torch.amp.GradScaler('cpu', enabled=False), torch.zeros((1, 8), dtype=torch.int64)\n"
            "model(ids, ids).backward()\noptimizers.step(scaler, optimizers.gradient_norm(scaler), 1.0)\n"
            "optimizers.load_tensors(optimizers.tensors())\nprint('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(("native", "dtype"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_muon_multiplies_in_bf16_only_where_it_is_native(monkeypatch, native, dtype):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    dtypes = []
    monkeypatch.setattr(updates, "orthogonalize", lambda stack: dtypes.append(stack.dtype) or orthogonalize(stack))
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for one in weights:
        one.grad = torch.randn(one.shape)
    Muon([{"params": weights, "weight_decay": 0.1}], 0.02, 0.95).step()
    assert set(dtypes) == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orthogonalized_matrices_have_singular_values_near_one(dtype):
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(5, 16, 40).to(dtype))
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.5 and values.max() < 1.4
