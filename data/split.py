"""Choose the validation text from the lengths and hashes of documents.

Knows no documents and no files.
"""

from typing import NamedTuple

# A corpus with less text than this is split with the lengths of all its documents known.
KNOWN_CHARACTERS = 2**24
# The most documents whose lengths are kept in memory.
KNOWN_DOCUMENTS = 2**17
LEAST_HELD_OUT = 2**14  # characters
# The largest fraction that is held out to reach LEAST_HELD_OUT.
LARGEST_SHARE = 0.1
EXPECTED_DOCUMENTS = 10
TAIL = 2**12  # characters, about 1,024 tokens
TOLERANCE = 0.25


class Text(NamedTuple):
    """A distinct document."""

    number: float  # in [0, 1), from its hash
    length: int  # characters
    copies: int = 1

    @property
    def size(self) -> int:
        """The characters of all copies."""
        return self.length * self.copies


def held_out_fraction(val_fraction: float, characters: int, documents: int | None = None) -> float:
    """`val_fraction`, or more if that is too little text to measure a loss.

    `documents` is the number of documents if whole ones are drawn at random.
    """
    least = LEAST_HELD_OUT / max(1, characters)
    if documents:
        least = max(least, EXPECTED_DOCUMENTS / documents)
    return max(val_fraction, min(LARGEST_SHARE, least))


def is_large(documents: int, characters: int, val_fraction: float) -> bool:
    """Whether a corpus of this size or more can be split by the hash of each document alone."""
    if documents >= KNOWN_DOCUMENTS:
        return True
    return (characters >= KNOWN_CHARACTERS and val_fraction * characters >= LEAST_HELD_OUT
            and val_fraction * documents >= EXPECTED_DOCUMENTS)


def choose_tails(texts: list[Text], val_fraction: float,
                 divisible: bool = True) -> dict[float, int]:
    """How many characters at the end of each document are held out, by its number.

    Most documents are held out as a whole or not at all, by their numbers. A document that is more
    than a third of the text to hold out gives its tail, if that has TAIL characters and documents
    are `divisible`. The order of `texts` does not matter.
    """
    # The number of characters to hold out.
    characters = sum(text.size for text in texts)
    fraction = held_out_fraction(val_fraction, characters)
    wanted = fraction * characters

    # Long documents give their tails.
    tails: dict[float, int] = {}
    others = []
    for text in texts:
        tails[text.number] = 0
        if divisible and gives_tail(text.size, text.length, fraction, wanted):
            tails[text.number] = tail_length(text.length, fraction)
        else:
            others.append(text)

    # Of the others, some are held out whole.
    for text in whole_documents(sorted(others), fraction):
        tails[text.number] = text.length
    if not divisible and len(texts) > 1 and not any(tails.values()):
        # Each document is longer than the text to hold out: take one all the same.
        chosen = min(texts)
        tails[chosen.number] = chosen.length

    # If more than half of them are still missing, long documents give longer tails.
    missing = wanted - sum(tails[text.number] * text.copies for text in texts)
    if missing > wanted / 2 and divisible:
        # No document is long enough for its share, or short enough to be held out whole. So the
        # longest ones give more than their share, in tails of at least TAIL characters.
        kept = [text for text in others if not tails[text.number]]
        kept.sort(key=lambda text: (-text.size, text.number))
        longest = kept[: max(1, int(missing / TAIL))]
        for text in longest:
            tails[text.number] = tail_length(text.length, missing / len(longest) / text.size)
    return tails


def gives_tail(size: int, length: int, fraction: float, wanted: float) -> bool:
    """Whether a document is too large to be held out whole, and long enough to be divided."""
    return size > wanted / 3 and fraction * length >= TAIL


def tail_length(length: int, fraction: float) -> int:
    """The characters to hold out at a document's end, rounded as in nanoGPT."""
    return length - int(length * (1 - fraction))


def whole_documents(texts: list[Text], fraction: float) -> list[Text]:
    """Whole documents with about `fraction` of the text. `texts` are sorted by their numbers.

    These are the documents with numbers below `fraction`, if they have about that much text. Then
    the choice does not depend on other documents.
    """
    characters = sum(text.size for text in texts)
    wanted = fraction * characters
    # Some text must be left for training.
    most = min((1 + TOLERANCE) * wanted, (wanted + characters) / 2)
    below = [text for text in texts if text.number < fraction]
    if (1 - TOLERANCE) * wanted <= sum(text.size for text in below) <= most:
        return below
    # Otherwise take documents in the order of their numbers, until there is enough text.
    chosen, held_out = [], 0
    for text in texts:
        if held_out < wanted and held_out + text.size <= most:
            chosen.append(text)
            held_out += text.size
    return chosen
