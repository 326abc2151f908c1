"""Mixtures: their weights, the interleaving of their parts, and their tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig, read_mix
from data.corpus import Corpus
from data.order import Interleaving
from data.prepare import describe, load_tokenizer, prepare, val_bytes_per_token
from data.shards import open_parts, read_meta


@pytest.mark.parametrize("mix, counts", [
    ("pydocs:0.7 book.txt:0.3", {"pydocs": 7, "book.txt": 3}), ("a:1 b:1", {"a": 1, "b": 1}), ("a:2 b:4", {"a": 1, "b": 2}),
    ("  a:1/3   b:2/3 ", {"a": 1, "b": 2}), ("'my book.txt:1' \"c d\":1", {"my book.txt": 1, "c d": 1}), ("c:/x.txt:1e-1 b:9e-1", {"c:/x.txt": 1, "b": 9}), ("a:5", {"a": 1}),
    ("a:0.1233 b:0.8767", {"a": 1233, "b": 8767}),  # the longest period
])
def test_weights_become_sequences_in_a_period(mix, counts):
    assert read_mix(mix) == counts


@pytest.mark.parametrize("mix, words", [
    ("pydocs", "pydocs is not a source with its weight"), ("a:0.5 b:-1", "b:-1 is not a source"), ("a:x", "a:x is not a source"),
    (":1", ":1 is not a source"), ("a:1e-999999999 b:1", "a:1e-999999999 is not a source"), ("a:1e999999999 b:1", "a:1e999999999 is not"), ("a:nan", "a:nan"), ("a:1/0", "a:1/0"), ("a:1 a:2", "a is given twice"), (" ", "names no source"), ("'a b:1", "a quotation mark is not closed: write SOURCE:WEIGHT"),
    ("a:0.12345 b:0.87655", r"only after 20,000 sequences, at most 10,000 are supported: round them"),
])
def test_an_invalid_mixture_is_explained(mix, words):
    with pytest.raises(ValueError, match=words):
        read_mix(mix)


def test_an_invalid_mixture_is_a_problem_of_the_settings():
    [problem] = DataConfig(mix="pydocs:1 no/such.txt:1").missing_files()
    assert problem.startswith("mix=") and "no/such.txt does not exist" in problem
    [problem] = DataConfig(mix="pydocs").problems()
    assert problem.startswith("mix=pydocs: pydocs is not a source with its weight")
    assert list(DataConfig(mix="pydocs:1 stdlib:2").problems()) == []


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_prefix_keeps_to_the_weights_within_one(counts):
    """So every stretch does within two."""
    interleaving = Interleaving(counts)
    source, _ = interleaving.at(np.arange(2 * interleaving.period))
    n = np.arange(1, 2 * interleaving.period + 1)
    for part, count in enumerate(counts):
        taken = np.cumsum(source == part)
        assert np.abs(taken - n * count / interleaving.period).max() < 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 10**12))
def test_each_sequence_of_a_part_comes_once_and_in_order(counts, start):
    interleaving = Interleaving(counts)
    source, index = interleaving.at(start + np.arange(3 * interleaving.period))
    for part in range(len(counts)):
        mine = index[source == part]
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
    first_source, first_index = Interleaving(counts).at(np.arange(interleaving.period))
    assert all(first_index[first_source == part][0] == 0 for part in range(len(counts)))


def test_the_interleaving_is_frozen():
    """Another order would change the batches of resumed runs."""
    expected = {(14, 8, 2): [0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 2], (9, 14, 12): [1, 2, 0, 1, 2, 0, 1, 2, 1, 0, 2, 1]}
    assert {counts: Interleaving(list(counts)).at(np.arange(12))[0].tolist() for counts in expected} == expected


@pytest.fixture
def mixed(tmp_path, fresh_data):
    """Settings of a mixture of two files."""
    (tmp_path / "a.txt").write_text("All work and no play. " * 300)
    (tmp_path / "b.txt").write_text("0123456789 " * 100)
    return lambda **rest: DataConfig(**{"mix": f"{tmp_path}/a.txt:3 {tmp_path}/b.txt:1", "tokenizer": "char"} | rest)


def test_the_parts_of_a_mixture_share_a_tokenizer(mixed):
    folder = prepare(config := mixed())
    meta, tokenizer = read_meta(folder), load_tokenizer(folder)
    assert folder.name.startswith("mix-char-") and [part["source"] for part in meta["parts"]] == config.mix.replace(":3", "").replace(":1", "").split()
    texts = [tokenizer.decode_bytes(tokens.read(np.arange(len(tokens)))).decode() for tokens in open_parts(folder, "train")]
    assert texts == ["All work and no play. " * 270 + "<|endoftext|>", "0123456789 " * 90 + "<|endoftext|>"]
    assert meta["splits"]["train"]["documents"] == 2 and meta["splits"]["train"]["tokens"] == 270 * 22 + 90 * 11 + 2
    assert f"{270 * 22 + 90 * 11 + 2:,} tokens to train on" in describe(folder)
    assert val_bytes_per_token(folder, [3, 1]) == pytest.approx(0.75 * 660 / 661 + 0.25 * 110 / 111)


def test_other_weights_use_the_same_tokens(mixed):
    config = mixed()
    assert prepare(config) == prepare(mixed(mix=config.mix.replace(":3", ":5")))


def test_a_tokenizer_is_trained_on_all_parts(mixed):
    tokenizer = load_tokenizer(prepare(mixed(tokenizer="bpe", vocab_size=275)))
    assert len(tokenizer.encode(" work")) == 1 and len(tokenizer.encode("0123456789")) < 10


def test_the_parts_share_the_sample_for_training(mixed, monkeypatch):
    monkeypatch.setattr("data.prepare.SAMPLE_BYTES", 1000)
    asked, training_text = [], Corpus.training_text
    monkeypatch.setattr(Corpus, "training_text", lambda corpus, most_bytes: asked.append(most_bytes) or training_text(corpus, most_bytes))
    prepare(mixed(tokenizer="bpe", vocab_size=260))
    assert asked == [500, 500]


def test_a_change_of_a_part_gives_another_folder(mixed, tmp_path):
    folders = [prepare(config := mixed())]
    for name in "ab":
        with open(tmp_path / f"{name}.txt", "a") as file:
            file.write("1")
        folders.append(prepare(config))
    assert len(set(folders)) == 3


def test_each_part_of_a_mixture_is_checked(mixed):
    folder = prepare(config := mixed())
    for path in (folder / "train_00000.npy", folder / "train_00001.npy"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + b"\0\0")
        with pytest.raises(ValueError, match=f"{path.name} was changed"):
            prepare(config)
        path.write_bytes(whole)
    assert prepare(config) == folder


def test_a_part_without_text_is_named(mixed, tmp_path):
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"b.txt holds no text: every document is empty \(1 file\)"):
        prepare(mixed())
