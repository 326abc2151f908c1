"""N-gram embeddings: which tokens they depend on, and their use with a cache and with documents."""

import pytest
import torch

from model.attention import KVCache
from model.gpt import GPT, GPTConfig
from model.ngram import NGramEmbedding

CONFIG = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=8, ngrams=4, ngram_rows=997,
                   embedding_norm=True)


def randomized() -> GPT:
    """A model with large random weights."""
    torch.manual_seed(0)
    gpt = GPT(CONFIG).double().eval()
    for weights in gpt.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return gpt


def ids(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_an_n_gram_depends_on_its_n_tokens_only():
    embedding, idx = NGramEmbedding(CONFIG), ids()
    rows = embedding.row_indices(idx)
    assert rows.shape == (3, 12, 3) and rows.min() >= 0 and rows.max() < 997
    for t in range(12):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 65
        differs = embedding.row_indices(changed) != rows
        for n in (2, 3, 4):
            assert differs[:, t : t + n, n - 2].float().mean() > 0.9  # two may collide
            assert not differs[:, :t, n - 2].any() and not differs[:, t + n :, n - 2].any()


def test_equal_n_grams_have_the_same_row():
    idx = ids(1, 12)
    idx[0, 8:12] = idx[0, 3:7]
    rows = NGramEmbedding(CONFIG).row_indices(idx)
    assert torch.equal(rows[0, 11], rows[0, 6])
    assert rows[0, 11].unique().numel() == 3  # one row per length


def test_all_bigrams_are_spread_evenly_over_the_rows():
    first, second = torch.meshgrid(torch.arange(65), torch.arange(65), indexing="ij")
    pairs = torch.stack((first.flatten(), second.flatten()), dim=1)
    counts = NGramEmbedding(CONFIG).row_indices(pairs)[:, 1, 0].bincount(minlength=997)
    mean = 65 * 65 / 997
    assert counts.double().var() / mean < 1.25  # 1 for a random assignment


def test_the_embedding_is_the_sum_of_its_rows():
    embedding, idx = NGramEmbedding(CONFIG).double(), ids(1, 5)
    expected = sum(embedding.table.weight[embedding.row_indices(idx)[0, :, n]] for n in range(3))
    torch.testing.assert_close(embedding(idx)[0], expected)


@pytest.mark.parametrize("ends", [(1, 2, 3), (5,), tuple(range(1, 12))])
def test_a_cache_continues_n_grams(ends):
    gpt, idx = randomized(), ids()
    cache, parts = KVCache(CONFIG, 3, dtype=torch.float64), []
    for start, end in zip((0, *ends), (*ends, 12), strict=True):
        parts.append(gpt(idx[:, start:end], cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), gpt(idx), rtol=0, atol=1e-10)


def test_n_grams_do_not_cross_documents():
    gpt, idx = randomized(), ids(1, 12)
    together = gpt(idx, document_ids=torch.tensor([[0] * 5 + [1] * 2 + [2] * 5]))
    alone = torch.cat([gpt(part) for part in idx.split((5, 2, 5), dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_logits_depend_on_earlier_tokens_only():
    gpt, idx = randomized(), ids()
    changed = idx.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 65
    before, after = gpt(idx), gpt(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_the_input_of_the_first_block_is_normalized():
    gpt, seen = randomized(), []
    gpt.h[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    gpt(ids())
    torch.testing.assert_close(seen[0].square().mean(-1), torch.ones(3, 12, dtype=torch.float64))


def test_the_table_has_the_role_of_an_embedding():
    gpt = randomized()
    assert any(weights is gpt.ngram.table.weight for weights in gpt.parameters_by_role()["embedding"].values())
