"""Documents in one row equal separate sequences, with a mask and with variable-length flash attention.

The flash attention kernel runs on GPUs only. Here a plain implementation, registered for the CPU, takes its place and
checks its inputs as the kernel does.
"""

import math
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.gpt
from model.attention import CausalSelfAttention, KVCache
from model.documents import DocumentAttention, supports_varlen
from model.gpt import GPT, GPTConfig

V, T = 65, 32
BOUNDARY = 0  # the id that starts a document
BASE = {"block_size": T, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 32}
MODERN = BASE | {"position": "rotary", "norm": "rms", "qk_norm": True, "activation": "relu2", "tie_head": False}
SMALL = {
    "learned": GPTConfig(**BASE),
    "learned, grouped": GPTConfig(**BASE | {"n_head": 4, "n_kv_head": 2}),
    "rotary": GPTConfig(**BASE | {"position": "rotary"}),
    "modern": GPTConfig(**MODERN),
    "modern, grouped": GPTConfig(**MODERN | {"n_head": 4, "n_kv_head": 1}),
}
every_small = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


def plain_varlen(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float | None):
    """Yield the slice of each document and its attention weights `[H, T, T]`."""
    assert q.dtype == k.dtype and cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    assert q.dim() == 3 and q.stride(-1) == k.stride(-1) == 1 and q.size(-1) % 8 == 0
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(q) and (cu_seqlens.diff() >= 0).all()
    k = k.repeat_interleave(q.size(1) // k.size(1), 1)
    for start, end in pairwise(cu_seqlens.unique().tolist()):
        scores = torch.einsum("thd,shd->hts", q[start:end], k[start:end]) * (scale or q.size(-1) ** -0.5)
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        yield slice(start, end), scores.masked_fill(future, -math.inf).softmax(-1)


@torch.library.register_kernel("torch_attn::_varlen_attn", "cpu")
def forward(q, k, v, cu_seqlens, cu_seqlens_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
    assert is_causal and len(q) == len(k) and k.shape == v.shape and v.dtype == q.dtype and v.stride(-1) == 1
    assert torch.equal(cu_seqlens, cu_seqlens_k) and max_q == max_k >= cu_seqlens.diff().max()
    out, v = torch.empty_like(q), v.repeat_interleave(q.size(1) // v.size(1), 1)
    for own, weights in plain_varlen(q, k, cu_seqlens, scale):
        out[own] = torch.einsum("hts,shd->thd", weights, v[own])
    return out, torch.zeros(q.size(1), len(q)), torch.zeros(2, dtype=torch.uint64)


@torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu")
def backward(grad, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, max_q, max_k, is_causal, state, scale=None, window_size=None):
    assert is_causal and grad.dtype == q.dtype and grad.stride(-1) == 1
    heads = k.size(1)
    k, v = (x.repeat_interleave(q.size(1) // heads, 1) for x in (k, v))
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for own, weights in plain_varlen(q, k, cu_seqlens, scale):
        of_weights = torch.einsum("thd,shd->hts", grad[own], v[own])
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * (scale or q.size(-1) ** -0.5)
        grads[0][own] = torch.einsum("hts,shd->thd", of_scores, k[own])
        grads[1][own] = torch.einsum("hts,thd->shd", of_scores, q[own])
        grads[2][own] = torch.einsum("hts,thd->shd", weights, grad[own])
    return grads[0], *(x.unflatten(1, (heads, -1)).sum(2) for x in grads[1:])


@pytest.fixture(params=["mask", "varlen"])
def kernel(request, monkeypatch):
    """Run a test with both implementations."""
    monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_: request.param == "varlen")
    return request.param


def randomized(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    with torch.no_grad():
        for weights in gpt.parameters():
            weights += 0.3 * torch.randn_like(weights)
    return gpt


def packed_rows() -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """Ids `[3, T]`, their document ids, and the row and slice of each document.

    The second row is one document, the third starts in the middle of one.
    """
    idx = torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(0))
    starts = [[0, 5, 6, 23], [0], [0, 9, 31]]
    for row, places in enumerate(starts):
        idx[row, places] = BOUNDARY
    idx[2, 0] = 7
    where = [(row, slice(*place)) for row, places in enumerate(starts) for place in pairwise([*places, T])]
    return idx, (idx == BOUNDARY).cumsum(1), where


def test_positions_start_at_0_in_each_document():
    numbers = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 9]])
    assert DocumentAttention(numbers).positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0]]


