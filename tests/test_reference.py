"""The attention lineage: each class is proved equal to the one before it, forward and in its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from model.attention import CausalSelfAttention
from model.config import GPTConfig
from model.reference import (
    CausalAttention,
    CausalMechanismV1,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    SelfAttention_v1,
    SelfAttention_v2,
    fuse,
    unfuse,
)

B, T, C, H = 3, 7, 12, 3
CAUSAL = {
    "CausalAttention": lambda **more: CausalAttention(C, C, T, **{"dropout": 0.0, **more}),
    "CausalMechanismV1": lambda **more: CausalMechanismV1(C, C, T, **{"dropout": 0.0, **more}),
    "MultiHeadAttentionWrapper": lambda **more: MultiHeadAttentionWrapper(C, C, T, **{"dropout": 0.0, "num_heads": H, **more}),
    "MultiHeadAttention": lambda **more: MultiHeadAttention(C, C, T, **{"dropout": 0.0, "num_heads": H, **more}),
}


def double(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with weights so large that attention is far from even."""
    torch.manual_seed(0)
    for weights in module.parameters():
        nn.init.normal_(weights, std=0.5)
    return module.double().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def agree(a: Tensor, b: Tensor, x: Tensor, weights: list[tuple[Tensor, Tensor]] = (), atol: float = 1e-10) -> None:
    """Two outputs for the same `x` are equal, and so are the gradients of `x` and of each pair of weights."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
    direction = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(2))
    gradients = []
    for output, which in ((a, 0), (b, 1)):
        wanted = [x, *(pair[which] for pair in weights)]
        gradients.append(torch.autograd.grad((output * direction).sum(), wanted, retain_graph=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other.T if one.shape != other.shape else other, rtol=0, atol=atol)


# Published numbers (Raschka, "Build a Large Language Model (From Scratch)", chapter 3): the first rows under fixed seeds

WORDS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64], [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])


@pytest.mark.parametrize("seed, make, first, last", [
    (123, lambda: SelfAttention_v1(3, 2), [0.2996, 0.8053], [0.2990, 0.8040]),
    (789, lambda: SelfAttention_v2(3, 2), [-0.0739, 0.0713], [-0.0754, 0.0693]),
    (123, lambda: CausalAttention(3, 2, 6, 0.0), [-0.4519, 0.2216], [-0.5299, -0.1081]),
    (123, lambda: CausalMechanismV1(3, 2, 6, 0.0), [-0.4519, 0.2216], [-0.5299, -0.1081]),
    (123, lambda: MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2), [-0.4519, 0.2216, 0.4772, 0.1063], [-0.5299, -0.1081, 0.5077, 0.3493]),
    (123, lambda: MultiHeadAttention(3, 2, 6, 0.0, 2), [0.3190, 0.4858], [0.2575, 0.4028]),
], ids=["v1", "v2", "causal", "mechanism", "wrapper", "multi-head"])
def test_outputs_equal_the_published_numbers(seed, make, first, last):
    torch.manual_seed(seed)
    attention = make().eval()
    x = WORDS if type(attention) in (SelfAttention_v1, SelfAttention_v2) else torch.stack((WORDS, WORDS))
    rows = attention(x) if x.dim() == 2 else attention(x)[1]
    torch.testing.assert_close(rows[[0, -1]], torch.tensor([first, last]), rtol=0, atol=6e-5)


# Each class from the one before


def test_v1_equals_v2_with_the_same_weights():
    one, two = double(SelfAttention_v1(C, 5)), double(SelfAttention_v2(C, 5))
    pairs = [(getattr(one, name), getattr(two, name).weight) for name in ("W_query", "W_key", "W_value")]
    with torch.no_grad():
        for bare, linear in pairs:
            linear.copy_(bare.T)
    x = inputs(T, C)
    agree(one(x), two(x), x, pairs)


def test_v1_equals_the_equation_written_as_loops():
    one = double(SelfAttention_v1(C, 5))
    x = inputs(T, C)
    _, weights = one(x, return_weights=True)
    q, k, v = x @ one.W_query, x @ one.W_key, x @ one.W_value
    for t in range(T):
        fits = [math.exp((q[t] @ k[s]).item() / math.sqrt(5)) for s in range(T)]
        assert weights[t].tolist() == pytest.approx([fit / sum(fits) for fit in fits], abs=1e-12)
        expected = sum(fit / sum(fits) * v[s] for s, fit in enumerate(fits))
        torch.testing.assert_close(one(x)[t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [CausalAttention, CausalMechanismV1])
def test_causal_attention_at_t_is_v2_on_the_first_t(kind, bias):
    causal, free = double(kind(C, 5, T, 0.0, bias)), double(SelfAttention_v2(C, 5, bias))
    free.load_state_dict({name: tensor for name, tensor in causal.state_dict().items() if name != "mask"})
    pairs = list(zip((weights for weights in causal.parameters()), free.parameters(), strict=True))
    x = inputs(1, T, C)
    agree(causal(x)[0], torch.stack([free(x[0, : t + 1])[-1] for t in range(T)]), x, pairs)


@pytest.mark.parametrize("lengths", [[7, 4, 1], [7, 7, 7], [2, 0, 5], [0, 0, 0]], ids=str)
def test_a_padded_batch_equals_its_sequences_one_by_one(lengths):
    attention = double(CausalMechanismV1(C, 5, T, 0.0, True))
    x = inputs(B, T, C)
    together, weights = attention(x, torch.tensor(lengths), return_weights=True)
    alone = [torch.cat((attention(x[b:b + 1, :n])[0] if n else x.new_zeros(0, 5), x.new_zeros(T - n, 5))) for b, n in enumerate(lengths)]
    if any(lengths):
        agree(together, torch.stack(alone), x, [(w, w) for w in attention.parameters()])
    for b, n in enumerate(lengths):
        assert not weights[b, :, n:].any() and not weights[b, n:].any() and not together[b, n:].any()
    gradient = torch.autograd.grad(together.sum(), x)[0]
    assert gradient.isfinite().all() and not any(gradient[b, n:].any() for b, n in enumerate(lengths))


def test_the_content_of_padding_has_no_effect():
    attention = double(CausalMechanismV1(C, 5, T, 0.0))
    x, lengths = inputs(B, T, C).detach(), torch.tensor([3, 0, 7])
    clean = attention(x, lengths)
    for rubbish in (1e6, math.inf, math.nan):
        dirty = x.clone()
        dirty[0, 3:], dirty[1] = rubbish, rubbish
        assert torch.equal(attention(dirty, lengths), clean)


def test_each_head_of_the_wrapper_is_causal_attention():
    wrapper = double(MultiHeadAttentionWrapper(C, 4, T, 0.0, H, True))
    x = inputs(B, T, C)
    agree(wrapper(x), torch.cat([head(x) for head in wrapper.heads], dim=-1), x, [(w, w) for w in wrapper.parameters()])
    assert len(wrapper.heads) == H and all(type(head) is CausalAttention for head in wrapper.heads)


def test_the_output_of_v2_is_its_weights_times_the_values():
    attention, x = double(SelfAttention_v2(C, 5)), inputs(T, C)
    context, weights = attention(x, return_weights=True)
    agree(context, weights @ attention.W_value(x), x)


def test_the_wrapper_is_multi_head_attention_before_out_proj():
    wrapper, attention = double(MultiHeadAttentionWrapper(C, 4, T, 0.0, H, True)), double(MultiHeadAttention(C, 4 * H, T, 0.0, H, True))
    names = [f"{matrix}.{part}" for matrix in ("W_query", "W_key", "W_value") for part in ("weight", "bias")]
    with torch.no_grad():
        for name in names:
            attention.get_parameter(name).copy_(torch.cat([head.get_parameter(name) for head in wrapper.heads]))
        attention.out_proj.weight.copy_(torch.eye(4 * H))
        attention.out_proj.bias.zero_()
    x = inputs(B, T, C)
    (one, one_weights), (other, other_weights) = wrapper(x, return_weights=True), attention(x, return_weights=True)
    agree(one, other, x)
    agree(one_weights, other_weights, x)
    direction = torch.randn(one.shape, dtype=one.dtype)
    (one * direction).sum().backward(retain_graph=True)
    (other * direction).sum().backward()
    for name in names:
        stacked = torch.cat([head.get_parameter(name).grad for head in wrapper.heads])
        torch.testing.assert_close(attention.get_parameter(name).grad, stacked, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_equals_fused_both_ways(bias):
    attention = double(MultiHeadAttention(C, C, T, 0.0, H, bias))
    x = inputs(B, T, C)
    fused = fuse(attention)
    agree(attention(x), fused(x), x, [(attention.out_proj.weight, fused.c_proj.weight), (attention.out_proj.bias, fused.c_proj.bias)])
    again = unfuse(fused, T)
    agree(attention(x), again(x), x, [(attention.get_parameter(name), again.get_parameter(name))
                                      for name in ("W_query.weight", "W_key.weight", "W_value.weight", "out_proj.weight")])
    assert all(torch.equal(weights, again.get_parameter(name)) for name, weights in attention.named_parameters())


def test_the_fused_gradient_is_the_three_gradients_stacked():
    attention = double(MultiHeadAttention(C, C, T, 0.0, H, True))
    fused, x = fuse(attention), inputs(B, T, C)
    (attention(x) ** 2).sum().backward()
    (fused(x) ** 2).sum().backward()
    for part in ("weight", "bias"):
        stacked = torch.cat([getattr(matrix, part).grad for matrix in (attention.W_query, attention.W_key, attention.W_value)])
        torch.testing.assert_close(getattr(fused.c_attn, part).grad, stacked, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_kv_head", [None, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_attention_equals_multi_head_attention(n_kv_head, bias):
    fused = double(CausalSelfAttention(GPTConfig(block_size=T, n_head=4, n_embd=16, n_kv_head=n_kv_head, bias=bias)))
    x = inputs(B, T, 16)
    agree(fused(x), unfuse(fused, T)(x), x)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
def test_in_lower_precision_they_are_equal_up_to_rounding(dtype, atol):
    """Outputs are about 1; a step of float32 there is 1e-7, of bfloat16 8e-3, and sums of tens of them are compared."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(64, 64, 32, 0.0, 4, True).eval()
    for weights in attention.parameters():
        nn.init.normal_(weights, std=0.15)
    attention, x = attention.to(dtype), torch.randn(2, 32, 64).to(dtype)
    one, other = attention(x), fuse(attention)(x)
    assert one.dtype == other.dtype == dtype and 0.5 < one.float().std() < 2
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


