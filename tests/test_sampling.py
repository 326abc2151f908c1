"""Sampling: the cache changes only the time, and each rule samples from its distribution."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from conf.sampling import SamplingConfig
from generation.decoder import native_dtype, window_start
from generation.sampling import candidates, cumulative_sum, generate
from generation.sampling import pick as pick_by
from model.gpt import GPT, GPTConfig

V = 31
FLAGS = {
    "learned": {"tie_head": False},
    "rotary": {"position": "rotary", "norm": "rms", "qk_norm": True, "bias": False, "tie_head": False},
    "n-grams": {"position": "rotary", "n_kv_head": 1, "tie_head": False, "ngrams": 4, "ngram_rows": 50},
}
every_model = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())


def make(block_size: int = 8, **flags: object) -> GPT:
    """A model with weights so large, and a seed such, that its greedy text is no constant."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=V, n_layer=2, n_head=2, n_embd=16, **flags)).eval()
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.5)
    return model


def prompt_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


def rules_of(max_new_tokens: int = 1, use_cache: bool = True, **rules: object) -> SamplingConfig:
    """No rule but those that are given."""
    return SamplingConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "cache": use_cache,
                             "max_new_tokens": max_new_tokens} | rules)


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Tensor) -> Tensor:
    return pick_by(logits, rules_of(temperature=temperature, top_k=top_k, top_p=top_p), draws)


def tokens_of(model: GPT, prompt: Tensor, max_new_tokens: int, numbers: list[int] | None = None, **rules: object) -> Iterator[Tensor]:
    for _, tokens, _ in generate(model, prompt, rules_of(max_new_tokens, **rules), numbers):
        yield tokens


def text(model: GPT, prompt: Tensor, max_new_tokens: int, **rules: object) -> list[list[int]]:
    """The tokens of `generate`, row by row."""
    return torch.stack(list(tokens_of(model, prompt, max_new_tokens, **rules)), dim=1).tolist()


def plain_greedy(model: GPT, prompt: Tensor, max_new_tokens: int) -> list[list[int]]:
    """The largest logit of the window, again and again."""
    ids = prompt
    with torch.no_grad():
        for _ in range(max_new_tokens):
            window = ids[:, window_start(ids.size(1), model.config.block_size) :]
            ids = torch.cat((ids, model(window)[:, -1:].argmax(-1)), dim=1)
    return ids[:, prompt.size(1) :].tolist()


# The window and the cache


def test_the_window_moves_in_steps_of_half_a_block():
    for block_size in range(1, 20):
        starts = [window_start(length, block_size) for length in range(1, 8 * block_size)]
        assert starts == sorted(starts)
        for length, start in enumerate(starts, 1):
            context = length - start
            assert 1 <= context <= block_size
            if length <= block_size:
                assert start == 0
            else:
                assert context >= block_size / 2
                assert start % max(block_size // 2, 1) == 0


@every_model
@pytest.mark.parametrize("block_size", [1, 5])
def test_greedy_text_is_the_same_with_and_without_a_cache(block_size, flags):
    """Well past the block size, so that the window moves several times; from prompts shorter and longer than a block."""
    model, seen = make(block_size, **flags), set()
    for length in (1, block_size, block_size + 1, 3 * block_size):
        prompt, steps = prompt_of(length), 3 * block_size + 2
        expected = plain_greedy(model, prompt, steps)
        seen |= set(expected[0])
        assert text(model, prompt, steps, temperature=0, use_cache=True) == expected
        assert text(model, prompt, steps, temperature=0, use_cache=False) == expected
    assert len(seen) >= 3  # the comparison is not one of constants


@every_model
def test_sampled_text_is_the_same_with_and_without_a_cache(flags):
    model = make(**flags)
    prompt = prompt_of(3, rows=2)
    cached, plain = (text(model, prompt, 30, temperature=0.9, top_k=9, use_cache=cache) for cache in (True, False))
    assert cached == plain
    assert len(set(cached[0])) > 5  # the comparison is not one of constants


def test_a_cache_leaves_only_new_positions_to_compute():
    model, widths = make(), []
    model.h[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].size(1)))
    text(model, prompt_of(3), 14)
    # The prompt but its last token; then one at a time up to the block of 8; then once in half a block the window is read anew.
    assert widths == [2, *[1] * 6, 4, *[1] * 4, 4, *[1] * 4]


