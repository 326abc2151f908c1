"""Decoding: packed weights, caches and CUDA graphs give the model's own logits, in the memory they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from conf.sampling import SamplingConfig
from generation import caches, kernels
from generation import decoder as decoding
from generation.caches import PackedCache, RaggedCache, StaticCache
from generation.decoder import Decoder, window_start
from generation.packed import cast, pack
from generation.sampling import Batch, Row, generate, uncached_logits
from model.config import GPTConfig
from model.gpt import GPT

V = 96
SHAPES = {
    "gpt2": {},
    "modern": {"position": "rotary", "norm": "rms", "qk_norm": True, "bias": False, "tie_head": False, "activation": "relu2"},
    "llama": {"position": "rotary", "n_kv_head": 2, "norm": "rms_gain", "activation": "swiglu", "bias": False},
    "grouped": {"position": "rotary", "n_kv_head": 2},
    "one group": {"n_kv_head": 1, "tie_head": False},
    "n-grams": {"position": "rotary", "ngrams": 4, "ngram_rows": 50, "embedding_norm": True},
    "heads of 64": {"n_embd": 128, "n_head": 2, "parametrization": "mup", "mup_base_width": 32, "mup_base_depth": 1,
                    "mup_base_head_width": 16},
    "heads of 80": {"n_embd": 160, "n_head": 2, "position": "rotary"},
    "odd": {"n_embd": 15, "n_head": 3},
    "many of a group": {"n_embd": 48, "n_head": 6, "n_kv_head": 1},
}
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
packed_cache = pytest.param(PackedCache, marks=needs_kernels)

FOR_KERNELS = ("heads of 64", "heads of 80", "odd", "many of a group")  # sizes mean nothing to torch's own products


def for_shapes(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("flags", [SHAPES[name] for name in names], ids=names)


def make(block_size: int = 16, **flags: object) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": block_size, "vocab_size": V, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**shape | flags)).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, mean=float(weights.dim() == 1), std=0.2)
    return model


def prompts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def steps(decoder: Decoder | GPT, prompts: list[list[int]], count: int, done: set[int] | tuple = (),
          **rules: object) -> Iterator[tuple[list[list[int]], Tensor]]:
    """Generate, and yield the sequences before each step, with the logits that continue them; of a model, without a cache."""
    model = decoder if isinstance(decoder, GPT) else decoder.model
    sampling = SamplingConfig(**{"max_new_tokens": count, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0,
                                 "cache": model is not decoder} | rules)
    sequences = [list(prompt) for prompt in prompts]
    for rows, tokens, logits in generate(model, prompts, sampling, decoder=None if model is decoder else decoder, done=done):
        yield [sequences[row] for row in rows], logits
        for row, token in zip(rows, tokens.tolist(), strict=True):
            sequences[row].append(token)


def begin(decoder: Decoder, prompts: list[list[int]]) -> None:
    decoder.begin(len(prompts), decoder.config.block_size)
    for _ in prompts:
        decoder.join()


@torch.no_grad()
def exact_logits(model: GPT, sequences: list[list[int]]) -> Tensor:
    """By one pass over all windows, padded at their ends: a token does not see those after it."""
    windows = [sequence[window_start(len(sequence), model.config.block_size):] for sequence in sequences]
    longest = max(map(len, windows))
    padded = torch.tensor([window + [0] * (longest - len(window)) for window in windows])
    last = torch.tensor([len(window) - 1 for window in windows])
    return model.head(model.features(padded)[torch.arange(len(windows)), last])


def assert_exact(model: GPT, sequences: list[list[int]], logits: Tensor) -> None:
    torch.testing.assert_close(logits, exact_logits(model, sequences), rtol=1e-4, atol=1e-4)


def relative_error(model: GPT, sequences: list[list[int]], logits: Tensor) -> float:
    with torch.autocast("cpu", enabled=False):
        exact = uncached_logits(model, sequences)
    return ((logits - exact).std() / exact.std()).item()


class TracedCall(TorchDispatchMode):
    """A `CapturedCall` on a CPU: the call's tensor operations on the very tensors that it used, and none of its Python."""

    made = 0

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__()
        TracedCall.made += 1
        self.operations = []
        with self:
            self.result = call()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> Tensor:
        made = {}
        for operation, args, kwargs, result in self.operations:
            args, kwargs = tree_map(lambda each: made.get(id(each), each), (args, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                made[id(old)] = new
        return made[id(self.result)]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A CPU decodes as a GPU does."""
    monkeypatch.setattr(decoding, "choose_cache", lambda model: StaticCache)
    monkeypatch.setattr(decoding, "CapturedCall", TracedCall)
    monkeypatch.setattr(caches, "BUCKET", 8)
    monkeypatch.setattr(TracedCall, "made", 0)


@pytest.fixture
def decoder_of(monkeypatch, request):
    """Makes a `Decoder` with a type of cache."""
    def make_decoder(model: GPT, kind: type[RaggedCache]) -> Decoder:
        if kind is StaticCache:
            request.getfixturevalue("as_on_a_gpu")
        else:
            monkeypatch.setattr(decoding, "choose_cache", lambda model: kind)
        decoder = Decoder(model)
        assert decoder.cache_type is kind
        return decoder
    return make_decoder


# Logits


@pytest.mark.parametrize(("kind", "shape"), [
    *(pytest.param(PackedCache, shape, marks=needs_kernels) for shape in SHAPES),
    *((kind, shape) for kind in (StaticCache, RaggedCache) for shape in SHAPES if shape not in FOR_KERNELS)])
def test_logits_are_those_without_a_cache(kind, shape, decoder_of):
    """In a batch of several lengths, whose windows move at several times, and then alone."""
    block_size = 66 if kind is PackedCache else 16  # more than a panel of the kernels
    model = make(block_size, **SHAPES[shape])
    decoder = decoder_of(model, kind)
    batch = prompts_of(block_size, 1, block_size - 4, 3, 3, 2 * block_size + 6)
    for prompts in (batch, prompts_of(5)):
        for sequences, logits in steps(decoder, prompts, 6):
            assert_exact(model, sequences, logits)
    assert kind is not StaticCache or TracedCall.made > 0


def test_every_flag_of_the_model_is_in_a_shape():
    """Decoding has its own attention and head. A new flag that is in no shape would not be compared with the model."""
    compared = {name for flags in SHAPES.values() for name in flags}
    sizes = {"block_size", "vocab_size", "n_layer"}  # of `make`
    training_only = {"dropout", "zero_init"}
    assert compared | sizes | training_only == {field.name for field in fields(GPTConfig)}


@for_shapes("gpt2", "grouped", "n-grams")
@pytest.mark.parametrize("kind", [packed_cache, StaticCache, RaggedCache, "no cache"])
def test_finished_rows_leave_the_others_unchanged(flags, kind, decoder_of):
    """The first, the last, two at once, one whose window moves; at last all of them."""
    model = make(**flags)
    decoder = model if kind == "no cache" else decoder_of(model, kind)
    finish, done, counts = {2: [0], 4: [4], 11: [1, 2], 16: [3]}, set(), []
    for step, (sequences, logits) in enumerate(steps(decoder, prompts_of(3, 40, 15, 3, 9), 24, done)):
        assert_exact(model, sequences, logits)
        done.update(finish.get(step, []))
        counts.append(len(sequences))
    assert counts == [5] * 3 + [4] * 2 + [3] * 7 + [1] * 5


@for_shapes("gpt2", "grouped", "n-grams")
@pytest.mark.parametrize("kind", [packed_cache, StaticCache, RaggedCache])
def test_rows_that_join_leave_the_others_unchanged(flags, kind, decoder_of):
    """In the place of one that has left too, with rules of their own; with our kernels, to the last bit."""
    def row(number: int) -> Row:
        rules = SamplingConfig(temperature=number / 2, top_k=5 * (number % 2), seed=number)
        return Row(prompts_of(3, 21, block_size - 1, 1, 9)[number], rules, number)

    block_size = 68 if kind is PackedCache else 16  # more than a panel of the kernels
    model = make(block_size, **flags)
    alone = []
    for number in range(5):
        batch = Batch(model, decoder_of(model, kind), 3, 90)
        batch.join(row(number))
        alone.append([batch.step() for _ in range(6)])
    batch, present, seen = Batch(model, decoder_of(model, kind), 3, 90), [], [0] * 5
    for joins, leaves in (([0], []), ([1, 2], []), ([], []), ([], [1]), ([3], []), ([], [0, 2]), ([4], [])):
        for number in joins:
            batch.join(row(number))
            present.append(number)
        tokens, logits = batch.step()
        assert_exact(model, [each.sequence[:-1] for each in batch.rows], logits)
        for place, number in enumerate(present):
            token, expected = alone[number][seen[number]]
            assert tokens[place] == token[0] and (kind is not PackedCache or torch.equal(logits[place], expected[0]))
            seen[number] += 1
        for number in leaves:
            batch.leave(present.index(number))
            present[present.index(number)] = present[-1]
            present.pop()


def test_a_row_that_takes_another_place_is_not_refilled(monkeypatch):
    """Of 3 and 17 tokens in a block of 16, the latter with a window that has moved."""
    decoder, filled = Decoder(make()), []
    prefill_row = decoder.prefill_row
    monkeypatch.setattr(decoder, "prefill_row", lambda row, ids: filled.append(row) or prefill_row(row, ids))
    assert [len(sequences) for sequences, _ in steps(decoder, prompts_of(3, 17), 4, done={0})] == [2, 1, 1, 1]
    assert filled == [0, 1]


@pytest.mark.parametrize("kind", [StaticCache, RaggedCache])
def test_attention_may_return_any_memory_layout(kind, monkeypatch):
    """As the GPU kernels for grouped heads do. Those of cuDNN have a mask for each query."""
    def of_a_gpu(q, k, v, attn_mask=None, **more):
        assert attn_mask is None or attn_mask.ndim == 2 or attn_mask.shape[2:] == (q.size(2), k.size(2))
        return attention(q, k, v, attn_mask=attn_mask, **more).transpose(1, 2).contiguous().transpose(1, 2)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(decoding, "choose_cache", lambda model: kind)
    monkeypatch.setattr(F, "scaled_dot_product_attention", of_a_gpu)
    decoder = Decoder(make(position="rotary", n_kv_head=2))
    decoder.uses_graphs = False
    for sequences, logits in steps(decoder, prompts_of(5, 9), 1):
        assert_exact(decoder.model, sequences, logits)


# Precision


@needs_kernels
@for_shapes("modern", "llama", "one group", "n-grams", "heads of 80", "odd")
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.03), ("int8", 0.12)])
def test_with_fewer_bits_logits_are_near(flags, precision, limit):
    decoder = Decoder(make(**flags), precision)
    for sequences, logits in steps(decoder, prompts_of(*[9] * 5), 10, temperature=0):
        assert decoder.cache.values[0].dtype == (torch.float32 if decoder.config.head_width % 2 else torch.bfloat16)
        assert 0 < relative_error(decoder.model, sequences, logits) < limit


@for_shapes("gpt2", "modern", "n-grams")
@pytest.mark.parametrize("kind", [StaticCache, RaggedCache])
def test_under_autocast_logits_are_near(flags, kind, decoder_of, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", "1")
    with torch.autocast("cpu", torch.bfloat16):
        decoder = decoder_of(make(**flags), kind)
        for sequences, logits in steps(decoder, prompts_of(9, 4), 10, temperature=0):
            assert 0 < relative_error(decoder.model, sequences, logits) < 0.03


class ProductTypes(TorchDispatchMode):
    """Collects the types of all operands of matrix products and attention."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "linear", "attention", "matmul")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if any(name in str(call) for name in self.NAMES):
            self.dtypes |= {each.dtype for each in args if isinstance(each, Tensor)}
        return call(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [packed_cache, RaggedCache, "no cache"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", ["0", "1"])
def test_a_format_that_is_not_native_is_not_used(kind, dtype, native, decoder_of, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setenv("NANOHYDRA_NATIVE_FP16", native)
    model = make()
    with torch.autocast("cpu", dtype), ProductTypes() as products:
        list(steps(model if kind == "no cache" else decoder_of(model, kind), prompts_of(9, 4), 12))
    if native == "0":
        assert products.dtypes == {torch.float32}
    elif kind is not PackedCache:
        assert dtype in products.dtypes


@needs_kernels
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_prefill_uses_native_bf16(precision, monkeypatch):
    for native, dtype in (("0", torch.float32), ("1", torch.bfloat16)):
        monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
        decoder = Decoder(make(), precision)
        begin(decoder, prompts_of(9))
        with ProductTypes() as products:
            decoder.next_logits(prompts_of(9))
        assert dtype in products.dtypes
        assert (decoder.prefill_model is decoder.model) == (native == "0"), "packed for nothing"


def test_weights_of_other_types_are_decoded_without_kernels():
    for dtype, limit in ((torch.bfloat16, 0.03), (torch.float64, 1e-6)):
        decoder = Decoder(make().to(dtype))
        assert decoder.cache_type is RaggedCache and decoder.dtype == dtype and not decoder.advice
        for sequences, logits in steps(decoder, prompts_of(9, 4, 30), 10):
            assert relative_error(make().double(), sequences, logits) < limit
    with pytest.raises(ValueError, match="int8=true is not supported: it needs a CPU and a model with fp32 weights"):
        Decoder(make().bfloat16(), "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_product_is_a_linear_layer_in_fewer_bits(dtype):
    weight, bias, x = torch.randn(24, 32), torch.randn(24), torch.randn(3, 1, 32)
    assert torch.equal(cast(weight, bias, dtype)(x), F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))


def test_packing_shares_other_tensors_and_keeps_the_model():
    model = make(tie_head=False).train()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    packed = pack(model, partial(cast, dtype=torch.bfloat16))
    assert packed.wte.weight is model.wte.weight and not packed.training and model.training
    assert isinstance(model.h[0].mlp.c_fc, torch.nn.Linear) and model.head.__func__ is GPT.head
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_logits_have_no_gradients(precision):
    decoder = Decoder(make(), precision)
    begin(decoder, prompts_of(3))
    assert not decoder.next_logits(prompts_of(3)).requires_grad


# CUDA graphs


def test_one_graph_serves_a_bucket_of_positions(as_on_a_gpu):
    """Of 24 positions: 5 to 7 (the first step warms up, the second is captured), 8 to 15, 16 to 23."""
    decoder, ends = Decoder(make(block_size=24)), []
    for _ in steps(decoder, prompts_of(5), 19):
        ends.append((decoder.cache.end, TracedCall.made))
    assert ends == [(8, 0), *[(8, 1)] * 3, (16, 1), *[(16, 2)] * 7, (24, 2), *[(24, 3)] * 6]


def test_graphs_serve_the_next_batch_that_fits_the_cache(as_on_a_gpu):
    model, memory = make(block_size=24), []
    decoder = Decoder(model)
    for lengths, made in (((5, 9), 2), ((2, 13), 2), ((9, 1), 2), ((3, 3), 3)):  # 9 to 15, 16 to 20; the last also 3 to 7
        for sequences, logits in steps(decoder, prompts_of(*lengths), 9 if 13 in lengths else 12):
            assert_exact(model, sequences, logits)
        memory.append([each.data_ptr() for each in (decoder.last, decoder.cache.positions, *decoder.cache.keys)])
        assert TracedCall.made == made and memory[-1] == memory[0]
    decoder.begin(1, 10)
    assert not decoder.graphs, "one row is another shape"
    decoder.begin(1, 25)
    assert not decoder.graphs and decoder.cache.keys[0].size(2) == 24


@pytest.mark.parametrize("late", [False, True])
def test_a_gpu_without_graphs_decodes_without(late, as_on_a_gpu, monkeypatch):
    """To the last position of the block, whether capturing failed before the step or after it."""
    def fail(call: Callable[[], Tensor], device: torch.device) -> None:
        if late:
            call()
        raise RuntimeError("operation not permitted when stream is capturing")

    def begin_step(cache: StaticCache) -> None:
        begin(cache)
        decoder.warmed_up.add(cache.end)  # every step is captured

    begin = StaticCache.begin_step
    monkeypatch.setattr(decoding, "CapturedCall", fail)
    monkeypatch.setattr(caches, "BUCKET", 1)
    decoder = Decoder(make())
    monkeypatch.setattr(StaticCache, "begin_step", begin_step)
    with pytest.warns(UserWarning, match="could not be captured.*not permitted"):
        for sequences, logits in steps(decoder, prompts_of(16), 2):
            assert_exact(decoder.model, sequences, logits)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_captured_on_one_stream_for_all(fails, monkeypatch):
    """Seen by what takes the place of torch.cuda. Other threads may allocate meanwhile, and no memory is returned."""
    cuda = MagicMock()
    cuda.step.side_effect = RuntimeError("the cause") if fails else None
    cuda.CUDAGraph().capture_end.side_effect = RuntimeError("the capture was invalidated") if fails else None
    for name in ("CUDAGraph", "Stream", "current_stream", "device", "stream", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    generator = MagicMock(spec=torch.Generator)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: generator})
    decoding.capture_stream.cache_clear()
    cuda.reset_mock()
    decoder = Decoder(make())
    decoder.begin(1, 8)
    decoder.join()
    decoder.warmed_up, decoder.uses_graphs, decoder.cache.end, decoder.cache.lengths = {8, 9}, True, 8, [3]
    decoder.step = cuda.step
    if fails:
        with pytest.warns(UserWarning, match="slower: the cause"), pytest.raises(RuntimeError, match="the cause"):
            decoder.graph_step()  # it then tries without
    else:
        decoder.graph_step()
        decoder.cache.end = 9
        decoder.graph_step()
    said = [name for name, _, _ in cuda.mock_calls if "__" not in name]
    capture = ["CUDAGraph().capture_begin", "step", "CUDAGraph().capture_end"]
    before = ["current_stream", "Stream().wait_stream", "device", "stream"]
    after = ["current_stream", "current_stream().wait_stream", "CUDAGraph().replay", "step().clone"]
    assert said == ["CUDAGraph", "Stream", *before, *capture, *(["step"] if fails else [*after, "CUDAGraph", *before, *capture, *after])]
    cuda.CUDAGraph().capture_begin.assert_called_with(capture_error_mode="thread_local")
    assert generator.graphsafe_set_state.called == fails  # which ends its capture mode
    decoding.capture_stream.cache_clear()


# Memory and work


@pytest.mark.parametrize(("kind", "dtype", "positions"), [
    (PackedCache, torch.float32, 64), (PackedCache, torch.bfloat16, 64), (RaggedCache, torch.bfloat16, 48)])
@pytest.mark.parametrize(("groups", "D"), [(4, 64), (2, 16), (1, 128), (2, 80)])
def test_a_cache_takes_the_memory_of_keys_and_values(kind, dtype, positions, groups, D):
    """A packed one takes whole panels: 64 positions for 48."""
    config = GPTConfig(block_size=64, vocab_size=V, n_layer=3, n_head=4, n_kv_head=groups, n_embd=4 * D)
    cache = kind(config, 5, 48, torch.device("cpu"), dtype)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in (*cache.keys, *cache.values)}
    assert sum(storages.values()) == 2 * 3 * 5 * groups * D * positions * dtype.itemsize


def test_a_cache_is_allocated_once_with_the_positions_needed(decoder_of):
    decoder, memory = decoder_of(make(block_size=64), RaggedCache), []
    for _ in steps(decoder, prompts_of(5, 9), 20):
        memory.append([each.data_ptr() for each in (*decoder.cache.keys, *decoder.cache.values)])
        assert decoder.cache.keys[0].shape[2] == 29 and memory[-1] == memory[0]
    decoder.begin(1, 1000)
    assert decoder.cache.keys[0].shape[2] == 64


def test_equal_prompts_are_prefilled_once_to_the_last_cache():
    """The last layer computes nothing beyond keys and values of a prompt."""
    model, read, widths = make(block_size=32), [], []
    model.h[-1].mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    features = model.features
    model.features = lambda idx, cache: read.append(tuple(idx.shape)) or features(idx, cache)
    decoder = Decoder(model)
    list(steps(decoder, prompts_of(20) * 64 + prompts_of(7), 3))
    assert decoder.prefill_model is model
    assert [shape for shape in read if shape[1] > 1] == [(1, 19), (1, 6)]
    assert set(widths) == {1}  # of the steps


@pytest.mark.slow
def test_transformers_generates_the_same_with_these_weights():
    """In fp32, by the function that the benchmark uses."""
    pytest.importorskip("transformers")
    from bench.decode import as_transformers

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=4, n_embd=32)).eval()
    prompt = torch.tensor(prompts_of(9, 9))
    rules = SamplingConfig(12, temperature=0)
    ours = torch.stack([tokens for _, tokens, _ in generate(model, prompt, rules)], dim=1)
    theirs = as_transformers(model, "fp32").generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
                                                     min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs[:, 9:], ours)
