"""The order of sequences: a keyed permutation of any length, and the parts of a mixture.

It is frozen: another one would change the batches of resumed runs.
"""

import numpy as np

FEISTEL_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a permutation of `range(n)` to `index`. Each element has its own key.

    A Feistel network permutes the next power of four. Results of n or more are permuted again
    (cycle walking, Black and Rogaway 2002). O(1) per element, without a table.
    """
    # The bits of each half: 2 * half bits hold all numbers below n.
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)

    def feistel(x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for r in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(keys + np.uint64(r))) & low)
        return left << half | right

    # At most three of four results are outside, so a few rounds are enough.
    result = feistel(index.astype(np.uint64), keys)
    outside = result >= n
    while outside.any():
        result[outside] = feistel(result[outside], keys[outside])
        outside = result >= n
    return result.astype(np.int64)


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
