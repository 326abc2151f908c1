"""The model against the published GPT-2: sizes, names, initial loss, causality, and a plain implementation."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conf.presets import options, preset
from model import linear
from model.attention import KVCache
from model.gpt import GPT, MLP, GPTConfig
from model.skip_init import SkipInit

V = 65


NANO = GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
MODERN = replace(NANO, bias=False, position="rotary", norm="rms", qk_norm=True, activation="relu2", zero_init=True,
                 tie_head=False, embedding_norm=True, ngrams=2, ngram_rows=64)
SMALL = {
    "gpt2": NANO,
    "no bias": replace(NANO, bias=False),
    "modern": MODERN,
    "qwen3": replace(NANO, bias=False, position="rotary", norm="rms_gain", qk_norm=True, activation="swiglu", n_kv_head=1),
    "grouped": replace(MODERN, n_head=4, n_kv_head=2),
    "grouped gpt2": replace(NANO, n_head=4, n_kv_head=1),
}
every_small = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
GPT2_PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


def randomized(config: GPTConfig) -> GPT:
    """A model with large random weights: as initialized, attention is nearly uniform and the head may be zero."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.3 * torch.randn_like(weights)
    return model


def random_ids(*shape: int, vocab_size: int = V, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# Sizes, names and roles


@pytest.mark.parametrize("name", options("model"))
def test_each_preset_has_its_size_and_one_role_per_parameter(name):
    """GPT-2's presets have the published numbers of parameters."""
    with SkipInit("meta"):
        model = GPT(GPTConfig(**preset("model", name)))
    by_role = [id(weights) for role in model.parameters_by_role().values() for weights in role.values()]
    assert sorted(by_role) == sorted(id(weights) for weights in model.parameters())
    count = sum(weights.numel() for weights in model.parameters())
    assert count == GPT2_PARAMETERS.get(name, count)


def test_roles_contain_the_parameters_they_name():
    model = GPT(replace(NANO, tie_head=False))
    roles = {role: list(members) for role, members in model.parameters_by_role().items()}
    assert roles["embedding"] == ["wte.weight", "wpe.weight"]
    assert roles["attention"] == [f"h.{n}.attn.{part}.weight" for n in (0, 1) for part in ("c_attn", "c_proj")]
    assert roles["mlp"] == [f"h.{n}.mlp.{part}.weight" for n in (0, 1) for part in ("c_fc", "c_proj")]
    assert roles["head"] == ["lm_head.weight"]
    assert all(".ln_" in name or name.startswith("ln_f") or name.endswith(".bias") for name in roles["vector"])


def test_state_dict_has_gpt2s_names():
    names = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        names |= {f"h.0.{part}.weight", f"h.0.{part}.bias"}
    assert set(GPT(replace(NANO, n_layer=1)).state_dict()) == names


def test_the_modern_state_dict_has_no_rotary_table_or_norms():
    names = {"wte.weight", "ngram.table.weight", "lm_head.weight"}
    names |= {f"h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert set(GPT(replace(MODERN, n_layer=1)).state_dict()) == names


def test_llamas_mlp_multiplies_by_a_gate():
    mlp = randomized(SMALL["qwen3"]).double().h[0].mlp
    assert mlp.c_gate.weight.shape == mlp.c_fc.weight.shape == (96, 32)
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).view(2, 32)
    gate = x @ mlp.c_gate.weight.T
    expected = (gate / (1 + (-gate).exp()) * (x @ mlp.c_fc.weight.T)) @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-12)


@every_small
def test_tensors_of_the_state_dict_share_no_memory(config):
    """safetensors does not support shared memory, so a tied head has no entry."""
    state = GPT(config).state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert ("lm_head.weight" in state) == (not config.tie_head)


# Invalid values


