"""Which text is held out for validation, decided from the lengths and hashes of documents.

Knows no documents and no files.
"""

from __future__ import annotations

from typing import NamedTuple

LEAST_HELD_OUT = 2**14  # characters
LARGEST_SHARE = 0.1  # of the text that is held out to reach LEAST_HELD_OUT
EXPECTED_DOCUMENTS = 10
TAIL = 2**12  # characters, about one context of 1,024 tokens
TOLERANCE = 0.25


class Text(NamedTuple):
    """A distinct document: a number in [0, 1) that its hash gives, its length, how often it occurs."""

    number: float
    length: int  # characters
    copies: int = 1

    @property
    def size(self) -> int:
        """The characters of all its copies."""
        return self.length * self.copies


def raised(val_fraction: float, characters: int, documents: int | None = None) -> float:
    """The share of the text to hold out: `val_fraction`, or more where that would be too little to measure a loss.

    `documents` is the number of documents where whole ones are drawn at random from it.
    """
    least = LEAST_HELD_OUT / max(1, characters)
    if documents:
        least = max(least, EXPECTED_DOCUMENTS / documents)
    return max(val_fraction, min(LARGEST_SHARE, least))


def choose(texts: list[Text], val_fraction: float) -> dict[float, int]:
    """For each document, by its number: how many characters at its end are held out (0: none; its length: all).

    Whole documents are held out by their numbers. A document that would be more than a third of what is held out gives
    its tail instead, if that is as long as TAIL. The order of `texts` does not matter.
    """
    characters = sum(text.size for text in texts)
    fraction = raised(val_fraction, characters)
    wanted = fraction * characters
    tails = dict.fromkeys((text.number for text in texts), 0)
    rest = []
    for text in texts:
        if gives_tail(text.size, text.length, fraction, wanted):
            tails[text.number] = tail_of(text.length, fraction)
        else:
            rest.append(text)
    for text in whole_documents(sorted(rest), fraction):
        tails[text.number] = text.length
    missing = wanted - sum(tails[text.number] * text.copies for text in texts)
    if missing > wanted / 2:
        # No document is long enough for its share and none is short enough to be held out whole.
        # The longest ones give more than their share, in tails that are long enough.
        longest = sorted((text for text in rest if not tails[text.number]), key=lambda text: (-text.size, text.number))
        longest = longest[: max(1, int(missing / TAIL))]
        for text in longest:
            tails[text.number] = tail_of(text.length, missing / len(longest) / text.size)
    return tails


def gives_tail(size: int, length: int, fraction: float, wanted: float) -> bool:
    """Whether a document is too large to be held out whole, and long enough to be divided."""
    return size > wanted / 3 and fraction * length >= TAIL


def tail_of(length: int, fraction: float) -> int:
    """The characters at a document's end that are held out, rounded as nanoGPT does."""
    return length - int(length * (1 - fraction))


def whole_documents(texts: list[Text], fraction: float) -> list[Text]:
    """About `fraction` of the text in whole documents, by their numbers; `texts` are in that order.

    The documents with numbers below `fraction`, whatever others there are, if their text comes close to it.
    """
    characters = sum(text.size for text in texts)
    wanted = fraction * characters
    most = min((1 + TOLERANCE) * wanted, (wanted + characters) / 2)  # never all of the text
    below = [text for text in texts if text.number < fraction]
    if (1 - TOLERANCE) * wanted <= sum(text.size for text in below) <= most:
        return below
    chosen, held_out = [], 0
    for text in texts:
        if held_out < wanted and held_out + text.size <= most:
            chosen.append(text)
            held_out += text.size
    return chosen