@every_model
def test_rows_of_a_batch_are_completed_as_if_alone(flags):
    """Each with its own window, which moves at its own time; some begin beyond the block, two are equal."""
    model = make(**flags)
    prompts = [prompt_of(length)[0].tolist() for length in (3, 1, 8, 13, 3, 7, 30)]
    for rules in ({"temperature": 0.9, "top_k": 9}, {"temperature": 0, "use_cache": False}):
        together = text(model, prompts, 14, **rules)
        assert together == [text(model, [prompt], 14, numbers=[row], **rules)[0] for row, prompt in enumerate(prompts)]


@every_model
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(flags):
    model, prompt = make(**flags), prompt_of(5)
    batch = text(model, prompt.expand(6, -1), 15, temperature=0.9, top_p=0.95, seed=3)
    assert len({tuple(row) for row in batch}) == 6
    for number, row in enumerate(batch):
        for use_cache in (True, False):
            assert text(model, prompt, 15, temperature=0.9, top_p=0.95, seed=3, numbers=[number], use_cache=use_cache) == [row]


def test_the_logits_are_those_the_tokens_are_sampled_from():
    model = make()
    for _, tokens, logits in generate(model, prompt_of(3, rows=2), rules_of(12, temperature=0)):
        assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cache_takes_the_type_of_the_weights(dtype):
    model = make(**FLAGS["rotary"]).to(dtype)
    assert native_dtype(model) == dtype
    assert len(text(model, prompt_of(3), 12)[0]) == 12


