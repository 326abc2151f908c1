"""Attention against an implementation without fused operations, in float64, and its cache."""

import math

import pytest
import torch
from torch import Tensor

import model.attention
from model.attention import CausalSelfAttention, KVCache, attend
from model.gpt import GPTConfig
from model.rotary import rotary_table, rotate

B, T, C, H, D = 2, 8, 32, 4, 8
TABLE = rotary_table(T, D)
FLAGS = pytest.mark.parametrize("flags", [
    {}, {"bias": False, "qk_norm": True, "n_kv_head": 2}, {"n_kv_head": 1}], ids=str)


def make(**flags: object) -> tuple[GPTConfig, CausalSelfAttention, Tensor]:
    """A config, attention with weights so large that it is far from uniform, and an input."""
    config = GPTConfig(block_size=T, n_layer=1, n_head=H, n_embd=C, **flags)
    torch.manual_seed(0)
    attention = CausalSelfAttention(config).double().eval()
    for weights in attention.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return config, attention, torch.randn(B, T, C, dtype=torch.float64)


def fill_cache(attention: CausalSelfAttention, config: GPTConfig, x: Tensor, table: Tensor) -> KVCache:
    """A cache of the positions of `x`."""
    cache = KVCache(config, B, dtype=torch.float64)
    with torch.no_grad():
        attention(x, table, cache)
    cache.length = x.size(1)
    return cache


def plain_attention(attention: CausalSelfAttention, config: GPTConfig, x: Tensor, table: Tensor | None) -> Tensor:
    """One head after the other, with the softmax written out."""
    G = config.kv_heads
    wq, wk, wv = attention.c_attn.weight.split((H * D, G * D, G * D))
    bq, bk, bv = attention.c_attn.bias.split((H * D, G * D, G * D)) if config.bias else (0.0, 0.0, 0.0)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(H):
        query_slice = slice(head * D, (head + 1) * D)
        kv_head = head // (H // G)  # adjacent heads share a key-value head
        kv_slice = slice(kv_head * D, (kv_head + 1) * D)
        q, k, v = (x @ wq.T + bq)[..., query_slice], (x @ wk.T + bk)[..., kv_slice], (x @ wv.T + bv)[..., kv_slice]
        if config.qk_norm:
            q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k))
        if table is not None:
            q, k = complex_rotate(q, table), complex_rotate(k, table)
        weights = (q @ k.transpose(1, 2) / math.sqrt(D)).masked_fill(future, -math.inf).exp()
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
    y = torch.cat(outputs, dim=-1) @ attention.c_proj.weight.T
    return y + attention.c_proj.bias if config.bias else y


