"""Several sources with weights: what `data.mix` says, and whose turn it is when."""

from __future__ import annotations

import shlex
from fractions import Fraction
from math import gcd, lcm

import numpy as np

LONGEST_PERIOD = 10_000  # sequences; weights with four digits


def read_mix(mix: str) -> dict[str, int]:
    """Each source's share of a period of sequences, as in {"pydocs": 7, "book.txt": 3} for "pydocs:0.7 book.txt:0.3".

    A name with blanks stands in quotes, as in a shell.
    Raises ValueError with one sentence for what is no mixture.
    """
    weights: dict[str, Fraction] = {}
    for word in shlex.split(mix):
        name, _, number = word.rpartition(":")
        try:
            weight = Fraction(number)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not name or weight <= 0:
            raise ValueError(f"{word} is no source with its weight: write SOURCE:WEIGHT, as in pydocs:0.7 book.txt:0.3.")
        if name in weights:
            raise ValueError(f"{name} comes twice: give it one weight.")
        weights[name] = weight
    if not weights:
        raise ValueError("no source is named: write SOURCE:WEIGHT, as in pydocs:0.7 book.txt:0.3.")
    whole = lcm(*(weight.denominator for weight in weights.values()))
    counts = {name: int(weight * whole) for name, weight in weights.items()}
    divisor = gcd(*counts.values())
    if sum(counts.values()) // divisor > LONGEST_PERIOD:
        raise ValueError(f"the weights come out even only after {sum(counts.values()) // divisor:,} sequences: "
                         f"round them, so that it is at most {LONGEST_PERIOD:,}.")
    return {name: count // divisor for name, count in counts.items()}


class Turns:
    """Which source each sequence of an endless order comes from, as a pure function of its index.

    After n sequences, each source has had its share of n, less than one sequence more or less: so in any stretch the
    counts are within two of the weights.
    """

    def __init__(self, counts: list[int]) -> None:
        self.counts, self.period = np.array(counts), sum(counts)
        self.source = np.empty(self.period, dtype=np.int64)  # of each sequence of a period
        self.before = np.empty(self.period, dtype=np.int64)  # how many of the same source come before it in the period
        taken = [0] * len(counts)
        for n in range(self.period):
            # One more is not ahead of its share, and the one that must come soonest goes first: earliest deadline first
            # over proportionate windows, which meets all of them (Pfair scheduling, Baruah et al. 1996).
            ready = [i for i, count in enumerate(counts) if taken[i] * self.period < count * (n + 1)]
            source = min(ready, key=lambda i: -(-(taken[i] + 1) * self.period // counts[i]))
            self.source[n], self.before[n] = source, taken[source]
            taken[source] += 1

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the sequences at `index`: their sources, and which of its source's sequences each is."""
        period, within = np.divmod(index, self.period)
        source = self.source[within]
        return source, period * self.counts[source] + self.before[within]
