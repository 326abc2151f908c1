"""Batched Muon takes the steps of torch.optim.Muon."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import Muon

from training.muon import BatchedMuon, orthogonalize

SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64), (16, 16), (48, 16), (1, 8), (16, 64)]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"momentum": 0.8, "lr": 0.1}], ids=str)
def test_every_step_is_that_of_torchs_own(options):
    torch.manual_seed(0)
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1} | options
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    one, other = BatchedMuon(ours, **options), Muon(theirs, **options)
    for step in range(10):
        for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = None if step == 3 and number == 2 else torch.randn(mine.shape)  # one that took no part
            its.grad = None if mine.grad is None else mine.grad.clone()
        one.step()
        other.step()
        for mine, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=2e-4)  # products in bf16, whose sums may be ordered otherwise
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(one.state[mine]["momentum_buffer"], other.state[its]["momentum_buffer"])


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(5, 16, 40).bfloat16(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.5 and values.max() < 1.4