@pytest.mark.parametrize(("changes", "named"), [
    ({"n_layer": 0}, "n_layer=0"),
    ({"n_head": 0}, "n_head=0"),
    ({"n_embd": 0, "parametrization": "mup"}, "n_embd=0"),
    ({"block_size": -1}, "block_size=-1"),
    ({"n_embd": 33}, "n_embd=33"),
    ({"n_embd": 30, "position": "rotary"}, "heads of width 15"),
    ({"dropout": 1.5}, "dropout=1.5"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"),
    ({"dropout": math.nan}, "dropout=nan"),
    ({"n_head": 4, "n_kv_head": 3}, "n_kv_head=3"),
    ({"n_kv_head": 0}, "n_kv_head=0"),
    ({"n_kv_head": -1}, "n_kv_head=-1"),
], ids=str)
def test_an_invalid_value_is_one_problem_that_names_it(changes, named):
    problems = list(replace(NANO, **changes).problems())
    assert len(problems) == 1
    assert named in problems[0]


def test_an_invalid_config_raises_with_all_problems():
    with pytest.raises(ValueError) as caught:
        GPT(replace(NANO, n_embd=33, dropout=1.5, n_kv_head=3))
    assert all(part in str(caught.value) for part in ("n_embd=33", "n_embd=34", "dropout=1.5", "n_kv_head=3"))


def test_a_context_longer_than_block_size_is_an_error():
    model = GPT(NANO)
    with pytest.raises(ValueError, match=r"33 tokens.*block_size=32"):
        model(random_ids(1, 33))
    cache = KVCache(NANO, 1)
    model(random_ids(1, 30), cache=cache)
    with pytest.raises(ValueError, match=r"33 tokens.*block_size=32"):
        model(random_ids(1, 3), cache=cache)


# Initialization


def test_initial_weights_have_gpt2s_standard_deviations():
    model = GPT(replace(NANO, vocab_size=512, block_size=256, n_embd=128))
    for name, weights in model.named_parameters():
        if name.endswith("bias"):
            assert not weights.any()
        elif weights.dim() == 1:
            assert (weights == 1).all()
        else:
            # Two layers have four projections into the residual stream.
            expected = 0.02 / math.sqrt(4) if name.endswith("c_proj.weight") else 0.02
            assert weights.std().item() == pytest.approx(expected, rel=0.03), name


def test_the_initial_loss_with_a_zero_head_is_ln_v():
    idx, targets = (random_ids(2, 16, seed=seed) for seed in (0, 1))
    assert GPT(MODERN)(idx, targets).item() == pytest.approx(math.log(V), rel=1e-6)


def test_the_initial_loss_of_gpt2_is_a_little_above_ln_v():
    """The loss is log(sum of exp z) - z_target, with z = f . wte and f the normalized residual stream.

    f has C coordinates of mean square 1, and a row of wte has standard deviation 0.02, so a logit is normal with variance
    s2 = C * 0.02^2. A random target's logit is 0 on average, and V such logits have a mean exponential of e^(s2/2):
    the loss is at least ln V + s2/2. The tied head adds one term: f contains the input token's own embedding, divided by
    the standard deviation s of the stream, so that token's logit is about C * 0.02^2 / s. Since wte and wpe alone make
    s = 0.02 * sqrt(2) and the blocks only add to it, that logit is at most C * 0.02 / sqrt(2).
    The mean over N random targets has the standard error sqrt(s2 / N); four of these are allowed on both sides.
    """
    config = replace(NANO, vocab_size=1024, n_embd=256, block_size=64)
    torch.manual_seed(0)
    idx, targets = (random_ids(32, 64, vocab_size=1024, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        loss = GPT(config)(idx, targets).item()
    s2, own = 256 * 0.02**2, 256 * 0.02 / math.sqrt(2)
    tolerance = 4 * math.sqrt(s2 / targets.numel())
    assert tolerance < s2 / 2  # otherwise ln V would pass too
    assert math.log(1024) + s2 / 2 - tolerance < loss < math.log(1024 * math.exp(s2 / 2) + math.exp(own)) + tolerance


@every_small
def test_with_zero_init_each_block_is_the_identity(config):
    model = GPT(replace(config, zero_init=True))
    x = torch.randn(2, 8, config.n_embd)
    rotary = model.rotary[:, :8] if config.position == "rotary" else None
    for block in model.h:
        assert torch.equal(block(x, rotary), x)


# Forward and loss


@every_small
def test_logits_depend_on_earlier_tokens_only(config):
    model = randomized(config)
    idx = random_ids(2, 12)
    with torch.no_grad():
        before = model(idx)
        for t in range(12):
            changed = idx.clone()
            changed[:, t] = (idx[:, t] + 1) % V
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any(-1).all()


def plain_gpt2(weights: dict[str, Tensor], idx: Tensor, n_layer: int, n_head: int) -> Tensor:
    """GPT-2's logits `[T, V]` for one row of ids, from the published equations."""
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    T = len(idx)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = weights["wte.weight"][idx] + weights["wpe.weight"][:T]
    for layer in range(n_layer):
        q, k, v = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").chunk(3, dim=-1)
        heads = []
        for qh, kh, vh in zip(q.chunk(n_head, -1), k.chunk(n_head, -1), v.chunk(n_head, -1), strict=True):
            scores = (qh @ kh.T / math.sqrt(qh.size(-1))).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ vh)
        x = x + linear(torch.cat(heads, -1), f"h.{layer}.attn.c_proj")
        y = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def test_logits_equal_a_plain_gpt2():
    model = randomized(SMALL["gpt2"]).double()
    idx = random_ids(2, 32)
    expected = torch.stack([plain_gpt2(model.state_dict(), row, n_layer=2, n_head=2) for row in idx])
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=1e-9)


def test_logits_equal_a_plain_modern_model():
    """The differences from GPT-2 outside attention: n-grams, norms, squared ReLU, untied head."""
    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    model = randomized(SMALL["modern"]).double()
    idx = random_ids(2, 32)
    x = norm(model.wte.weight[idx] + model.ngram(idx))
    for block in model.h:
        x = x + block.attn(norm(x), model.rotary)
        x = x + (norm(x) @ block.mlp.c_fc.weight.T).clamp(min=0) ** 2 @ block.mlp.c_proj.weight.T
    torch.testing.assert_close(model(idx), norm(x) @ model.lm_head.weight.T, rtol=0, atol=1e-9)


@every_small
def test_chunks_with_a_cache_have_the_logits_of_one_pass(config):
    model = randomized(config).double()
    idx, cache = random_ids(2, 32), KVCache(config, 2, dtype=torch.float64)
    chunks = [model(chunk, cache=cache) for chunk in idx.split((7, 1, 1, 10, 13), dim=1)]
    assert cache.length == 32
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(idx), rtol=0, atol=1e-9)


