"""Decoding: the copy, its products and its cache give what the model gives, in the memory they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conf.sampling import SamplingConfig
from generation import caches, kernels
from generation import decoder as decoding
from generation.caches import PackedCache, RaggedCache, SteadyCache
from generation.decoder import Decoder
from generation.packed import can_pack, cast, pack
from generation.sampling import generate, uncached_logits
from model.config import GPTConfig
from model.gpt import GPT

V = 96
SHAPES = {
    "gpt2": {},
    "modern": {"position": "rotary", "norm": "rms", "qk_norm": True, "bias": False, "tie_head": False, "activation": "relu2"},
    "grouped": {"position": "rotary", "n_kv_head": 2},
    "one group": {"n_kv_head": 1, "tie_head": False},
    "n-grams": {"position": "rotary", "ngrams": 4, "ngram_rows": 50, "embedding_norm": True},
    "heads of 64": {"n_embd": 128, "n_head": 2},
    "heads of 80": {"n_embd": 160, "n_head": 2, "position": "rotary"},
    "odd": {"n_embd": 15, "n_head": 3},
    "many of a group": {"n_embd": 48, "n_head": 6, "n_kv_head": 1},
}
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
every_kind = pytest.mark.parametrize("kind", [pytest.param(PackedCache, marks=needs_kernels), SteadyCache, RaggedCache, None])
every_shape = pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES.keys())


def steps(model, prompts, count, use_cache=True, decoder=None, done=(), temperature=1.0):
    rules = SamplingConfig(count, temperature=temperature, top_k=0, top_p=1.0, seed=0, cache=use_cache)
    return generate(model, prompts, rules, decoder=decoder, done=done)


def make(block_size: int = 16, **flags: object) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": block_size, "vocab_size": V, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**shape | flags)).eval()
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
    monkeypatch.setattr(decoding, "kind_of_cache", lambda model: SteadyCache)
    monkeypatch.setattr(decoding, "Recording", Traced)
    monkeypatch.setattr(caches, "STEADY", 8)
    monkeypatch.setattr(Traced, "made", 0)


@pytest.fixture
def decoder_of(monkeypatch, request):
    """Makes a `Decoder` whose cache is of a kind; None: without a copy of the model."""
    def make_decoder(model: GPT, kind: type[RaggedCache] | None) -> Decoder:
        if kind is SteadyCache:
            request.getfixturevalue("steady")
        elif kind is None:
            monkeypatch.setattr(decoding, "can_pack", lambda model: False)
        else:
            monkeypatch.setattr(decoding, "kind_of_cache", lambda model: kind)
        decoder = Decoder(model)
        assert decoder.kind is (kind or RaggedCache) and (decoder.reader is model) == (kind is None)
        return decoder
    return make_decoder


@every_shape
@pytest.mark.parametrize(("lengths", "block_size"), [
    ((5,), 16), ((16, 1, 9), 16), ((3, 3, 40, 15, 7, 1, 2, 16, 5, 11, 30), 16), ((125, 60), 140)], ids=str)
@every_kind
def test_logits_are_those_without_a_cache(flags, lengths, block_size, kind, decoder_of, monkeypatch):
    """By an uncached pass at every step, for one row, few and many, by the copies and by the model itself."""
    model = make(block_size, **flags)
    monkeypatch.setattr(Traced, "made", 0)
    decoder = decoder_of(model, kind)
    seen = [list(text) for text in texts_of(*lengths)]
    for _, tokens, logits in steps(model, texts_of(*lengths), 24, decoder=decoder):
        torch.testing.assert_close(logits, uncached_logits(model, seen), rtol=1e-4, atol=1e-4)
        for text, token in zip(seen, tokens.tolist(), strict=True):
            text.append(token)
    assert (Traced.made > 0) == (kind is SteadyCache)


@every_shape
@pytest.mark.parametrize(("kind", "use_cache"), [
    pytest.param(PackedCache, True, marks=needs_kernels), (SteadyCache, True), (RaggedCache, True), (None, True), (None, False)])
def test_rows_that_are_done_leave_the_others_as_they_were(flags, kind, use_cache, decoder_of):
    """The first, the last, two at once, one whose window moves; at last all of them."""
    model, lengths = make(**flags), (3, 40, 15, 3, 9)
    leave, done = {2: [0], 4: [4], 11: [1, 2], 16: [3]}, set()
    decoder = decoder_of(model, kind)
    seen, counts = [list(text) for text in texts_of(*lengths)], []
    for step, (rows, tokens, logits) in enumerate(steps(model, texts_of(*lengths), 24, use_cache=use_cache, decoder=decoder, done=done)):
        torch.testing.assert_close(logits, uncached_logits(model, [seen[row] for row in rows]), rtol=1e-4, atol=1e-4)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            seen[row].append(token)
        done.update(leave.get(step, []))
        counts.append(len(rows))
    assert counts == ([5] * 17 if kind is SteadyCache else [5] * 3 + [4] * 2 + [3] * 7 + [1] * 5)


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_decoder_needs_nobody_to_switch_gradients_off(precision):
    decoder = Decoder(make(), precision)
    decoder.begin(texts_of(3), 2)
    assert not decoder.next_logits(texts_of(3)).requires_grad


def test_a_row_that_takes_another_place_is_not_read_again(monkeypatch):
    """Of 3 and 17 tokens in a block of 16, the latter with a window that has moved."""
    decoder, read = Decoder(make()), []
    prefill = decoder.prefill
    monkeypatch.setattr(decoding, "prefill", lambda *arguments: read.append(arguments[0]) or prefill(*arguments))
    assert [rows for rows, _, _ in steps(decoder.model, texts_of(3, 17), 4, decoder=decoder, done=[0])] == [[0, 1], [1], [1], [1]]
    assert read == [0, 1]


@needs_kernels
@every_shape
@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.03), ("int8", 0.12)])
@pytest.mark.parametrize("rows", [1, 12])
def test_with_fewer_bits_logits_are_near(flags, precision, most, rows):
    model = make(**flags)
    seen, prompts = texts_of(*[9] * rows), texts_of(*[9] * rows)
    decoder = Decoder(model, precision)
    for _, tokens, logits in steps(model, prompts, 12, decoder=decoder, temperature=0):
        assert decoder.cache.values[0].dtype == (torch.float32 if model.config.head_width % 2 else torch.bfloat16)
        exact = uncached_logits(model, seen)
        assert 0 < (logits - exact).std() / exact.std() < most
        for text, token in zip(seen, tokens.tolist(), strict=True):
            text.append(token)


@every_shape
@pytest.mark.parametrize("kind", [SteadyCache, RaggedCache, None])
def test_under_autocast_logits_are_near(flags, kind, decoder_of, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "1")
    model = make(**flags)
    seen = texts_of(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for _, tokens, logits in steps(model, texts_of(9, 4), 12, decoder=decoder_of(model, kind), temperature=0):
            with torch.autocast("cpu", enabled=False):
                exact = uncached_logits(model, seen)
            assert 0 < (logits - exact).std() / exact.std() < 0.03
            for text, token in zip(seen, tokens.tolist(), strict=True):
                text.append(token)


class Products(TorchDispatchMode):
    """Collects the types of all that is multiplied as matrices."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "linear", "attention", "matmul")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if any(name in str(call) for name in self.NAMES):
            self.dtypes |= {each.dtype for each in args if isinstance(each, Tensor)}
        return call(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [pytest.param(PackedCache, marks=needs_kernels), RaggedCache, None])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", ["0", "1"])
