"""Scaling laws: the loss as a function of the size of a model and its training tokens.

L(N, D) = E + A / N^alpha + B / D^beta is fitted as in approach 3 of Hoffmann et al. 2022
(arXiv:2203.15556): a Huber loss of the log losses, minimized by L-BFGS from a grid of starts.
Numbers only: knows nothing of runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Where the Huber loss of a difference of log losses turns from squares to absolute values.
HUBER = 1e-3
# The exponents that a fit starts from, each pair with the best E, A and B for it.
START_EXPONENTS = np.array([0.1, 0.2, 0.3, 0.45, 0.65, 0.9, 1.2])
STARTS = 3  # pairs of exponents that L-BFGS starts from
# Each term starts from at least this part of the loss. The gradient of the log of a smaller one is
# so small that it can stay where it is.
SMALLEST_START = 0.1
# Of log E, the logs of both other terms, alpha and beta. Without the limits, noise can make an
# exponent negative, or A or B zero.
BOUNDS = [(-30.0, None)] * 3 + [(0.05, 3.0)] * 2
LEVEL = 0.95  # the part of intervals that contain the true number
MIN_RUNS = 8  # for five constants and their intervals
# The values that the correlation of the noise of runs of one size can have.
CORRELATIONS = np.linspace(0, 0.95, 20)
NEW_RUNS = 20  # drawn for each law: with a single one, intervals vary more between seeds


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of the law. Losses are in the unit of the fitted ones."""

    E: float  # of a model of any size after any number of tokens
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, size: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """The expected loss of a model of `size` after `tokens`."""
        return self.E + self.A / size**self.alpha + self.B / tokens**self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """The size and the tokens with the lowest loss for `flops` = 6 size tokens.

        In closed form: Hoffmann et al. 2022, equation 4.
        """
        total = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        return (ratio * (flops / 6) ** (self.beta / total),
                (flops / 6) ** (self.alpha / total) / ratio)


