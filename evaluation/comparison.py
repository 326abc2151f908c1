"""Compare results of runs with several seeds: is a difference more than the noise between seeds?

The rule stays valid when the results are looked at after every seed. Lower results are better.
Knows only numbers: the result of each seed. Needs SciPy (pip install scipy).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from optional import import_optional
from terminal import counted

# The probability of calling a winner where there is no difference, over all looks together.
ALPHA = 0.05
# The difference in bits per byte that matters, unless the user says otherwise.
SMALLEST = 0.005
# The probability of finding a difference after as many seeds as `seeds_needed` says.
POWER = 0.8
MAX_SEEDS = 1000
ROUNDING = 1e-9
# The variance of the differences that are expected, in units of the variance between seeds. Any
# value is valid. With 10, three seeds can decide, and differences of one to five standard
# deviations need about as few seeds as with any other value.
EXPECTED = 10.0
# The rule of modded-nanogpt's track 3: z = 3.09 for a standard deviation of 0.0013, and the loss
# that 100 steps are worth.
SPEEDRUN_SCORE = 0.004
SPEEDRUN_LOSS_PER_STEP = 0.0045 / 100
Results = dict[int, float]  # by seed


@dataclass(frozen=True)
class Comparison:
    """The difference `second - first` of two mean results, with its standard error and p-value."""

    first: str
    second: str
    difference: float
    error: float
    p: float
    seeds: tuple[int, int]  # of both
    paired: bool
    tests: int = 1  # comparisons that `p` is adjusted for

    @property
    def is_decided(self) -> bool:
        return self.p <= ALPHA

    def more_seeds(self, size: float) -> int | None:
        """The number of further seeds that would show a difference of this size.

        None for more than MAX_SEEDS. An estimate, since the noise is estimated.
        """
        if self.paired:
            spread = self.error * math.sqrt(self.seeds[0])
        else:
            # As if both had the same noise.
            spread = self.error * math.sqrt(2 / sum(1 / count for count in self.seeds))
        needed = seeds_needed(size, spread, self.paired, ALPHA / self.tests)
        return None if needed is None else max(0, needed - min(self.seeds))

    def sentence(self, unit: str, smallest: float) -> str:
        """The answer, with the size of the difference, the number of seeds and the p-value."""
        # The difference, with its size in relation to the noise.
        seeds = f"{self.seeds[0]} seeds"
        if not self.paired:
            seeds = f"{self.seeds[0]} and {self.seeds[1]} seeds, not in pairs"
        p = f"p = {self.p:.2g}" if self.p >= 0.001 else "p < 0.001"
        if self.tests > 1:
            p += f" by Holm for {self.tests} comparisons"
        result = f"{abs(self.difference):.4f} ± {self.error:.4f} {unit} ({seeds}, {p})"
        better, worse = self.second, self.first
        if self.difference > 0:
            better, worse = worse, better
        if self.is_decided:
            return f"{better} is better than {worse} by {result}."

        # The number of seeds that would show a difference of the size that was found, unless it is
        # too small to matter.
        size = max(smallest, abs(self.difference))
        more = self.more_seeds(size)
        if more is None:
            outlook = f"more than {MAX_SEEDS:,} seeds would be needed to show one of {size:.2g}"
        elif more == 0:
            outlook = f"one of {size:.2g} would probably have shown"
        else:
            outlook = f"about {counted(more, 'more seed')} would show one of {size:.2g}"
        return (f"No difference beyond the noise between {self.first} and {self.second}: {better} "
                f"is lower by {result}; {outlook}.")


def import_stats() -> Any:
    """SciPy's statistics. Raises ValueError if SciPy is not installed."""
    import_optional("scipy", "Comparing runs needs SciPy", "scipy")
    from scipy import stats

    return stats


def p_value(t: Any, freedom: Any, n: Any) -> Any:
    """The p-value of Student's `t` of `n` values, valid after any number of looks.

    Its inverse is the ratio of the densities of `t` with a difference drawn from a normal
    distribution, and without one. Without a difference, that is a martingale that starts at 1, so
    the probability that it ever exceeds 1 / ALPHA is at most ALPHA (Wang and Ramdas, "Anytime-valid
    t-tests and confidence sequences for Gaussian means with unknown variance",
    arXiv:2310.03722: the Gaussian mixture).
    """
    density = import_stats().t.logpdf
    log_p = density(t, freedom) - density(t, freedom, scale=np.sqrt(1 + EXPECTED * n))
    return np.exp(np.minimum(0, log_p))