def test_no_format_is_emulated_that_is_not_native(kind, use_cache, dtype, native, decoder_of, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setenv("NANOHYDRA_NATIVE_FP16", native)
    model = make()
    with torch.autocast("cpu", dtype), Products() as products:
        decoder = decoder_of(model, kind)
        list(steps(model, texts_of(9, 4), 12, decoder=decoder, use_cache=use_cache))
    if native == "0":
        assert products.dtypes == {torch.float32}
    elif not use_cache or kind is not PackedCache:
        assert dtype in products.dtypes


@needs_kernels
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_prompts_are_read_by_torchs_fastest_products(precision, monkeypatch):
    for native, dtype in (("0", torch.float32), ("1", torch.bfloat16)):
        monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
        decoder = Decoder(make(), precision)
        decoder.begin(texts_of(9), 1)
        with Products() as products:
            decoder.next_logits(texts_of(9))
        assert dtype in products.dtypes
        assert (decoder.prefiller is decoder.model) == (native == "0"), "a copy that nobody needs"


def test_a_step_is_recorded_once_for_as_many_positions_as_look_alike(steady):
    """Of 24 positions: 5 to 7 (the first step sets up, the second is recorded), 8 to 15, 16 to 23."""
    decoder, ends = Decoder(make(block_size=24)), []
    for _ in steps(decoder.model, texts_of(5), 19, decoder=decoder):
        ends.append(decoder.cache.end)
    assert ends == [8] * 4 + [16] * 8 + [24] * 7 and Traced.made == 3


def test_recordings_are_of_use_to_the_next_texts_that_fit_their_cache(steady):
    model = make(block_size=24)
    decoder, memory = Decoder(model), []
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

    monkeypatch.setattr(decoding, "Recording", fail)
    monkeypatch.setattr(caches, "STEADY", 1)
    model = make()
    decoder, seen = Decoder(model), texts_of(16)
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
    monkeypatch.setattr(decoding, "kind_of_cache", lambda model: kind)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **more: plain(*args, **more).transpose(1, 2).contiguous().transpose(1, 2))
    model = make(position="rotary", n_kv_head=2)
    decoder, seen = Decoder(model), texts_of(5, 9)
    decoder.records = False
    _, _, logits = next(steps(model, texts_of(5, 9), 1, decoder=decoder))
    torch.testing.assert_close(logits, uncached_logits(model, seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_product_is_a_linear_layer_in_fewer_bits(dtype):
    weight, bias, x = torch.randn(24, 32), torch.randn(24), torch.randn(3, 1, 32)
    y = cast(weight, bias, dtype)(x)
    assert torch.equal(y, F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))


def test_the_copy_shares_what_it_does_not_lay_out_anew_and_leaves_the_model_as_it_is():
    model = make(tie_head=False).train()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    twin = pack(model, partial(cast, dtype=torch.bfloat16))
    assert twin.wte.weight is model.wte.weight and not twin.training and model.training
    assert isinstance(model.h[0].mlp.c_fc, torch.nn.Linear) and model.head.__func__ is GPT.head
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


@pytest.mark.parametrize(("kind", "dtype", "positions"), [
    (PackedCache, torch.float32, 64), (PackedCache, torch.bfloat16, 64), (RaggedCache, torch.bfloat16, 48)])
@pytest.mark.parametrize(("groups", "D"), [(4, 64), (2, 16), (1, 128), (2, 80)])
def test_the_cache_takes_what_keys_and_values_need_and_no_more(kind, dtype, positions, groups, D):
    """Of the kernels' one, whole panels: 64 positions for 48."""
    config = GPTConfig(block_size=64, vocab_size=V, n_layer=3, n_head=4, n_kv_head=groups, n_embd=4 * D)
    cache = kind(config, 5, 48, torch.device("cpu"), dtype)
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in (*cache.keys, *cache.values)}
    assert sum(held.values()) == 2 * 3 * 5 * groups * D * positions * dtype.itemsize