class LogLaw:
    """The law in the form that is optimized: its constants are five numbers of similar scale.

    These are log E, the logs of both other terms at the mean log size and the mean log tokens of
    the fitted runs, alpha and beta.
    """

    def __init__(self, size: np.ndarray, tokens: np.ndarray) -> None:
        self.means = np.log(size).mean(), np.log(tokens).mean()
        self.u = np.log(size) - self.means[0]
        self.v = np.log(tokens) - self.means[1]

    def terms(self, x: np.ndarray) -> np.ndarray:
        """The logs of the three terms `[3, n]`."""
        return np.stack((np.full_like(self.u, x[0]), x[1] - x[3] * self.u, x[2] - x[4] * self.v))

    def objective(self, x: np.ndarray, log_losses: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of the Huber losses, in units of HUBER squared, and its gradient."""
        terms = self.terms(x)
        predicted = np.logaddexp.reduce(terms)
        difference = (predicted - log_losses) / HUBER
        # The Huber loss is d**2 / 2 near zero and |d| - 1/2 beyond; its derivative is clip(d).
        slope = np.clip(difference, -1, 1)
        value = (slope * (difference - slope / 2)).sum()
        return value, self.jacobian(terms, predicted).T @ slope / HUBER

    def jacobian(self, terms: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """The derivatives of the `predicted` log losses `[n]` by the five constants `[n, 5]`."""
        # The share of each term in the loss is the derivative by its log.
        e, a, b = np.exp(terms - predicted)
        return np.stack((e, a, b, -a * self.u, -b * self.v), axis=1)

    def starts(self, losses: np.ndarray) -> list[np.ndarray]:
        """The best points of a grid of exponents.

        For given exponents the law is linear in E, A and B; these are the least squares of relative
        differences.
        """
        from scipy.optimize import nnls

        found = []
        for alpha in START_EXPONENTS:
            for beta in START_EXPONENTS:
                columns = np.stack((np.ones_like(losses), np.exp(-alpha * self.u),
                                    np.exp(-beta * self.v)), axis=1)
                scales, error = nnls(columns / losses[:, None], np.ones_like(losses))
                with np.errstate(divide="ignore"):
                    found.append((error, np.array([*np.log(scales), alpha, beta])))
        found.sort(key=lambda pair: pair[0])
        return [x for _, x in found[:STARTS]]

    def fit(self, losses: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
        """The best of the minima that L-BFGS finds from `starts`."""
        from scipy.optimize import minimize

        lowest = np.array([math.log(SMALLEST_START * losses.min())] * 3 + [-np.inf] * 2)
        results = [
            minimize(self.objective, np.maximum(x, lowest), args=(np.log(losses),), jac=True,
                     method="L-BFGS-B", bounds=BOUNDS,
                     options={"maxiter": 1000, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-6})
            for x in starts
        ]
        return min(results, key=lambda result: result.fun).x

    def law(self, x: np.ndarray) -> ScalingLaw:
        e, a, b, alpha, beta = map(float, x)
        # Rounded, as a fit cannot reach an E of exactly zero.
        return ScalingLaw(round(math.exp(e), 6), math.exp(a + alpha * self.means[0]),
                          math.exp(b + beta * self.means[1]), alpha, beta)


@dataclass(frozen=True)
class Fit:
    """A law that was fitted to runs, and what a bootstrap found of its uncertainty."""

    law: ScalingLaw
    laws: list[ScalingLaw]  # fitted to redrawn losses
    noise: np.ndarray  # of the log losses of new runs, for each of these laws `[laws, NEW_RUNS]`

    def interval(self, number: Callable[[ScalingLaw], float]) -> tuple[float, float]:
        """The interval of a number that follows from the law."""
        return quantiles(np.array([number(law) for law in self.laws]))

    def interval_of_run(self, size: float, tokens: float) -> tuple[float, float]:
        """The interval of the loss of a new run, which differs from the law as the others do."""
        losses = np.array([[law.loss(size, tokens)] for law in self.laws])
        return quantiles(losses * np.exp(self.noise))


def quantiles(values: np.ndarray) -> tuple[float, float]:
    # This method's intervals contain LEVEL of further draws, even if there are few draws.
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="weibull")
    return float(low), float(high)


def fit_law(size: np.ndarray, tokens: np.ndarray, losses: np.ndarray, draws: int = 500,
            seed: int = 0) -> Fit:
    """Fit the law to runs, and `draws` times to redrawn losses.

    A redrawn loss is that of the fitted law with noise like that of the runs: a parametric
    bootstrap, which keeps the grid.

    Raises ValueError for runs that do not determine a law.
    """
    count = len(losses)
    if count < MIN_RUNS or len(set(size)) < 3 or len(set(tokens)) < 3:
        raise ValueError(
            f"A scaling law needs at least {MIN_RUNS} finished runs, of three sizes and three "
            f"numbers of tokens; there are {count}, of {len(set(size))} and {len(set(tokens))}.")
    # Fit the law to the losses themselves.
    grid = LogLaw(size, tokens)
    best = grid.fit(losses, grid.starts(losses))
    terms = grid.terms(best)
    fitted = np.logaddexp.reduce(terms)

    # Fit it again to redrawn losses, from the constants that were found.
    rng = np.random.default_rng(seed)
    noise, of_new = draw_noise(np.log(losses) - fitted, grid.jacobian(terms, fitted), size,
                               draws, rng)
    laws = [grid.law(grid.fit(np.exp(fitted + one), [best])) for one in noise]
    return Fit(grid.law(best), laws, of_new)


def draw_noise(residuals: np.ndarray, jacobian: np.ndarray, size: np.ndarray, draws: int,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Normal noise of the log losses of the runs `[draws, n]`, and of new runs `[draws, NEW_RUNS]`.

    The noise of runs of one size is correlated: they can differ alike from the law. A few sizes
    hardly determine the correlation, and a few runs the scale, so each draw has others: a
    correlation by its restricted likelihood (REML), and a scale as in Student's t distribution.
    New runs are independent, as those of another size.
    """
    # Combinations of the residuals that small changes of the law's constants leave as they are.
    count, constants = jacobian.shape
    contrasts = np.linalg.qr(jacobian, mode="complete")[0][:, constants:].T
    values = contrasts @ residuals

    # For each correlation, the covariances of noise of scale 1 and the likelihood of the values.
    same_size = size[:, None] == size
    covariances = np.array([c * same_size + (1 - c) * np.eye(count) for c in CORRELATIONS])
    of_contrasts = contrasts @ covariances @ contrasts.T
    squares = np.einsum("i,kij,j->k", values, np.linalg.inv(of_contrasts), values)
    logs = -(np.linalg.slogdet(of_contrasts)[1] + len(values) * np.log(squares)) / 2
    likelihood = np.exp(logs - logs.max())

    # Draw a correlation and a scale, and noise with them.
    drawn = rng.choice(len(CORRELATIONS), draws, p=likelihood / likelihood.sum())
    scales = np.sqrt(squares[drawn] / rng.chisquare(len(values), draws))[:, None]
    roots = np.linalg.cholesky(covariances)[drawn]
    noise = (roots @ rng.normal(size=(draws, count, 1)))[..., 0]
    return scales * noise, scales * rng.normal(size=(draws, NEW_RUNS))
