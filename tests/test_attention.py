"""Attention against plain arithmetic, in float64 where rounding hides nothing; its cache against attention at once."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import model.attention
from conf.schema import compose, options
from model.attention import CausalSelfAttention, KVCache, rotary_table, rotate
from model.gpt import GPTConfig

B, T, C, H, D = 2, 8, 32, 4, 8
TABLE = rotary_table(T, D)


def make(**flags: object) -> tuple[GPTConfig, CausalSelfAttention, Tensor]:
    """A configuration, its attention with weights so large that attention is far from even, and an input."""
    config = GPTConfig(block_size=T, n_layer=1, n_head=H, n_embd=C, **flags)
    torch.manual_seed(0)
    attention = CausalSelfAttention(config).double().eval()
    for weights in attention.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return config, attention, torch.randn(B, T, C, dtype=torch.float64)


def plain_attention(attention: CausalSelfAttention, config: GPTConfig, x: Tensor, table: Tensor | None) -> Tensor:
    """One head after the other, with the softmax written out."""
    G = config.kv_heads
    wq, wk, wv = attention.c_attn.weight.split((H * D, G * D, G * D))
    bq, bk, bv = attention.c_attn.bias.split((H * D, G * D, G * D)) if config.bias else (0.0, 0.0, 0.0)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(H):
        of_query = slice(head * D, (head + 1) * D)
        shared = head // (H // G)  # neighbouring heads share a key-value head
        of_key = slice(shared * D, (shared + 1) * D)
        q, k, v = (x @ wq.T + bq)[..., of_query], (x @ wk.T + bk)[..., of_key], (x @ wv.T + bv)[..., of_key]
        if config.qk_norm:
            q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k))
        if table is not None:
            q, k = turned(q, table), turned(k, table)
        weights = (q @ k.transpose(1, 2) / math.sqrt(D)).masked_fill(future, -math.inf).exp()
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
    y = torch.cat(outputs, dim=-1) @ attention.c_proj.weight.T
    return y + attention.c_proj.bias if config.bias else y


def turned(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions as the paper has them: pairs are complex numbers, positions are angles."""
    cos, sin = table[..., : D // 2].double()
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("table", [None, TABLE], ids=["still", "rotary"])
@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_fused_attention_equals_plain_attention(bias, qk_norm, table, n_kv_head):
    config, attention, x = make(bias=bias, qk_norm=qk_norm, n_kv_head=n_kv_head)
    assert attention.c_attn.weight.shape == ((H + 2 * (n_kv_head or H)) * D, C)
    torch.testing.assert_close(attention(x, table), plain_attention(attention, config, x, table), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("batch", "time"), [(1, 1), (3, 1), (1, T), (3, 5)])
def test_output_has_the_shape_of_the_input(batch, time):
    _, attention, _ = make()
    assert attention(torch.zeros(batch, time, C, dtype=torch.float64)).shape == (batch, time, C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [{}, {"qk_norm": True}, {"n_kv_head": 2}], ids=str)
def test_a_changed_position_changes_nothing_before_it_and_everything_after(flags, dtype):
    _, attention, x = make(**flags)
    attention, x = attention.to(dtype), x.to(dtype)
    before = attention(x, TABLE)
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        after = attention(changed, TABLE)
        assert torch.equal(after[:, :t], before[:, :t])  # to the bit
        assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values(n_kv_head):
    _, grouped, x = make(n_kv_head=n_kv_head)
    _, full, _ = make()
    sizes = (H * D, n_kv_head * D, n_kv_head * D)
    with torch.no_grad():
        for theirs, ours in ((full.c_attn.weight, grouped.c_attn.weight), (full.c_attn.bias, grouped.c_attn.bias)):
            q, k, v = ours.split(sizes)
            k, v = (torch.cat([head for head in y.split(D) for _ in range(H // n_kv_head)]) for y in (k, v))
            theirs.copy_(torch.cat((q, k, v)))
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
    assert firsts.std() > 0.1  # and they do depend on it


def test_rotary_keeps_norms_and_leaves_position_zero_alone():
    x = torch.randn(B, H, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = rotate(x, TABLE)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(y[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("chunks", [[1] * T, [3, 5], [5, 3], [1, 7], [7, 1], [2, 1, 4, 1], [T]], ids=str)
@pytest.mark.parametrize("flags", [{}, {"qk_norm": True, "n_kv_head": 2}], ids=str)
def test_chunks_behind_a_cache_equal_the_whole_at_once(chunks, flags):
    config, attention, x = make(**flags)
    cache = KVCache(config, B, dtype=torch.float64)
    outputs = []
    for size in chunks:
        now = slice(cache.length, cache.length + size)
        outputs.append(attention(x[:, now], TABLE[:, now], cache))
        cache.length += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, TABLE), rtol=0, atol=1e-12)


def test_the_cache_returns_all_it_was_given_layer_by_layer():
    config = GPTConfig(block_size=T, n_layer=2, n_head=H, n_kv_head=2, n_embd=C)
    cache = KVCache(config, B)
    keys, values = torch.randn(2, config.n_layer, B, 2, T, D)
    for start, end in ((0, 3), (3, 4), (4, T)):
        for layer in range(config.n_layer):
            k, v = cache.extend(layer, keys[layer, :, :, start:end], values[layer, :, :, start:end])
            assert torch.equal(k, keys[layer, :, :, :end])
            assert torch.equal(v, values[layer, :, :, :end])
        cache.length = end


def test_dropout_is_off_in_evaluation():
    _, without, x = make()
    _, attention, _ = make(dropout=0.5)
    assert torch.equal(attention(x), without(x))


@pytest.mark.parametrize("place", ["weights", "way back"])
def test_dropout_is_on_in_training_in_both_places(place):
    _, attention, x = make(dropout=0.5)
    if place == "weights":
        attention.resid_dropout.p = 0.0
    else:
        attention.dropout = 0.0
    attention.train()
    assert not torch.equal(attention(x), attention(x))


@pytest.mark.parametrize("preset", options("model"))
@pytest.mark.parametrize("cached", [0, 1, 3, T - 1])
@pytest.mark.slow
def test_the_fast_path_equals_the_explicit_one_for_every_presets_flags_and_with_the_cache(preset, cached):
    config = replace(compose("config", [f"model={preset}"]).model, block_size=T, n_layer=1, n_head=H, n_embd=C)
    torch.manual_seed(0)
    attention = CausalSelfAttention(config).double().eval()
    for weights in attention.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    table = TABLE if config.position == "rotary" else None
    caches = [KVCache(config, B, dtype=torch.float64) if cached else None for _ in range(2)]
    with torch.no_grad():
        for cache in caches if cached else []:
            attention(x[:, :cached], table[:, :cached] if table is not None else None, cache)
            cache.length = cached
    new = x[:, cached:]
    table = table[:, cached:] if table is not None else None
    fast = attention(new, table, caches[0])
    plain, weights = attention.explicit(new, table, caches[1])
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    assert weights.shape == (B, H, T - cached, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T - cached, dtype=torch.float64))
    assert not weights.triu(cached + 1).any()
    if not cached:
        direction = torch.randn_like(fast)
        one, other = (torch.autograd.grad((y * direction).sum(), [x, *attention.parameters()]) for y in (fast, plain))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cached", [0, 3, T - 1])
@pytest.mark.parametrize("flags", [{}, {"n_kv_head": 2}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("queries_at_once", [2, 3, 100])
def test_blocks_of_products_equal_the_fused_kernel(queries_at_once, flags, cached, monkeypatch):
    config, attention, x = make(**flags)
    x.requires_grad_()
    found = []
    for faster in (False, True):
        monkeypatch.setattr(model.attention, "products_are_faster", lambda _, faster=faster: faster)
        monkeypatch.setattr(model.attention, "QUERIES_AT_ONCE", queries_at_once)
        cache = KVCache(config, B, dtype=torch.float64) if cached else None
        if cached:
            with torch.no_grad():
                attention(x[:, :cached], TABLE[:, :cached], cache)
            cache.length = cached
        y = attention(x[:, cached:], TABLE[:, cached:], cache)
        gradients = torch.autograd.grad(y.square().sum(), [x, *attention.parameters()]) if not cached else ()
        found.append((y, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_on_a_cpu_bfloat16_takes_products_and_nothing_else_does(monkeypatch):
    used = []
    original = model.attention.attend_by_products
    monkeypatch.setattr(model.attention, "attend_by_products", lambda *args: used.append(args) or original(*args))
    for dtype in (torch.float32, torch.float64, torch.float16):
        _, attention, x = make()
        attention.to(dtype)(x.to(dtype))
    assert not used
    _, attention, x = make()
    y = attention.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert used and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), attention.double()(x), rtol=0.05, atol=0.1)


def test_blocks_of_a_long_context_keep_no_weights_for_the_gradients(monkeypatch):
    kept = {}
    for queries_at_once in (T, 2):
        monkeypatch.setattr(model.attention, "QUERIES_AT_ONCE", queries_at_once)
        q, k, v = torch.randn(3, 1, H, T, 4, dtype=torch.bfloat16, requires_grad=True)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, shapes=shapes: shapes.append(x.shape) or x, lambda x: x):
            model.attention.attend(q, k, v, None, 0.0)
        kept[queries_at_once] = any(len(shape) > 2 and shape[-1] == T for shape in shapes)
    assert kept == {T: True, 2: False}


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_heads_take_the_explicit_path_too(n_kv_head):
    _, attention, x = make(n_kv_head=n_kv_head)
    plain, weights = attention.explicit(x)
    torch.testing.assert_close(attention(x), plain, rtol=0, atol=1e-10)
    assert weights.shape == (B, H, T, T)


def test_dropout_in_the_explicit_path_is_off_in_eval_and_not_in_the_weights():
    _, attention, x = make(dropout=0.5)
    quiet, weights = attention.explicit(x)
    torch.testing.assert_close(quiet, attention(x), rtol=0, atol=1e-10)
    attention.train()
    loud, also = attention.explicit(x)
    assert not torch.allclose(loud, quiet) and torch.equal(weights, also)


@pytest.mark.parametrize("where", ["weights", "residual"])
def test_the_explicit_path_has_dropout_in_both_places(where):
    _, attention, x = make(dropout=0.5)
    quiet = attention.explicit(x)[0]
    attention.train()
    if where == "weights":
        attention.resid_dropout.p = 0.0
    else:
        attention.dropout = 0.0
    loud = attention.explicit(x)[0]
    assert not torch.allclose(loud, quiet) and ((loud == 0).double().mean() > 0.3) == (where == "residual")
