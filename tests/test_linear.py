"""The linear layer has the values and gradients of nn.Linear with oneDNN too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import linear
from model.linear import Linear

SHAPES = [(7,), (3, 5, 7), (2, 1, 7), (0, 7)]


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Use oneDNN on any processor."""
    monkeypatch.setenv("NANOHYDRA_ONEDNN", "1")


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_equal_those_of_nn_linear(shape, bias, transposed):
    torch.manual_seed(0)
    ours, theirs = Linear(7, 4, bias=bias), nn.Linear(7, 4, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.arange(torch.Size(shape).numel()).float().sin().view(shape).requires_grad_()
        # Non-contiguous inputs, forward and backward.
        y = layer(x.mT.contiguous().mT) if transposed and x.dim() == 3 else layer(x)
        loss = (y.mT if y.dim() > 1 else y).square().sum()
        results.append([y, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    assert linear.onednn_is_faster(x)
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_frozen_weight_gets_no_gradient():
    layer = Linear(3, 2).requires_grad_(False)
    x = torch.ones(4, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 3))
    assert layer.weight.grad is None and layer.bias.grad is None


def test_onednn_is_used_for_fp32_training_only():
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert not linear.onednn_is_faster(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear.onednn_is_faster(x)
    assert not linear.onednn_is_faster(x.double())