def test_a_position_attends_to_earlier_ones_of_its_document():
    _, numbers, _ = packed_rows()
    mask = DocumentAttention(numbers).mask
    assert mask.shape == (3, 1, T, T)
    for row in range(3):
        for t in range(T):
            for s in range(T):
                assert mask[row, 0, t, s].item() == (s <= t and numbers[row, s].item() == numbers[row, t].item())


def test_cu_seqlens_are_the_starts_of_documents_and_rows():
    starts = [0, 5, 6, 23, T, 2 * T, 2 * T + 9, 2 * T + 31]
    for most in (8, 11):
        cu_seqlens = DocumentAttention(packed_rows()[1], varlen=True, max_documents=most).cu_seqlens
        assert cu_seqlens.tolist() == starts + [3 * T] * (most - 7)


@every_small
def test_documents_in_a_row_equal_separate_sequences(config, kernel):
    """Their logits, and the gradients of all parameters."""
    idx, documents, where = packed_rows()
    together, apart = randomized(config).double(), randomized(config).double()
    direction = torch.randn(3, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = together(idx, document_ids=documents)
    (logits * direction).sum().backward()
    for row, own in where:
        alone = apart(idx[row : row + 1, own])
        torch.testing.assert_close(logits[row : row + 1, own], alone, rtol=0, atol=1e-9)
        (alone * direction[row : row + 1, own]).sum().backward()
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)


@every_small
def test_other_documents_in_the_row_have_no_effect(config, kernel):
    """Outputs are bit-identical; each document does depend on itself."""
    idx, documents, where = packed_rows()
    gpt = randomized(config)
    before = gpt(idx, document_ids=documents)
    for row, own in where:
        changed = idx.clone()
        changed[row, own] = (changed[row, own] + 1) % V
        same = gpt(changed, document_ids=documents) == before
        assert not same[row, own].all(-1).any()
        same[row, own] = True
        assert same.all()


@every_small
def test_the_loss_of_documents_is_their_cross_entropy(config):
    idx, documents, _ = packed_rows()
    gpt, targets = randomized(config), idx.roll(-1, 1)
    expected = F.cross_entropy(gpt(idx, document_ids=documents).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(gpt(idx, targets, document_ids=documents), expected)


@every_small
def test_one_document_per_row_equals_plain_attention(config, kernel):
    idx, _, _ = packed_rows()
    gpt = randomized(config).double()
    for documents in (torch.zeros_like(idx), torch.full_like(idx, 7)):
        torch.testing.assert_close(gpt(idx, document_ids=documents), gpt(idx), rtol=0, atol=1e-9)


@every_small
def test_without_documents_the_causal_kernel_is_used(config, monkeypatch):
    def spy(*arguments, **options):
        asked.append((options["attn_mask"], options["is_causal"]))
        return attention(*arguments, **options)

    asked, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(model.gpt, "DocumentAttention", None)
    monkeypatch.setattr(model.gpt, "supports_varlen", None)
    randomized(config)(packed_rows()[0])
    assert asked == [(None, True)] * config.n_layer


def test_with_dropout_documents_stay_separate():
    config = GPTConfig(**BASE | {"dropout": 0.3})
    idx, documents, where = packed_rows()
    gpt = randomized(config)
    quiet = gpt(idx, document_ids=documents)
    gpt.train()
    row, own = where[2]

    def loud(ids: Tensor) -> Tensor:
        torch.manual_seed(3)
        return gpt(ids, document_ids=documents)

    changed = idx.clone()
    changed[row, own] = 1
    same = loud(changed) == loud(idx)
    assert not same[row, own].all() and not torch.allclose(loud(idx), quiet)
    same[row, own] = True
    assert same.all()


def test_dropout_acts_on_attention_weights_of_documents():
    attention = CausalSelfAttention(GPTConfig(**BASE | {"dropout": 0.5}))
    attention.resid_dropout.p = 0.0
    documents, x = DocumentAttention(torch.zeros(1, T, dtype=torch.int64)), torch.randn(1, T, 32)
    assert not torch.equal(attention(x, context=documents), attention(x, context=documents))


def test_a_cache_with_document_ids_is_an_error():
    config = SMALL["learned"]
    with pytest.raises(AssertionError, match="one document"):
        GPT(config)(torch.zeros(1, 4, dtype=torch.int64), cache=KVCache(config, 1), document_ids=torch.zeros(1, 4))


@every_small
def test_under_autocast_mask_and_varlen_agree(config, monkeypatch):
    """Up to rounding to bfloat16, as in test_gpt.py."""
    idx, documents, _ = packed_rows()
    gpt, found = randomized(config), {}
    for varlen in (False, True):
        monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_, varlen=varlen: varlen)
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            gpt(idx, idx.roll(-1, 1), document_ids=documents).backward()
            found[varlen] = gpt(idx, document_ids=documents), [weights.grad for weights in gpt.parameters()]
    assert found[True][0].dtype == torch.bfloat16
    assert (found[True][0] - found[False][0]).std() < 0.02 * found[False][0].std()
    for one, other in zip(found[True][1], found[False][1], strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def test_varlen_casts_queries_and_keys_to_the_values_dtype():
    """Autocast can leave normalized queries in float32, which the kernel does not support."""
    documents = DocumentAttention(packed_rows()[1], varlen=True)
    q, k, v = torch.randn(3, 3, 2, T, 16)
    rounded = documents.attend(q, k, v.bfloat16(), 0.0)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - documents.attend(q, k, v, 0.0)).abs().max() < 0.05


