"""The chunked loss has the value and gradients of the plain one, in every precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, loss
from model.loss import MASKED, next_token_loss


@pytest.fixture
def in_chunks(monkeypatch):
    """Five rows of logits per chunk, so that small inputs take many chunks."""
    monkeypatch.setattr(loss, "MAX_LOGITS", 5 * 37)


def both(dtype=torch.float64, autocast=None, rows=53, scale=1.0, targets=None):
    """Loss and gradients, chunked and plain, of the same features `[rows, 16]` and weights `[37, 16]`."""
    torch.manual_seed(0)
    features, weight, drawn = torch.randn(rows, 16, dtype=dtype), torch.randn(37, 16, dtype=dtype), torch.randint(37, (rows,))
    targets = drawn if targets is None else targets
    results = []
    for function in (next_token_loss, lambda x, w, t: F.cross_entropy(F.linear(x, w).float() if autocast else F.linear(x, w), t)):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value = function(x, w, targets)
        (value * scale).backward()
        results.append((value.detach(), x.grad / scale, w.grad / scale))
    return results


@pytest.mark.parametrize("rows", [5, 6, 53, 55])
def test_value_and_gradients_equal_those_of_the_plain_loss(in_chunks, rows):
    chunked, plain = both(torch.float32, rows=rows)
    for one, other in zip(chunked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", ["some", "whole chunks", "all but one"])
def test_masked_targets_count_for_nothing(in_chunks, masked):
    """Their rows have no gradient, and the mean is that over the other targets."""
    torch.manual_seed(0)
    targets = torch.randint(37, (53,))
    if masked == "some":
        targets[torch.rand(53) < 0.4] = MASKED
    else:
        targets[5 if masked == "whole chunks" else 1 :] = MASKED
    chunked, plain = both(torch.float32, targets=targets)
    for one, other in zip(chunked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not chunked[1][targets == MASKED].any()


@pytest.mark.parametrize("max_logits", [5 * 37, 2**24])
def test_only_masked_targets_give_a_loss_of_zero(monkeypatch, max_logits):
    monkeypatch.setattr(loss, "MAX_LOGITS", max_logits)
    (value, *gradients), _ = both(torch.float32, targets=torch.full((53,), MASKED))
    assert value == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_in_the_plain_loss(in_chunks, dtype):
    """The loss is scaled, as fp16 needs for small gradients."""
    chunked, plain = both(torch.float32, autocast=dtype, scale=2.0**10)
    exact, _ = both(torch.float32)
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-4, atol=1e-4)
    for one, other, true in zip(chunked[1:], plain[1:], exact[1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - true).norm() < 1.2 * (other - true).norm() + 1e-6


def test_logits_exist_for_one_chunk_at_a_time(in_chunks, monkeypatch):
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(matmul(a, b)) or seen[-1])
    both(torch.float32)
    assert max(len(one) for one in seen if one.shape[-1] == 37) == 5


def test_in_inference_no_gradients_are_computed(in_chunks, monkeypatch):
    features, weight, targets = torch.randn(53, 16), torch.randn(37, 16), torch.randint(37, (53,))
    monkeypatch.setattr(torch, "zeros_like", lambda *args: pytest.fail("a gradient was allocated"))
    with torch.inference_mode():
        value = next_token_loss(features, weight, targets)
    torch.testing.assert_close(value, F.cross_entropy(features @ weight.T, targets))


@pytest.mark.parametrize("tie_head", [True, False])
def test_a_model_has_the_same_gradients_with_chunks(monkeypatch, tie_head):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=16, tie_head=tie_head))
    idx, targets = torch.randint(37, (4, 16)), torch.randint(37, (4, 16))
    gradients = []
    for at_once in (2**25, 200):
        monkeypatch.setattr(loss, "MAX_LOGITS", at_once)
        model.zero_grad()
        model(idx, targets).backward()
        gradients.append([weights.grad.clone() for weights in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