@pytest.mark.parametrize(("native", "dtype"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_the_cache_takes_the_type_of_autocast_if_native(native, dtype, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    model = make(**FLAGS["rotary"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native_dtype(model) == dtype
        assert len(text(model, prompt_of(3), 12)[0]) == 12


# What generation promises its caller


@pytest.mark.parametrize("max_new_tokens", [0, 1, 12])
def test_yields_as_many_tokens_as_asked_for(max_new_tokens):
    tokens = list(tokens_of(make(), prompt_of(3, rows=2), max_new_tokens))
    assert len(tokens) == max_new_tokens
    assert all(token.shape == (2,) and token.dtype == torch.int64 for token in tokens)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        next(tokens_of(make(), torch.empty(1, 0, dtype=torch.int64), 3))


def test_the_seed_alone_decides_the_tokens():
    model, prompt = make(), prompt_of(3)
    torch.manual_seed(1)
    first = text(model, prompt, 20, temperature=2.0, seed=7)
    torch.manual_seed(2)
    assert text(model, prompt, 20, temperature=2.0, seed=7) == first
    assert text(model, prompt, 20, temperature=2.0, seed=8) != first


def test_the_global_random_stream_is_untouched():
    model = make(dropout=0.5).train()
    before = torch.get_rng_state()
    text(model, prompt_of(3), 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_while_generating():
    model = make(dropout=0.5)
    expected = text(model, prompt_of(3), 20, temperature=0)
    assert text(model.train(), prompt_of(3), 20, temperature=0) == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_at_the_end(training):
    model = make().train(training)
    text(model, prompt_of(3), 3)
    assert model.training == model.h[0].training == training


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_when_stopped_early(training):
    model = make().train(training)
    tokens = tokens_of(model, prompt_of(3), 10)
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training == model.h[0].training == training


def test_the_models_mode_is_restored_after_an_error():
    model = make().train()
    with pytest.raises(IndexError):
        text(model, torch.tensor([[V]]), 3)  # no such token
    assert model.training


def test_generated_tokens_need_no_gradient():
    tokens = next(tokens_of(make(), prompt_of(3), 1))
    assert tokens.is_inference()


# The rules


def kept(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> list[list[int]]:
    """The ids of the candidates, in descending order, whose probabilities must be unchanged."""
    probabilities, ids = candidates(logits, top_k, top_p)
    for row in range(len(logits)):
        expected = logits[row, ids[row]].softmax(-1) if top_k else logits[row].softmax(-1)[ids[row]]
        assert torch.allclose(probabilities[row], torch.where(probabilities[row] > 0, expected, 0))
    return [row[p > 0].tolist() for p, row in zip(probabilities, ids, strict=True)]


def log(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]  # not in order, so that positions could be mixed up


@pytest.mark.parametrize(("k", "expected"), [
    (1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [1, 3, 4, 0, 2]), (99, [1, 3, 4, 0, 2])])
def test_top_k_keeps_the_k_largest(k, expected):
    assert kept(log(PROBABILITIES), top_k=k) == [expected]


def test_top_k_keeps_k_where_they_tie():
    first, *rest = kept(torch.tensor([[1.0, 2.0, 3.0, 2.0, 0.0]]), top_k=2)[0]
    assert first == 2 and rest in ([1], [3])


@pytest.mark.parametrize(("p", "expected"), [
    (1e-6, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.94, [1, 3, 4, 0]), (0.96, [1, 3, 4, 0, 2])])
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
    assert kept(log(PROBABILITIES), top_p=p) == [expected]


@pytest.mark.parametrize(("p", "count"), [(1e-6, 1), (0.2, 1), (0.3, 2), (0.6, 3), (0.9, 4)])
def test_top_p_keeps_no_more_than_needed_of_a_tie(p, count):
    assert len(kept(torch.zeros(1, 4), top_p=p)[0]) == count


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_top_p_of_a_large_vocabulary(p, spread):
    """Compared with double precision. Without a spread it needs more tokens than are sorted first."""
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * spread
    for row, found in zip(logits, kept(logits, top_p=p), strict=True):
        ordered = row.double().softmax(-1).sort(descending=True).values
        needed = int((ordered.cumsum(-1) < p).sum()) + 1
        assert abs(len(found) - needed) <= 1  # the last may be a matter of rounding


def test_each_row_has_its_own_candidates():
    logits = log([0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3])
    assert kept(logits, top_k=1) == [[0], [2], [1]]
    assert [sorted(row) for row in kept(logits, top_p=0.8)] == [[0, 1], [1, 2], [0, 1, 2]]


def test_temperature_zero_takes_the_largest_logit():
    logits = log(PROBABILITIES, PROBABILITIES[::-1])
    assert pick(logits, 0, 2, 0.5, torch.ones(2)).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [1e-10, 1e-30, 1e-44, 1e-300])
@pytest.mark.parametrize("rules", [(0, 1.0), (3, 1.0), (0, 0.9)], ids=str)
def test_a_temperature_near_zero_takes_the_largest_logit(temperature, rules):
    logits = torch.tensor([[-40.0, 90.0, 89.9], [3.0, -2.0, 1.0]])
    assert pick(logits, temperature, *rules, torch.tensor([1.0, 0.5])).tolist() == [1, 0]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "expected"), [
    (1.0, 0, 1.0, [0, 1, 2, 3, 4]),
    (2.0, 0, 1.0, [0, 1, 2, 3, 4]),
    (0.5, 0, 1.0, [0, 1, 2, 3, 4]),
    (1.0, 3, 1.0, [1, 3, 4]),
    (0.5, 2, 1.0, [1, 3]),
    (1.0, 0, 0.6, [1, 3]),
    (2.0, 0, 0.6, [1, 3, 4]),  # temperature comes first: at 2 the two largest hold 0.56
    (1.0, 3, 0.8, [1, 3]),  # then top_k: of the three that stay the two largest hold 0.82
])
def test_pick_draws_from_the_promised_distribution(temperature, top_k, top_p, expected):
    """p^(1/temperature) over the tokens kept; each frequency within five standard deviations, the others never drawn."""
    draws = 20_000
    logits = log(PROBABILITIES).expand(draws, -1)
    tokens = pick(logits, temperature, top_k, top_p, 1 - torch.rand(draws, generator=torch.Generator().manual_seed(0)))
    weights = [p ** (1 / temperature) if token in expected else 0.0 for token, p in enumerate(PROBABILITIES)]
    for token, count in enumerate(tokens.bincount(minlength=5).tolist()):
        p = weights[token] / sum(weights)
        assert abs(count / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8)])
def test_extreme_draws_never_take_a_token_of_probability_0(top_k, top_p):
    logits = log([0.0, 0.2, 0.5, 0.3, 0.0], [0.0, 0.2, 0.5, 0.3, 0.0]).clamp(min=-1e4)
    assert set(pick(logits, 1.0, top_k, top_p, torch.tensor([2.0**-53, 1.0])).tolist()) <= {1, 2, 3}


@pytest.mark.parametrize("rules", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 4}, {"top_p": 0.7}], ids=str)
def test_many_rows_sample_from_the_promised_distribution(rules):
    """The streams of 4,000 rows together, by generate itself: each frequency within five standard deviations."""
    model, rows = make(), 4000
    prompt = prompt_of(3)
    with torch.no_grad():
        p = (model(prompt)[0, -1] / rules.get("temperature", 1.0)).softmax(-1).double()
    order = p.argsort(descending=True)
    keep = rules.get("top_k", V) if "top_k" in rules else int((p[order].cumsum(-1) < rules.get("top_p", 2.0)).sum()) + 1
    p[order[keep:]] = 0
    p /= p.sum()
    counts = next(tokens_of(model, prompt.expand(rows, -1), 1, **rules)).bincount(minlength=V)
    assert ((counts / rows - p).abs() <= 5 * (p * (1 - p) / rows).sqrt()).all() and (counts > 0).sum() > 1