# What holds for all


@pytest.mark.parametrize("name", CAUSAL)
def test_weights_sum_to_one_and_are_zero_for_later_positions(name):
    _, weights = double(CAUSAL[name]())(inputs(B, T, C), return_weights=True)
    assert weights.shape == ((B, H, T, T) if "Multi" in name else (B, T, T))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert not weights.triu(1).any() and (weights.tril() > 0).sum() == weights.numel() // (T * T) * T * (T + 1) // 2


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_depend_on_earlier_positions_only(name, dtype):
    attention, x = double(CAUSAL[name]()).to(dtype), inputs(B, T, C).detach().to(dtype)
    before = attention(x)
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        after = attention(changed)
        assert torch.equal(after[:, :t], before[:, :t]) and (after[:, t:] != before[:, t:]).any(-1).all()


def test_masking_after_the_softmax_leaks_the_future():
    """Weights that were divided by a sum over the future change with it. To divide again by what is left undoes that."""
    attention = double(CausalAttention(C, C, T, 0.0))
    x = inputs(1, T, C).detach()
    changed = x.clone()
    changed[:, -1] += 1

    def masked_after(x: Tensor, divided_again: bool) -> Tensor:
        q, k, v = attention.W_query(x), attention.W_key(x), attention.W_value(x)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(C), dim=-1).tril()
        return (weights / weights.sum(-1, keepdim=True) if divided_again else weights) @ v

    def leak(call):
        return (call(changed) - call(x))[:, :-1].abs().max() / call(x)[:, :-1].std()

    assert leak(lambda x: masked_after(x, divided_again=False)) > 0.1
    assert leak(attention) == 0
    assert leak(lambda x: masked_after(x, divided_again=True)) < 1e-12
    torch.testing.assert_close(masked_after(x, divided_again=True), attention(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
def test_inputs_longer_than_context_length_are_an_error(name):
    attention = double(CAUSAL[name]())
    x = inputs(B, T, C)
    torch.testing.assert_close(attention(x[:, :3]), attention(x)[:, :3], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"8 positions .* context_length=7"):
        attention(inputs(B, T + 1, C))


def test_invalid_widths_heads_and_lengths_are_errors():
    with pytest.raises(ValueError, match=r"d_out=10 is not divisible by num_heads=3"):
        MultiHeadAttention(C, 10, T, 0.0, 3)
    attention = CausalMechanismV1(C, 5, T, 0.0)
    for lengths in ([8, 1, 1], [-1, 1, 1]):
        with pytest.raises(ValueError, match=r"between 0 and 7, the positions"):
            attention(torch.zeros(B, T, C), torch.tensor(lengths))
    for lengths in (torch.tensor([1, 2]), torch.tensor([[1, 2, 3]]), torch.tensor([1.0, math.nan, 2.0])):
        with pytest.raises(ValueError, match=r"a batch of 3 needs integers of the shape \[3\]"):
            attention(torch.zeros(B, T, C), lengths)
    for kind in (MultiHeadAttention, MultiHeadAttentionWrapper):
        with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
            kind(C, C, T, 0.0, 0)
    with pytest.raises(ValueError, match="d_in=12 and d_out=6 must be equal"):
        fuse(MultiHeadAttention(C, 6, T, 0.0, 3))
    with pytest.raises(ValueError, match="qk_norm"):
        unfuse(CausalSelfAttention(GPTConfig(n_head=4, n_embd=16, qk_norm=True)), T)


@pytest.mark.parametrize("name", CAUSAL)
def test_dropout_acts_in_training_on_unreturned_weights(name):
    attention, x = double(CAUSAL[name](dropout=0.5)), inputs(B, T, C)
    quiet, weights = attention(x, return_weights=True)
    assert torch.equal(quiet, attention(x)) and torch.equal(quiet, double(CAUSAL[name]())(x))
    attention.train()
    loud, also = attention(x, return_weights=True)
    assert not torch.equal(loud, attention(x)) and torch.equal(weights, also)


def test_the_mechanism_has_dropout_on_context_vectors():
    x = torch.ones(1, 400, C, dtype=torch.float64)
    attention = double(CausalMechanismV1(C, 50, 400, 0.25)).train()
    assert (attention(x)[0, 300:] == 0).double().mean() == pytest.approx(0.25, abs=0.03)  # with weights alone, none would be 0


def test_the_mechanism_has_dropout_on_weights():
    """A single position attends to itself alone: dropout on its weight empties the whole row, and doubles it otherwise."""
    attention, x = double(CausalMechanismV1(C, 50, T, 0.5)), torch.ones(400, 1, C, dtype=torch.float64)
    rows = attention.train()(x)[:, 0]
    assert (rows == 0).all(-1).double().mean() == pytest.approx(0.5, abs=0.1)


def test_the_mask_is_a_buffer():
    attention = CausalAttention(C, C, T, 0.0)
    assert "mask" in attention.state_dict() and len(list(attention.parameters())) == 3


@pytest.mark.parametrize("training", [True, False])
def test_fuse_and_unfuse_keep_dropout_and_mode_and_copy(training):
    attention = double(MultiHeadAttention(C, C, T, 0.3, H, True)).train(training)
    fused = fuse(attention)
    again = unfuse(fused, T)
    assert fused.training is again.training is training and fused.dropout == again.dropout.p == 0.3
    before = fused(inputs(B, T, C)) if not training else None
    for weights in (*attention.parameters(), *again.parameters()):
        weights.data.zero_()
    assert training or torch.equal(fused(inputs(B, T, C)), before)


def test_parameters_are_initialized_in_a_fixed_order():
    torch.manual_seed(5)
    ours = MultiHeadAttention(C, C, T, 0.0, H, True)
    torch.manual_seed(5)
    theirs = [nn.Linear(C, C) for _ in range(4)]
    for layer, name in zip(theirs, ("W_query", "W_key", "W_value", "out_proj"), strict=True):
        assert torch.equal(layer.weight, ours.get_parameter(f"{name}.weight")) and torch.equal(layer.bias, ours.get_parameter(f"{name}.bias"))
    torch.manual_seed(5)
    bare = SelfAttention_v1(C, 4)
    torch.manual_seed(5)
    assert all(torch.equal(torch.rand(C, 4), getattr(bare, name)) for name in ("W_query", "W_key", "W_value"))
