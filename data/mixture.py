"""Mixtures: the weights in `data.mix`, and the part from which each training sequence comes."""

from __future__ import annotations

import shlex
from fractions import Fraction
from math import gcd, lcm

import numpy as np

LONGEST_PERIOD = 10_000  # sequences; weights with four digits
EXAMPLE = "write SOURCE:WEIGHT, as in pydocs:0.7 book.txt:0.3"


def read_mix(mix: str) -> dict[str, int]:
    """The number of sequences of each source in a period.

    "pydocs:0.7 book.txt:0.3" gives {"pydocs": 7, "book.txt": 3}. Names with blanks are quoted as in
    a shell. Raises ValueError with one sentence for an invalid mixture.
    """
    # Read the weights as fractions, so that 0.7 and 0.3 are exactly 7 and 3 tenths.
    try:
        words = shlex.split(mix)
    except ValueError:
        raise ValueError(f"a quotation mark is not closed: {EXAMPLE}.") from None
    weights: dict[str, Fraction] = {}
    # A part is SOURCE:WEIGHT; its name may contain colons.
    for word in words:
        name, _, number = word.rpartition(":")
        try:
            # Fraction alone would compute all digits of 1e-999999999.
            weight = Fraction(number if "/" in number else str(float(number)))
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not name or weight <= 0:
            raise ValueError(f"{word} is not a source with its weight: {EXAMPLE}.")
        if name in weights:
            raise ValueError(f"{name} is given twice: give it one weight.")
        weights[name] = weight
    if not weights:
        raise ValueError(f"the mixture names no source: {EXAMPLE}.")

    # The smallest whole numbers with the same ratios.
    denominator = lcm(*(weight.denominator for weight in weights.values()))
    counts = {name: int(weight * denominator) for name, weight in weights.items()}
    divisor = gcd(*counts.values())
    period = sum(counts.values()) // divisor
    if period > LONGEST_PERIOD:
        raise ValueError(f"the weights repeat only after {period:,} sequences, at most "
                         f"{LONGEST_PERIOD:,} are supported: round them.")
    return {name: count // divisor for name, count in counts.items()}


class Interleaving:
    """The part of each sequence in an endless order, as a pure function of the sequence's index.

    After n sequences, each part has supplied its share of n to within one sequence; in any stretch,
    to within two.
    """

    def __init__(self, weights: list[int]) -> None:
        self.weights, self.period = np.array(weights), sum(weights)
        # For each sequence of a period: its part, and the earlier sequences of the same part.
        self.part = np.empty(self.period, dtype=np.int64)
        self.earlier = np.empty(self.period, dtype=np.int64)
        taken = [0] * len(weights)
        for n in range(self.period):
            # Earliest deadline first: among the parts that are not ahead of their share, take the
            # one whose next sequence is due first (Pfair scheduling, Baruah et al. 1996).
            deadlines = {}
            for part, weight in enumerate(weights):
                if taken[part] * self.period < weight * (n + 1):
                    deadlines[part] = -(-(taken[part] + 1) * self.period // weight)
            part = min(deadlines, key=deadlines.__getitem__)
            self.part[n], self.earlier[n] = part, taken[part]
            taken[part] += 1

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The parts of the sequences at `index`, and the index of each within its part."""
        period, position = np.divmod(index, self.period)
        part = self.part[position]
        return part, period * self.weights[part] + self.earlier[position]