def test_generate_applies_its_rules():
    """With top_k=1, a tiny top_p or a tiny temperature, sampling is greedy; hot and free, it is not."""
    model, prompt = make(), prompt_of(3)
    greedy = text(model, prompt, 20, temperature=0)
    for rules in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert text(model, prompt, 20, **rules) == greedy
    assert text(model, prompt, 20, temperature=5.0) != greedy


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    with pytest.raises(ValueError, match="NaN or infinite"):
        pick(torch.tensor([[0.0, value]]), temperature, 0, 1.0, torch.ones(1))


@pytest.mark.parametrize("rules", [(1.0, 0, 1.0), (1.0, 3, 1.0), (0.5, 0, 0.8)])
def test_sampling_adds_probabilities_by_that_function_only(rules, monkeypatch):
    """`cumulative_sum`, which has an answer where torch has no deterministic sum."""
    added = []
    monkeypatch.setattr("generation.sampling.cumulative_sum", lambda x: added.append(x) or torch.from_numpy(x.numpy().cumsum(-1)))
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    assert pick(torch.zeros(2, 5), *rules, torch.tensor([0.1, 0.9])).shape == (2,) and added


def test_on_a_gpu_deterministic_sums_are_added_on_the_cpu(monkeypatch):
    """torch raises an error for the sum of a GPU. The device "meta" stands in for one, and gives back no content."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x) or torch.ones(x.shape))
    probabilities = torch.empty(2, 3, device="meta")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert cumulative_sum(probabilities).is_meta and not moved
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert cumulative_sum(probabilities).is_meta and len(moved) == 1
    assert cumulative_sum(torch.ones(2, 3))[:, -1].tolist() == [3, 3] and len(moved) == 1
