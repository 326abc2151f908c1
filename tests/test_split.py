"""Which text is held out: whole documents by their hash, and tails only of long ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.split import TAIL, Text, choose_tails, held_out_fraction


def texts(lengths: list[int], seed: int = 0) -> list[Text]:
    draw = random.Random(seed)
    return [Text(draw.random(), length) for length in lengths]


def unequal(number: int, median: int, seed: int = 0) -> list[int]:
    """Lengths as those of web pages: a few are a hundred times as long as most."""
    draw = random.Random(seed)
    return [max(1, int(draw.lognormvariate(0, 1.5) * median)) for _ in range(number)]


def held_out(chosen: list[Text], val_fraction: float) -> list[int]:
    tails = choose_tails(chosen, val_fraction)
    return [tails[text.number] for text in chosen]


def share(chosen: list[Text], val_fraction: float) -> float:
    return sum(held_out(chosen, val_fraction)) / sum(text.length for text in chosen)


@pytest.mark.parametrize("val_fraction", [0.1, 0.01, 0.005, 0.0005])
@pytest.mark.parametrize("length", [500, 20_000, 1_000_000])
@pytest.mark.parametrize("number", [1, 2, 12, 40, 99, 999, 1500, 2100])
def test_about_the_fraction_is_held_out_of_equal_documents(number, length, val_fraction):
    chosen = texts([length] * number)
    wanted = held_out_fraction(val_fraction, number * length)
    assert 0.5 * wanted <= share(chosen, val_fraction) <= 1.26 * wanted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("val_fraction", [0.1, 0.005, 0.0005])
@pytest.mark.parametrize("number", [2, 12, 40, 99, 999, 1500, 2100])
def test_about_the_fraction_is_held_out_of_unequal_documents(number, val_fraction, seed):
    chosen = texts(unequal(number, 3000, seed), seed)
    wanted = held_out_fraction(val_fraction, sum(text.length for text in chosen))
    assert 0.5 * wanted <= share(chosen, val_fraction) <= 1.26 * wanted


@pytest.mark.parametrize("val_fraction", [0.1, 0.005, 0.0005])
@pytest.mark.parametrize("number", [40, 99, 999, 1500, 2100])
def test_many_short_documents_are_held_out_whole(number, val_fraction):
    """999 records of 500 characters once gave 3 characters each."""
    tails = held_out(texts([500] * number), val_fraction)
    assert set(tails) == {0, 500}
    assert sum(tails) >= min(12_000, 0.07 * 500 * number)


def test_no_tail_is_shorter_than_a_context():
    for number in (3, 12, 23):
        tails = [tail for tail in held_out(texts([400_000] * number), 0.01) if tail]
        assert min(tails) >= TAIL and max(tails) < 400_000


def test_few_long_documents_each_give_their_tail():
    assert held_out(texts([100_000, 200_000, 50_000]), 0.1) == [10_000, 20_000, 5_000]


def test_one_document_gives_its_tail_rounded_as_nanogpt_does():
    assert held_out(texts([1_115_394]), 0.1) == [111_540]
    assert held_out(texts([100]), 0.2) == [20]


def test_a_book_among_notes_gives_its_tail_and_notes_are_whole():
    """Held out whole, the book would be most of the text; trained on whole, it would never be validated on."""
    for seed in range(20):
        chosen = texts([900_000, *[500] * 200], seed)
        tails = held_out(chosen, 0.1)
        assert tails[0] == 90_000 and set(tails[1:]) == {0, 500}
        assert 7_500 <= sum(tails[1:]) <= 12_500


def test_a_few_dozen_long_documents_are_held_out_whole():
    tails = held_out(texts([50_000] * 40), 0.1)
    assert set(tails) == {0, 50_000} and 3 <= tails.count(50_000) <= 5


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.floats(1e-6, 0.5), st.randoms(use_true_random=False))
def test_neither_split_is_empty_and_the_order_does_not_matter(lengths, val_fraction, draw):
    numbers = draw.sample(range(10**6), len(lengths))
    chosen = [Text(number / 10**6, length, draw.choice((1, 1, 1, 3))) for number, length in zip(numbers, lengths, strict=True)]
    tails = choose_tails(chosen, val_fraction)
    n_held_out = sum(tails[text.number] * text.copies for text in chosen)
    characters = sum(text.size for text in chosen)
    assert n_held_out > 0 and (n_held_out < characters or characters < 4)
    shuffled = draw.sample(chosen, len(chosen))
    assert choose_tails(shuffled, val_fraction) == tails


def test_more_documents_move_none_across_where_they_are_many():
    first = texts([500] * 1000)
    both = first + texts([500] * 1000, seed=1)
    before, after = choose_tails(first, 0.1), choose_tails(both, 0.1)
    assert all(after[text.number] == before[text.number] for text in first)


def test_little_text_holds_out_more_than_was_asked():
    assert held_out_fraction(0.005, 499_500) == pytest.approx(2**14 / 499_500)
    assert held_out_fraction(0.005, 20_000) == 0.1
    assert held_out_fraction(0.3, 20_000) == 0.3
    assert held_out_fraction(0.0005, 40 * 10**9, 10**6) == 0.0005