@every_shape
def test_the_cache_is_made_once_and_for_no_more_positions_than_will_come(flags, decoder_of):
    model = make(block_size=64, **flags)
    decoder, made = decoder_of(model, RaggedCache), []
    for number, _ in enumerate(steps(model, texts_of(5, 9), 20, decoder=decoder)):
        made.append([each.data_ptr() for each in (*decoder.cache.keys, *decoder.cache.values)])
        assert decoder.cache.keys[0].shape[2] == 29 and made[number] == made[0]
    decoder.begin([[1]], 1000)
    assert decoder.cache.keys[0].shape[2] == 64


def test_equal_prompts_are_read_once_and_no_further_than_the_last_keys_and_values():
    model, read, widths = make(block_size=32), [], []
    model.h[-1].mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    features = model.features
    model.features = lambda idx, cache: read.append(tuple(idx.shape)) or features(idx, cache)
    list(steps(model, texts_of(20) * 64 + texts_of(7), 3, decoder=(decoder := Decoder(model))))
    assert decoder.prefiller is model
    assert [shape for shape in read if shape[1] > 1] == [(1, 19), (1, 6)]
    assert set(widths) == {1}  # only the steps themselves


def test_weights_of_other_types_are_decoded_by_the_model_itself():
    model = make()
    assert can_pack(model)
    for dtype in (torch.bfloat16, torch.float64):
        assert not can_pack(make().to(dtype)) and Decoder(make().to(dtype)).kind is RaggedCache
    with pytest.raises(ValueError, match="int8=true"):
        Decoder(model.bfloat16(), "int8")


def test_every_flag_of_the_model_is_in_a_shape_that_is_compared():
    """A new flag is added to SHAPES: decoding has its own attention and head, which may need it."""
    varied = {name for flags in SHAPES.values() for name in flags}
    sizes = {"block_size", "vocab_size", "n_layer"}  # of `make`
    training = {"dropout", "zero_init"}  # mean nothing to decoding
    assert varied | sizes | training == {field.name for field in fields(GPTConfig)}


@pytest.mark.slow
def test_transformers_says_the_same_with_the_same_weights():
    """In fp32, through the very function that the benchmark uses."""
    pytest.importorskip("transformers")
    from bench.decode import as_transformers

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=4, n_embd=32)).eval()
    prompt = torch.tensor(texts_of(9, 9))
    ours = torch.stack([tokens for _, tokens, _ in steps(model, prompt, 12, temperature=0)], dim=1)
    theirs = as_transformers(model, "fp32").generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
                                                     min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs[:, 9:], ours)
