"""The chunked loss has the value and gradients of the plain one, in every precision."""

from __future__ import annotations

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, loss
from model.loss import (
    MASKED,
    LossOptions,
    chunk_size,
    fusible_loss_and_gradient,
    loss_and_gradient,
    loss_options,
    next_token_loss,
)


@pytest.fixture
def in_chunks(monkeypatch):
    """Five rows of logits per chunk, so that small inputs take many chunks."""
    monkeypatch.setattr(loss, "MAX_LOGITS", 5 * 37)
    monkeypatch.setattr(loss, "MIN_LOGITS", 5 * 37)


def both(dtype=torch.float64, autocast=None, rows=53, scale=1.0, targets=None, options=None):
    """Loss and gradients, chunked and plain, of the same features `[rows, 16]` and weights `[37, 16]`."""
    torch.manual_seed(0)
    features, weight, drawn = torch.randn(rows, 16, dtype=dtype), torch.randn(37, 16, dtype=dtype), torch.randint(37, (rows,))
    targets = drawn if targets is None else targets
    results = []
    chunked = partial(next_token_loss, options=options)
    for function in (chunked, lambda x, w, t: F.cross_entropy(F.linear(x, w).float() if autocast else F.linear(x, w), t)):
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


@pytest.mark.parametrize("min_logits", [5 * 37, 2**24])
def test_only_masked_targets_give_a_loss_of_zero(in_chunks, monkeypatch, min_logits):
    monkeypatch.setattr(loss, "MIN_LOGITS", min_logits)
    (value, *gradients), _ = both(torch.float32, targets=torch.full((53,), MASKED))
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_improbable_targets_have_their_exact_loss(in_chunks):
    """Also where the probability of a target is too small for fp32."""
    features, weight = torch.full((53, 1), 10.0), torch.zeros(37, 1)
    weight[1:3] = torch.tensor([[30.0], [-30.0]])
    targets = torch.arange(53) % 37
    value = next_token_loss(features.requires_grad_(), weight, targets)
    value.backward()
    torch.testing.assert_close(value.detach(), F.cross_entropy(features @ weight.T, targets))
    assert features.grad.isfinite().all()


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
        monkeypatch.setattr(loss, "MIN_LOGITS", at_once)
        model.zero_grad()
        model(idx, targets).backward()
        gradients.append([weights.grad.clone() for weights in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "options"), [
    (53, LossOptions(5 * 37, 8)), (8, LossOptions(100 * 37, 8)), (53, LossOptions(16 * 37, 64, fused=True))])
def test_a_padded_vocabulary_has_the_same_loss_and_gradients(in_chunks, monkeypatch, rows, options):
    """As on GPUs."""
    monkeypatch.setattr(loss, "compiled_loss_and_gradient", lambda: fusible_loss_and_gradient)
    torch.manual_seed(1)
    targets = torch.randint(37, (rows,))
    targets[3:5] = MASKED
    for one, other in zip(*both(torch.float32, rows=rows, targets=targets, options=options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_products_on_gpus_have_aligned_sizes(in_chunks, monkeypatch):
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((a.shape, b.shape)) or matmul(a, b))
    features, weight = torch.randn(128, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    next_token_loss(features, weight, torch.zeros(128, dtype=torch.int64), LossOptions(100 * 37, 64))
    assert seen == 2 * [((64, 16), (16, 64)), ((64, 64), (64, 16)), ((64, 64), (64, 16))]


@pytest.mark.parametrize(("gigabytes", "chunks"), [(141, 2), (80, 2), (24, 7), (8, 24)])
def test_chunks_are_equal_and_follow_the_memory_of_a_gpu(monkeypatch, gigabytes, chunks):
    """Of GPT-2's logits for 16 x 1,024 positions."""
    card = SimpleNamespace(total_memory=gigabytes * 2**30 - 2**28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    options = loss_options(torch.device("cuda"), fused=True)
    rows = chunk_size(16 * 1024, 50257, options)
    assert options.fused and rows % 64 == 0 and -(-16 * 1024 // rows) == chunks
    assert rows * 50257 * 8 < card.total_memory / 12
    assert loss_options(torch.device("cpu")) is None


def test_the_loss_is_compiled_for_one_shape(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: (function, dynamic))
    assert loss.compiled_loss_and_gradient.__wrapped__() == (fusible_loss_and_gradient, False)


@pytest.mark.slow
def test_fused_operations_write_no_logits_in_fp32():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    from torch._inductor.utils import run_and_get_code

    padded, targets = torch.randn(96, 320).bfloat16(), torch.randint(300, (96,))
    padded[:, 300:] = -torch.inf
    plain = loss_and_gradient(padded.clone(), targets)
    compiled = torch.compile(fusible_loss_and_gradient, dynamic=False)
    fused, (code,) = run_and_get_code(compiled, padded, targets)
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-4)
    assert "(96, 320), (320, 1), torch.bfloat16" in code and "(96, 320), (320, 1), torch.float32" not in code