def threshold(freedom: Any, n: Any, alpha: float = ALPHA) -> Any:
    """The `t` from which `p_value` is at most `alpha`; infinite where `n` values cannot decide."""
    variance = 1 + EXPECTED * n
    ratio = (np.sqrt(variance) / alpha) ** (2 / (freedom + 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = freedom * (ratio - 1) / (1 - ratio / variance)
        return np.where(ratio < variance, np.sqrt(squared), np.inf)


def paired_test(differences: np.ndarray) -> tuple[Any, Any]:
    """The standard error and the p-value of the mean of `differences` `[..., n]`."""
    n = differences.shape[-1]
    test = import_stats().ttest_1samp(differences, 0, axis=-1)
    return differences.std(axis=-1, ddof=1) / math.sqrt(n), p_value(test.statistic, n - 1, n)


def unpaired_test(first: np.ndarray, second: np.ndarray) -> tuple[Any, Any]:
    """The standard error and the p-value of Welch's test of results `[..., n]` and `[..., m]`.

    The degrees of freedom are those of the smaller sample. With Welch's, looking again and again
    while only one of the samples grows found false winners in up to 10% of simulations.
    """
    counts = first.shape[-1], second.shape[-1]
    test = import_stats().ttest_ind(second, first, axis=-1, equal_var=False)
    variances = first.var(axis=-1, ddof=1) / counts[0] + second.var(axis=-1, ddof=1) / counts[1]
    n = 1 / sum(1 / count for count in counts)
    return np.sqrt(variances), p_value(test.statistic, min(counts) - 1, n)


def compare(first: str, second: str, results: dict[str, Results]) -> Comparison:
    """Compare two of the `results`: by the seeds that both have, or all if these are few.

    Raises ValueError for a single seed, a run that diverged, and where the seed has no effect.
    """
    for name in (first, second):
        refuse_diverged(name, results[name])
        if len(results[name]) < 2:
            raise ValueError(f"{name} has {len(results[name])} seed, and the noise between seeds "
                             f"is unknown: train it with two seeds or more.")
    # In pairs, the noise that a seed has in both cancels. A few pairs would leave out most results.
    shared = sorted(results[first].keys() & results[second].keys())
    fewer = min(len(results[first]), len(results[second]))
    paired = len(shared) > 1 and 2 * len(shared) >= fewer
    a, b = (np.array([results[name][seed] for seed in (shared if paired else results[name])])
            for name in (first, second))
    noise = np.ptp(b - a) if paired else max(np.ptp(a), np.ptp(b))

    # The standard error of the difference, and the p-value of a t-test. Without noise there is
    # nothing to test against; equal results mean that the settings have no effect.
    difference = float(b.mean() - a.mean())
    error, p = 0.0, 1.0
    if noise > ROUNDING:
        error, p = paired_test(b - a) if paired else unpaired_test(a, b)
    elif abs(difference) > ROUNDING:
        raise ValueError(f"{first} and {second} differ by {difference:g} for every seed: the seed "
                         f"has no effect, so the noise is unknown.")
    return Comparison(first, second, difference, float(error), float(p), (len(a), len(b)), paired)


def refuse_diverged(name: str, results: Results) -> None:
    for seed, result in results.items():
        if not math.isfinite(result):
            raise ValueError(f"{name} with seed {seed} diverged: its result is {result}. Name the "
                             f"other runs, or train it with other settings.")


def compare_all(results: dict[str, Results], reference: str = "") -> list[Comparison]:
    """Compare each of the others with the `reference`, or with the one with the lowest mean.

    p-values are adjusted by Holm's method for the number of comparisons. That is all pairs without
    a `reference`, since the results themselves choose the best.
    """
    if reference:
        pairs = [(reference, name) for name in results if name != reference]
    else:
        pairs = list(combinations(results, 2))
    compared = with_holm([compare(*pair, results) for pair in pairs])
    best = reference or min(results, key=lambda name: np.mean([*results[name].values()]))
    return [one for one in compared if best in (one.first, one.second)]


def with_holm(compared: list[Comparison]) -> list[Comparison]:
    """The comparisons with p-values that hold for all of them together (Holm 1979)."""
    # The smallest p-value is multiplied by the number of comparisons, the next by one less, etc.
    adjusted = list(compared)
    highest = 0.0
    order = sorted(range(len(compared)), key=lambda number: compared[number].p)
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(compared) - rank) * compared[number].p))
        adjusted[number] = replace(compared[number], p=highest, tests=len(compared))
    return adjusted


def seeds_needed(size: float, spread: float, paired: bool = True,
                 alpha: float = ALPHA) -> int | None:
    """The number of seeds that show a difference of this size with probability POWER.

    `spread` is the standard deviation of the difference of one pair. None for more than MAX_SEEDS.
    """
    if spread == 0:
        return 2
    n = np.arange(2, MAX_SEEDS + 1)
    # Far beyond any threshold, the distribution can no longer be computed.
    shift = np.minimum(size / spread * np.sqrt(n), 30)
    t = threshold(n - 1, n if paired else n / 2, alpha)
    enough = n[import_stats().nct.sf(t, n - 1, shift) >= POWER]
    return int(enough[0]) if len(enough) else None


def speedrun_score(losses: Sequence[float], steps: Sequence[float],
                   seeds: Sequence[float]) -> float:
    """How much better the second is by modded-nanogpt's track 3; from SPEEDRUN_SCORE it counts.

    Its noise and its value of a step are those of one recipe: GPT-2 small at a loss of 3.28.
    """
    gain = losses[0] - losses[1] + (steps[0] - steps[1]) * SPEEDRUN_LOSS_PER_STEP
    return gain / math.sqrt(1 / seeds[0] + 1 / seeds[1])