def test_before_torch_2_12_keys_and_values_are_repeated(monkeypatch):
    from torch.nn.attention import varlen

    def without_shared_heads(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        assert q.size(1) == k.size(1) == v.size(1)
        return varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    varlen_attn, documents = varlen.varlen_attn, DocumentAttention(packed_rows()[1], varlen=True)
    q, k, v = torch.randn(3, 4, T, 8), torch.randn(3, 2, T, 8), torch.randn(3, 2, T, 8)
    expected = documents.attend(q, k, v, 0.0)
    monkeypatch.setattr(varlen, "varlen_attn", without_shared_heads)
    torch.testing.assert_close(documents.attend(q, k, v, 0.0), expected)


@pytest.mark.parametrize(("changes", "device", "autocast", "training", "expected"), [
    ({}, "cuda", torch.bfloat16, True, True),
    ({"dropout": 0.1}, "cuda", torch.bfloat16, True, False),
    ({"dropout": 0.1}, "cuda", torch.bfloat16, False, True),
    ({}, "cuda", torch.float16, True, False),
    ({}, "cuda", None, True, False),
    ({}, "cpu", torch.bfloat16, True, False),
    ({"n_embd": 4 * 12}, "cuda", torch.bfloat16, True, False),
    ({"n_embd": 4 * 264}, "cuda", torch.bfloat16, True, False),
], ids=str)
def test_varlen_needs_bf16_on_a_gpu_and_no_dropout(monkeypatch, changes, device, autocast, training, expected):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: autocast)
    config = GPTConfig(**{"n_head": 4, "n_embd": 64} | changes)
    assert supports_varlen(config, torch.device(device), training) == expected


@pytest.mark.slow
@pytest.mark.parametrize("varlen", [False, True])
def test_a_compiled_model_gives_the_same_loss_and_gradients(monkeypatch, varlen):
    """For any number of documents, and without document ids.

    The kernel of variable lengths is compiled for GPUs only, so here nothing is compiled to C++ with it.
    """
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_: varlen)
    torch._dynamo.reset()  # else the implementation of the last test is used
    gpt = randomized(replace(SMALL["modern, grouped"], n_layer=1))
    compiled = torch.compile(gpt, backend="aot_eager" if varlen else "inductor")
    for more in (0, 3, 1, None):
        idx, _, _ = packed_rows()
        documents = None
        if more is not None:
            idx[1, 3 : 3 + more] = BOUNDARY
            documents = (idx == BOUNDARY).cumsum(1)
        found = []
        for one in (gpt, compiled):
            gpt.zero_grad()
            loss = one(idx, idx.roll(-1, 1), document_ids=documents)
            loss.backward()
            found.append([loss.detach(), *(weights.grad for weights in gpt.parameters())])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_small
def test_on_a_gpu_mask_and_varlen_agree(config, monkeypatch):
    idx, documents, _ = (x.cuda() if isinstance(x, Tensor) else x for x in packed_rows())
    gpt, losses, grads = randomized(config).cuda(), [], []
    for varlen in (False, True):
        monkeypatch.setattr(model.gpt, "supports_varlen", lambda *_, varlen=varlen: varlen)
        gpt.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = gpt(idx, idx.roll(-1, 1), document_ids=documents)
        loss.backward()
        losses.append(loss.item())
        grads.append([weights.grad for weights in gpt.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()
