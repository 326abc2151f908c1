"""Differences between two runs, in sentences."""

from __future__ import annotations

import pytest

from conf.identity import identity_differences, listed

TOKENS = {"data.prepared": ("0123456789ab", "ba9876543210"), "data.tokenizer_fingerprint": ("a" * 12, "b" * 12),
          "model.vocab_size": (100, 99)}


@pytest.mark.parametrize("changes, said", [
    ({"optim.lr": (0.1, 0.2)}, "optim.lr was 0.1, now 0.2"),
    (TOKENS, "the training text has changed"),
    (TOKENS | {"seed": (1, 2)}, "the training text has changed; seed was 1, now 2"),
    (TOKENS | {"data.tokenizer": ("bpe", "char")}, "data.tokenizer was bpe, now char"),
])
def test_fingerprints_are_not_shown(changes, said):
    """They follow from the text, or from a setting of the data."""
    assert listed(changes) == said


BEFORE = {"seed": 1, "model": {"block_size": 64}, "training": {"batch_size": 8, "tokens_per_step": None, "max_steps": 5}}


@pytest.mark.parametrize(("changed", "expected"), [
    ({"batch_size": 8, "tokens_per_step": None, "max_steps": 9}, {}),
    ({"batch_size": 4, "tokens_per_step": 512, "max_steps": 5}, {}),
    ({"batch_size": 4, "tokens_per_step": None, "max_steps": 5}, {"training.batch_size": (8, 4)}),
    ({"tokens_per_step": None, "max_steps": 5}, {"training.batch_size": (8, None)}),
])
def test_only_other_steps_make_another_run(changed, expected):
    """Other micro-batches of the same tokens are the same step."""
    assert identity_differences(BEFORE, BEFORE | {"training": changed}) == expected