@every_small
def test_the_loss_is_the_cross_entropy_of_the_logits(config):
    model = randomized(config)
    idx, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    logits = model(idx)
    assert logits.shape == (2, 12, V)
    loss = model(idx, targets)
    of_targets = logits.softmax(-1).gather(-1, targets[..., None]).log()
    assert loss.shape == ()
    torch.testing.assert_close(loss, -of_targets.mean())
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_the_gradient_of_the_head_follows_the_formula():
    """Probabilities less one-hot targets, times features."""
    model = randomized(SMALL["modern"])
    idx, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    model(idx, targets).backward()
    with torch.no_grad():
        difference = model(idx).softmax(-1) - F.one_hot(targets, V)
        expected = torch.einsum("btv,btc->vc", difference, model.features(idx)) / targets.numel()
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)


@every_small
def test_gradients_equal_finite_differences(config):
    """A small step along a parameter's gradient changes the loss by step * |gradient|: a central difference."""
    model = randomized(config).double()
    idx, targets = random_ids(2, 12), random_ids(2, 12, seed=1)

    def loss() -> Tensor:  # written out, because the model's own is rounded to float32
        return -model(idx).log_softmax(-1).gather(-1, targets[..., None]).mean()

    model(idx, targets).backward()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            size = weights.grad.norm()
            step = 1e-4 * weights.grad / size
            weights += step
            above = loss()
            weights -= 2 * step
            below = loss()
            weights += step
            assert ((above - below) / 2e-4).item() == pytest.approx(size.item(), rel=1e-4), name


def test_dropout_acts_in_training_only():
    idx = random_ids(2, 12)
    model = randomized(replace(NANO, dropout=0.5))
    assert torch.equal(model(idx), randomized(SMALL["gpt2"])(idx))
    for dropouts in ([model.drop], [block.mlp.dropout for block in model.h]):
        model.eval()
        for dropout in dropouts:
            dropout.train()
        assert not torch.equal(model(idx), model(idx))


@every_small
def test_bf16_autocast_stays_near_fp32(config):
    """bfloat16 rounds by up to 2^-9 of a value, about 12 times per layer, and the errors add up like a random walk.

    Over two layers that is 2^-9 * sqrt(24), 1% of the logits' standard deviation; 2% is allowed. The loss is fp32.
    """
    model = randomized(config)
    idx = random_ids(4, 32)
    with torch.no_grad():
        exact = model(idx)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, loss = model(idx), model(idx, idx)
    assert rounded.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert (rounded - exact).std() < 0.02 * exact.std()


@every_small
def test_flops_per_token_equal_those_that_torch_counts(config, monkeypatch):
    """All matrix products of forward and backward over a full context.

    The math backend computes attention with matrix products, which the counter knows.
    """
    monkeypatch.setattr(linear, "onednn_is_faster", lambda x: False)  # the counter does not know oneDNN's products
    model = GPT(config)
    idx = random_ids(2, config.block_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == model.flops_per_token() * idx.numel()


@pytest.mark.parametrize(("activation", "expected"), [
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("gelu_erf", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    ("relu2", lambda x: torch.where(x > 0, x, 0) ** 2),
])
def test_activations_equal_their_formulas(activation, expected):
    mlp = MLP(GPTConfig(n_embd=8, activation=activation)).double()
    x = torch.linspace(-3, 3, 16, dtype=torch.float64).view(2, 8)
    torch.testing.assert_close(mlp(x), mlp.c_proj(expected(mlp.c_fc(x))), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_has_the_same_gradients_and_keeps_less(dropout):
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=4, n_head=2, n_embd=8, dropout=dropout))
        gpt.recompute = recompute
        idx, saved = torch.arange(8)[None] % 11, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = gpt(idx, idx)
        loss.backward()
        found.append([weights.grad for weights in gpt.parameters()])
        kept.append(sum(saved))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[1] < 0.5 * kept[0]
