"""Which of the settings that differ between runs mattered: Optuna's estimate from their settings and losses alone.

So a grid, a search and a handful of runs started by hand are all treated alike.
"""

from __future__ import annotations

import warnings
from typing import Any

from report.history import History, are_numbers

FEWEST = 4  # runs: fewer say nothing about anything


def importance(runs: list[History], keys: list[str]) -> dict[str, float]:
    """The share of each of the settings `keys` in reaching the best losses (PED-ANOVA, arXiv:2304.10255), highest first.

    All `runs` have a validation loss. Raises ValueError if there are too few, and if Optuna is not installed.
    """
    if len(runs) < FEWEST:
        raise ValueError(f"Importance needs {FEWEST} finished runs with all these settings, and there are {len(runs)}.")
    try:
        import optuna
    except ImportError:
        raise ValueError("Importance needs Optuna: pip install optuna.") from None
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {key: distribution([run.settings[key] for run in runs]) for key in keys}
    study = optuna.create_study()
    for run in runs:
        values = {key: run.settings[key] if hasattr(kinds[key], "low") else str(run.settings[key]) for key in keys}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=kinds, value=run.best_loss))
    share = max(0.1, min(0.5, 5 / len(runs)))  # the best tenth, but at least five runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=share))


def distribution(values: list[Any]) -> Any:
    """The range that values of a setting come from, for Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if are_numbers(values):
        return FloatDistribution(min(values), max(values), log=min(values) > 0 and max(values) >= 10 * min(values))
    return CategoricalDistribution(sorted(set(map(str, values))))
