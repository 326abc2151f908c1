"""Which of the settings that differ between runs mattered: Optuna's estimate from their settings and losses alone.

So a grid, a search and a handful of runs started by hand are all treated alike.
"""

from __future__ import annotations

from typing import Any

from report.history import History, are_numbers

FEWEST = 4  # runs: fewer say nothing about anything


def importance(runs: list[History], keys: list[str]) -> dict[str, float]:
    """The share of each of the settings `keys` in how much the losses differ, the highest first.

    It is fANOVA's (Hutter et al. 2014): a forest learns the loss, and its variance is divided. PED-ANOVA, which needs no
    scikit-learn, came out at anything from 5 to 99% for the setting that decided all, with a dozen runs. All `runs` have a
    score. Raises ValueError if there are too few or all are alike, and if Optuna or scikit-learn is not installed.
    """
    if len(runs) < FEWEST:
        raise ValueError(f"Importance needs {FEWEST} finished runs with all these settings, and there are {len(runs)}.")
    if len({run.score for run in runs}) == 1:
        raise ValueError("Importance cannot be told: all losses are the same.")
    try:
        import optuna
        import sklearn  # noqa: F401 (what Optuna's fANOVA is made with)
    except ImportError:
        raise ValueError("Importance needs Optuna and scikit-learn: pip install optuna scikit-learn.") from None
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {key: distribution([run.settings[key] for run in runs]) for key in keys}
    study = optuna.create_study()
    for run in runs:
        values = {key: run.settings[key] if hasattr(kinds[key], "low") else str(run.settings[key]) for key in keys}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=kinds, value=run.score))
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def distribution(values: list[Any]) -> Any:
    """The range that values of a setting come from, for Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if are_numbers(values):
        return FloatDistribution(min(values), max(values), log=min(values) > 0 and max(values) >= 10 * min(values))
    return CategoricalDistribution(sorted(set(map(str, values))))
