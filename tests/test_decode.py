"""Decoding: the copy, its products and its cache give what the model gives, in the memory they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from conf.schema import compose
from model import caches, decode
from model.caches import PackedCache, RaggedCache, SteadyCache
from model.config import GPTConfig
from model.decode import Decoder, kind_of_cache
from model.generate import steps, uncached_logits
from model.gpt import GPT
from model.packed import can_copy, cast, decoding_copy
from model.kernels import product as packed

V = 96
SHAPES = {
    "gpt2": {},
    "modern": {"position": "rotary", "norm": "rms", "qk_norm": True, "bias": False, "tie_head": False, "activation": "relu2"},
    "grouped": {"position": "rotary", "n_kv_head": 2},
    "one group": {"n_kv_head": 1, "tie_head": False},
    "n-grams": {"position": "rotary", "ngrams": 4, "ngram_rows": 50, "embedding_norm": True},
}
every_shape = pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES.keys())


def make(block_size: int = 16, **flags: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=V, n_layer=2, n_head=4, n_embd=32, **flags)).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, mean=float(weights.dim() == 1), std=0.2)
    return model


def texts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


class Traced:
    """A `Recording` on a CPU: the tensor operations of a call, with the very tensors that it used, and no Python of its own."""

    made = 0

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        Traced.made += 1
        self.graph = make_fx(lambda _: call())(torch.zeros(()))

    def play(self) -> Tensor:
        return self.graph(torch.zeros(()))


@pytest.fixture
def steady(monkeypatch):
    """A CPU decodes as a GPU does."""
    monkeypatch.setattr(decode, "kind_of_cache", lambda model: SteadyCache)
    monkeypatch.setattr(decode, "Recording", Traced)
    monkeypatch.setattr(caches, "STEADY", 8)
    monkeypatch.setattr(Traced, "made", 0)


@every_shape
@pytest.mark.parametrize("lengths", [(5,), (16, 1, 9), (3, 3, 40, 15, 7, 1, 2, 16, 5, 11, 30)], ids=str)
@pytest.mark.parametrize(("kind", "block"), [(PackedCache, 128), (PackedCache, 5), (SteadyCache, 128), (RaggedCache, 128)])
def test_logits_are_those_without_a_cache(flags, lengths, kind, block, monkeypatch, request):
    """By an uncached pass at every step, for one row, few and many, by the copies and by the model itself."""
    model = make(**flags)
    monkeypatch.setattr(Traced, "made", 0)
    monkeypatch.setattr(caches, "BLOCK", block)
    if kind is SteadyCache:
        request.getfixturevalue("steady")
    if kind is RaggedCache:
        monkeypatch.setattr(decode, "kind_of_cache", lambda model: RaggedCache)
    decoder = Decoder(model, len(lengths))
    assert decoder.kind is kind and (decoder.reader is model) == (kind is RaggedCache)
    seen = [list(text) for text in texts_of(*lengths)]
    for _, tokens, logits in steps(model, texts_of(*lengths), 24, decoder=decoder):
        torch.testing.assert_close(logits, uncached_logits(model, seen), rtol=1e-4, atol=1e-4)
        for text, token in zip(seen, tokens.tolist(), strict=True):
            text.append(token)
    assert (Traced.made > 0) == (kind is SteadyCache)


@every_shape
@pytest.mark.parametrize("kind", [PackedCache, SteadyCache, RaggedCache, None])
def test_rows_that_are_done_leave_the_others_as_they_were(flags, kind, monkeypatch, request):
    """The first, the last, two at once, one whose window moves; at last all of them. None: without a cache."""
    model, lengths = make(**flags), (3, 40, 15, 3, 9)
    if kind is SteadyCache:
        request.getfixturevalue("steady")
    if kind is RaggedCache:
        monkeypatch.setattr(decode, "kind_of_cache", lambda model: RaggedCache)
    leave, done = {2: [0], 4: [4], 11: [1, 2], 16: [3]}, set()
    decoder = Decoder(model, len(lengths)) if kind else None
    seen, counts = [list(text) for text in texts_of(*lengths)], []
    for step, (rows, tokens, logits) in enumerate(steps(model, texts_of(*lengths), 24, use_cache=bool(kind), decoder=decoder, done=done)):
        torch.testing.assert_close(logits, uncached_logits(model, [seen[row] for row in rows]), rtol=1e-4, atol=1e-4)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            seen[row].append(token)
        done.update(leave.get(step, []))
        counts.append(len(rows))
    assert counts == ([5] * 17 if kind is SteadyCache else [5] * 3 + [4] * 2 + [3] * 7 + [1] * 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_decoder_needs_nobody_to_switch_gradients_off(precision):
    decoder = Decoder(make(), 1, precision)
    decoder.begin(texts_of(3), 2)
    assert not decoder.next_logits(texts_of(3)).requires_grad


def test_a_row_that_takes_another_place_is_not_read_again(monkeypatch):
    """Of 3 and 17 tokens in a block of 16, the latter with a window that has moved."""
    decoder, read = Decoder(make(), 2), []
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda *arguments: read.append(arguments[0]) or prefill(*arguments))
    assert [rows for rows, _, _ in steps(decoder.model, texts_of(3, 17), 4, decoder=decoder, done=[0])] == [[0, 1], [1], [1], [1]]
    assert read == [0, 1]


@every_shape
@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.03), ("int8", 0.12)])
@pytest.mark.parametrize("rows", [1, 12])
def test_with_fewer_bits_logits_are_near(flags, precision, most, rows):
    model = make(**flags)
    seen, prompts = texts_of(*[9] * rows), texts_of(*[9] * rows)
    decoder = Decoder(model, rows, precision)
    for _, tokens, logits in steps(model, prompts, 12, decoder=decoder, temperature=0):
        assert decoder.cache.values[0].dtype == torch.float16
        exact = uncached_logits(model, seen)
        assert 0 < (logits - exact).std() / exact.std() < most
        for text, token in zip(seen, tokens.tolist(), strict=True):
            text.append(token)


def test_a_step_is_recorded_once_for_as_many_positions_as_look_alike(steady):
    """Of 24 positions: 5 to 7 (the first step sets up, the second is recorded), 8 to 15, 16 to 23."""
    decoder, ends = Decoder(make(block_size=24), 1), []
    for _ in steps(decoder.model, texts_of(5), 19, decoder=decoder):
        ends.append(decoder.cache.end)
    assert ends == [8] * 4 + [16] * 8 + [24] * 7 and Traced.made == 3


def test_recordings_are_of_use_to_the_next_texts_that_fit_their_cache(steady):
    model = make(block_size=24)
    decoder, memory = Decoder(model, 2), []
    for lengths, made in (((5, 9), 2), ((2, 13), 2), ((9, 1), 2), ((3, 3), 3)):  # 9 to 15 and 16 to 20; the last have 3 to 7 too
        seen = texts_of(*lengths)
        for _, tokens, logits in steps(model, texts_of(*lengths), 9 if 13 in lengths else 12, decoder=decoder):
            torch.testing.assert_close(logits, uncached_logits(model, seen), rtol=1e-4, atol=1e-4)
            for text, token in zip(seen, tokens.tolist(), strict=True):
                text.append(token)
        memory.append([each.data_ptr() for each in (decoder.last, decoder.cache.positions, *decoder.cache.keys)])
        assert Traced.made == made and memory[-1] == memory[0]
    decoder.begin([[1]], 9)
    assert not decoder.recordings, "one row is another shape"
    decoder.begin([[1]], 24)
    assert not decoder.recordings and decoder.cache.keys[0].size(2) == 24


@pytest.mark.parametrize("late", [False, True])
def test_a_gpu_that_cannot_record_goes_on_without(late, steady, monkeypatch):
    """To the last position of the block, whether the recording failed before the step or behind it."""
    def fail(call: Callable[[], Tensor], device: torch.device) -> None:
        if late:
            call()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode, "Recording", fail)
    monkeypatch.setattr(caches, "STEADY", 1)
    model = make()
    decoder, seen = Decoder(model, 1), texts_of(16)
    monkeypatch.setattr(SteadyCache, "begin_step", set_up_before(SteadyCache.begin_step, decoder))
    with pytest.warns(UserWarning, match="could not record a step.*not permitted"):
        for _, tokens, logits in steps(model, texts_of(16), 2, decoder=decoder):
            torch.testing.assert_close(logits, uncached_logits(model, seen), rtol=1e-4, atol=1e-4)
            seen[0].append(tokens.item())


def set_up_before(begin_step: Callable[[SteadyCache], None], decoder: Decoder) -> Callable[[SteadyCache], None]:
    """Every step is one to record."""
    def begin(cache: SteadyCache) -> None:
        begin_step(cache)
        decoder.warm.add(cache.end)
    return begin


@pytest.mark.parametrize("kind", [SteadyCache, RaggedCache])
def test_kernels_may_lay_out_what_they_give_as_they_like(kind, monkeypatch):
    """As those on GPUs do with grouped heads."""
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(decode, "kind_of_cache", lambda model: kind)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **more: plain(*args, **more).transpose(1, 2).contiguous().transpose(1, 2))
    model = make(position="rotary", n_kv_head=2)
    decoder, seen = Decoder(model, 2), texts_of(5, 9)
    decoder.records = False
    _, _, logits = next(steps(model, texts_of(5, 9), 1, decoder=decoder))
    torch.testing.assert_close(logits, uncached_logits(model, seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("size", [(24, 32), (53, 32), (50257, 16)], ids=str)
def test_a_product_is_a_linear_layer(precision, rows, size):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(size), torch.randn(size[0]), torch.randn(rows, 1, size[1])
    expected = F.linear(x, weight, bias)
    y = packed(weight, bias, rows, precision)(x)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert (y - expected).std() / expected.std() < {"fp32": 1e-6, "bf16": 0.01, "int8": 0.02}[precision]
    torch.testing.assert_close(packed(weight, None, rows, precision)(x), y - bias, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_product_laid_out_for_one_row_takes_several(precision):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(500, 32), torch.randn(500), torch.randn(3, 1, 32)
    product = packed(weight, bias, 1, precision)
    torch.testing.assert_close(product(x), torch.cat([product(row[None]) for row in x]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_of_what_is_not_finite_nothing_finite_comes(precision, rows, number):
    assert not packed(torch.ones(8, 8), None, rows, precision)(torch.full((rows, 8), number)).isfinite().any()


def test_a_product_of_one_number_reads_it_and_nothing_else():
    weight = torch.randn(400, 1)
    torch.testing.assert_close(packed(weight, None, 1, "int8")(torch.full((1, 1), 2.0)), 2 * weight.T, rtol=0.05, atol=0.05)


def test_what_8_bits_cost_one_row_is_the_rounding_of_weights_alone():
    """A 255th of the spread of a few hundred of them, evenly distributed; what is multiplied is not rounded."""
    torch.manual_seed(0)
    weight, x = torch.randn(384, 256), torch.randn(1, 256)
    off = packed(weight, None, 1, "int8")(x) - F.linear(x, weight)
    pieces = weight.view(2, 192, 256)
    steps_of = (pieces.amax(1) - pieces.amin(1)) / 255
    expected = (steps_of.square() / 12 * x.square()).sum(1).mean().sqrt()
    assert off.std() == pytest.approx(expected.item(), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_product_is_a_linear_layer_in_fewer_bits(dtype):
    weight, bias, x = torch.randn(24, 32), torch.randn(24), torch.randn(3, 1, 32)
    y = cast(weight, bias, dtype)(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).float())


def test_weights_beyond_the_range_of_fp16_are_not_cut_off():
    weight = torch.full((8, 8), 1e5)
    torch.testing.assert_close(packed(weight, None, 1, "bf16")(torch.ones(1, 8)), torch.full((1, 8), 8e5), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_product_laid_out_for_more_rows_than_will_ever_come_is_made(precision):
    y = packed(torch.ones(8, 8), None, 10**11, precision)(torch.ones(1, 8))
    torch.testing.assert_close(y, torch.full((1, 8), 8.0), rtol=0.01, atol=0.0)


def test_the_copy_shares_what_it_does_not_lay_out_anew_and_leaves_the_model_as_it_is():
    model = make(tie_head=False).train()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    twin = decoding_copy(model, partial(packed, rows=1, precision="bf16"))
    assert twin.wte.weight is model.wte.weight and not twin.training and model.training
    assert isinstance(model.h[0].mlp.c_fc, torch.nn.Linear) and model.head.__func__ is GPT.head
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


@pytest.mark.parametrize(("kind", "dtype"), [(PackedCache, torch.float32), (PackedCache, torch.float16), (RaggedCache, torch.bfloat16)])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_the_cache_takes_what_keys_and_values_need_and_no_more(kind, dtype, groups):
    config = GPTConfig(block_size=64, vocab_size=V, n_layer=3, n_head=4, n_kv_head=groups, n_embd=32)
    cache = kind(config, 5, 48, torch.device("cpu"), dtype)
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in (*cache.keys, *cache.values)}
    assert sum(held.values()) == 2 * 3 * 5 * groups * 8 * 48 * dtype.itemsize


@pytest.mark.parametrize(("positions", "held"), [(48, 48), (128, 128), (129, 130), (300, 300), (1024, 1024)])
def test_blocks_of_keys_hold_hardly_more_positions_than_there_are_and_only_those_in_use_are_read(positions, held):
    config = GPTConfig(block_size=1024, vocab_size=V, n_layer=1, n_head=2, n_embd=16)
    cache = PackedCache(config, 3, positions, torch.device("cpu"), torch.float32)
    assert cache.keys[0].numel() == 3 * 16 * held
    cache.lengths = [0, 40, 5]
    cache.begin_step()
    assert len(cache.seen_keys) == 3 * 2 * 8 and len(cache.seen_values) == 3 * 2 * 41


@every_shape
def test_the_cache_is_made_once_and_for_no_more_positions_than_will_come(flags):
    model = make(block_size=64, **flags)
    decoder, made = Decoder(model, 2), []
    for number, _ in enumerate(steps(model, texts_of(5, 9), 20, decoder=decoder)):
        made.append([each.data_ptr() for each in (*decoder.cache.keys, *decoder.cache.values)])
        assert decoder.cache.values[0].shape[2] == 29 and made[number] == made[0]
    decoder.begin([[1]], 1000)
    assert decoder.cache.values[0].shape[2] == 64


def test_equal_prompts_are_read_once_and_no_further_than_the_last_keys_and_values():
    model, read, widths = make(block_size=32), [], []
    model.h[-1].mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    features = model.features
    model.features = lambda idx, cache: read.append(tuple(idx.shape)) or features(idx, cache)
    list(steps(model, texts_of(20) * 64 + texts_of(7), 3, decoder=(decoder := Decoder(model, 65))))
    assert decoder.kind is PackedCache and decoder.prefiller is model
    assert [shape for shape in read if shape[1] > 1] == [(1, 19), (1, 6)]
    assert set(widths) == {1}  # only the steps themselves


def test_a_flag_that_the_copy_does_not_know_leaves_decoding_to_the_model():
    @dataclass(frozen=True)
    class Later(GPTConfig):
        softcap: float = 0.0

    model = make()
    model.config = Later(**vars(model.config))
    assert can_copy(model)
    model.config = Later(**vars(model.config) | {"softcap": 15.0})
    assert not can_copy(model)
    decoder = Decoder(model, 1)
    assert decoder.reader is model and decoder.kind is RaggedCache
    assert not can_copy(make().bfloat16()) and not can_copy(make().double())
    with pytest.raises(ValueError, match="int8=true"):
        Decoder(model, 1, "int8")


@pytest.mark.parametrize("preset", ["gpt2", "modern-nano", "modern-small", "modern-char", "modern-124m"])
def test_presets_decode_fast(preset):
    config = compose("config", [f"model={preset}"]).model
    tiny = GPTConfig(**vars(config) | {"n_layer": 1, "vocab_size": V, "block_size": 16, "n_embd": 16 * config.n_head})
    assert kind_of_cache(GPT(tiny)) is PackedCache


@pytest.mark.slow
def test_transformers_says_the_same_with_the_same_weights():
    """In fp32, through the very function that the benchmark uses."""
    pytest.importorskip("transformers")
    from scripts.bench_decode import as_transformers

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=4, n_embd=32)).eval()
    prompt = torch.tensor(texts_of(9, 9))
    ours = torch.stack([tokens for _, tokens, _ in steps(model, prompt, 12, temperature=0)], dim=1)
    theirs = as_transformers(model, "fp32").generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
                                                     min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs[:, 9:], ours)