def complex_rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions as in the paper: pairs are complex numbers, positions are angles."""
    cos, sin = table[..., : D // 2].double()
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("table", [None, TABLE], ids=["no positions", "rotary"])
@pytest.mark.parametrize(("n_kv_head", "bias"), [(None, True), (2, False), (1, True)])
def test_attention_equals_plain_attention(bias, qk_norm, table, n_kv_head):
    config, attention, x = make(bias=bias, qk_norm=qk_norm, n_kv_head=n_kv_head)
    assert attention.c_attn.weight.shape == ((H + 2 * (n_kv_head or H)) * D, C)
    torch.testing.assert_close(attention(x, table), plain_attention(attention, config, x, table), rtol=0, atol=1e-10)


@FLAGS
def test_outputs_depend_on_earlier_positions_only(flags):
    _, attention, x = make(**flags)
    before = attention(x, TABLE)
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        after = attention(changed, TABLE)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_heads_equal_heads_with_repeated_keys_and_values(n_kv_head):
    _, grouped, x = make(n_kv_head=n_kv_head)
    _, full, _ = make()
    sizes = (H * D, n_kv_head * D, n_kv_head * D)
    with torch.no_grad():
        for name, parameter in grouped.c_attn.named_parameters():
            q, k, v = parameter.split(sizes)
            k, v = (torch.cat([head for head in y.split(D) for _ in range(H // n_kv_head)]) for y in (k, v))
            full.c_attn.get_parameter(name).copy_(torch.cat((q, k, v)))
    full.c_proj.load_state_dict(grouped.c_proj.state_dict())
    torch.testing.assert_close(grouped(x, TABLE), full(x, TABLE), rtol=0, atol=1e-12)


def test_rotary_angles_are_position_times_frequency():
    for t in range(T):
        for d in range(D // 2):
            angle = t * 10_000 ** (-2 * d / D)
            for column in (d, d + D // 2):  # both halves of a pair
                assert TABLE[0, t, column].item() == pytest.approx(math.cos(angle), abs=1e-6)
                assert TABLE[1, t, column].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotary_products_depend_only_on_the_distance():
    torch.manual_seed(0)
    q, k = torch.randn(2, D, dtype=torch.float64)
    q, k = (rotate(y.expand(1, 1, T, D), TABLE)[0, 0] for y in (q, k))  # the same vector at each position
    products = q @ k.T
    for distance in range(-T + 1, T):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)  # the table is float32
    firsts = torch.stack([products.diagonal(distance)[0] for distance in range(-T + 1, T)])
    assert firsts.std() > 0.1


def test_rotary_keeps_norms_and_position_zero():
    x = torch.randn(B, H, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = rotate(x, TABLE)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(y[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("chunks", [[1] * T, [3, 5], [7, 1], [2, 1, 4, 1]], ids=str)
@FLAGS
def test_chunks_with_a_cache_equal_one_pass(chunks, flags):
    config, attention, x = make(**flags)
    cache = KVCache(config, B, dtype=torch.float64)
    outputs = []
    for size in chunks:
        now = slice(cache.length, cache.length + size)
        outputs.append(attention(x[:, now], TABLE[:, now], cache))
        cache.length += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, TABLE), rtol=0, atol=1e-12)


def test_the_cache_returns_all_keys_and_values_of_each_layer():
    config = GPTConfig(block_size=T, n_layer=2, n_head=H, n_kv_head=2, n_embd=C)
    cache = KVCache(config, B)
    keys, values = torch.randn(2, config.n_layer, B, 2, T, D)
    for start, end in ((0, 3), (3, 4), (4, T)):
        for layer in range(config.n_layer):
            k, v = cache.extend(layer, keys[layer, :, :, start:end], values[layer, :, :, start:end])
            assert torch.equal(k, keys[layer, :, :, :end])
            assert torch.equal(v, values[layer, :, :, :end])
        cache.length = end


@pytest.mark.parametrize("cached", [0, 3, T - 1])
@FLAGS
def test_forward_with_weights_equals_forward(flags, cached):
    config, attention, x = make(**flags)
    x.requires_grad_()
    caches = [fill_cache(attention, config, x[:, :cached], TABLE[:, :cached]) if cached else None for _ in range(2)]
    y = attention(x[:, cached:], TABLE[:, cached:], caches[0])
    unfused, weights = attention.forward_with_weights(x[:, cached:], TABLE[:, cached:], caches[1])
    torch.testing.assert_close(unfused, y, rtol=0, atol=1e-10)
    assert weights.shape == (B, H, T - cached, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T - cached, dtype=torch.float64))
    assert not weights.triu(cached + 1).any()
    if not cached:
        direction, inputs = torch.randn_like(y), [x, *attention.parameters()]
        gradients = [torch.autograd.grad((output * direction).sum(), inputs) for output in (y, unfused)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cached", [0, 3, T - 1])
@FLAGS
@pytest.mark.parametrize("chunk", [3, 100])
def test_unfused_chunks_equal_the_fused_kernel(chunk, flags, cached, monkeypatch):
    monkeypatch.setattr(model.attention, "QUERY_CHUNK", chunk)
    config, attention, x = make(**flags)
    x.requires_grad_()
    results = []
    for unfused in (False, True):
        monkeypatch.setattr(model.attention, "unfused_is_faster", lambda v, unfused=unfused: unfused)
        cache = fill_cache(attention, config, x[:, :cached], TABLE[:, :cached]) if cached else None
        y = attention(x[:, cached:], TABLE[:, cached:], cache)
        gradients = torch.autograd.grad(y.square().sum(), [x, *attention.parameters()]) if not cached else ()
        results.append((y, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_only_bfloat16_on_a_cpu_uses_unfused_attention(monkeypatch):
    used = []
    original = model.attention.unfused_attention
    monkeypatch.setattr(model.attention, "unfused_attention", lambda *args: used.append(args) or original(*args))
    for dtype in (torch.float32, torch.float64, torch.float16):
        _, attention, x = make()
        attention.to(dtype)(x.to(dtype))
    assert not used
    _, attention, x = make()
    y = attention.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert used and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), attention.double()(x), rtol=0.05, atol=0.1)


def test_chunks_keep_no_attention_weights_for_the_backward(monkeypatch):
    keeps_weights = {}
    for chunk in (T, 2):
        monkeypatch.setattr(model.attention, "QUERY_CHUNK", chunk)
        q, k, v = torch.randn(3, 1, H, T, 4, dtype=torch.bfloat16, requires_grad=True)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, shapes=shapes: shapes.append(x.shape) or x, lambda x: x):
            attend(q, k, v, None, 0.0)
        keeps_weights[chunk] = any(len(shape) > 2 and shape[-1] == T for shape in shapes)
    assert keeps_weights == {T: True, 2: False}


@pytest.mark.parametrize("method", ["forward", "forward_with_weights"])
@pytest.mark.parametrize("place", ["weights", "output"])
def test_dropout_acts_in_training_on_weights_and_output(place, method):
    def output() -> Tensor:
        result = getattr(attention, method)(x)
        return result if method == "forward" else result[0]

    _, attention, x = make(dropout=0.5)
    _, without, _ = make()
    in_evaluation = output()
    torch.testing.assert_close(in_evaluation, without(x), rtol=0, atol=1e-10)
    attention.train()
    if place == "weights":
        attention.resid_dropout.p = 0.0
    else:
        attention.dropout = 0.0
    in_training = output()
    assert not torch.allclose(in_training, in_evaluation)
    assert ((in_training == 0).double().mean() > 0.3) == (place == "output")


def test_returned_weights_are_those_before_dropout():
    _, attention, x = make(dropout=0.5)
    expected = attention.forward_with_weights(x)[1]
    assert torch.equal(attention.train().forward_with_weights(x)[1], expected)
