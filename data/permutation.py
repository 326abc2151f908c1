"""A keyed permutation of any length, without a table.

It is frozen: another one would change the batches of resumed runs.
"""

from __future__ import annotations

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
