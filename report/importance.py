"""The importance of settings, estimated by Optuna from the settings and results of runs alone.

So runs of a grid, of a search and runs that were started by hand are treated alike.
"""

from typing import Any

from optional import import_optional
from report.history import History
from report.runs import are_numbers

MIN_RUNS = 4


def importance(runs: list[History], keys: list[str]) -> dict[str, float]:
    """The share of each of the settings `keys` in the differences of the scores, highest first.

    It is fANOVA's (Hutter et al. 2014): a random forest learns the score, and its variance is
    divided. PED-ANOVA, which needs no scikit-learn, gave anything from 5 to 99% to the one setting
    that decided, with a dozen runs. All `runs` have a score. Raises ValueError for fewer than
    MIN_RUNS, if all scores are equal, and if Optuna or scikit-learn is not installed.
    """
    # What is needed: runs, different scores, and two packages.
    if len(runs) < MIN_RUNS:
        needed = f"{MIN_RUNS} finished runs with all these settings"
        raise ValueError(f"Importance needs {needed}; there are {len(runs)}.")
    if len({run.score for run in runs}) == 1:
        raise ValueError("Importance cannot be estimated: all losses are the same.")
    # Optuna's fANOVA needs scikit-learn.
    for package in ("optuna", "sklearn"):
        import_optional(package, "Importance needs Optuna and scikit-learn", "optuna scikit-learn")
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    # A study with a trial for each run, as if Optuna had suggested its settings.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {key: as_parameter([run.settings[key] for run in runs]) for key in keys}
    distributions = {key: distribution for key, (distribution, _) in columns.items()}
    study = optuna.create_study()
    for number, run in enumerate(runs):
        params = {key: values[number] for key, (_, values) in columns.items()}
        study.add_trial(optuna.trial.create_trial(
            params=params, distributions=distributions, value=run.score))
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def as_parameter(values: list[Any]) -> tuple[Any, list[Any]]:
    """The distribution of a setting's values for Optuna, and the values as it takes them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if are_numbers(values):
        low, high = min(values), max(values)
        return FloatDistribution(low, high, log=low > 0 and high >= 10 * low), values
    texts = [str(value) for value in values]
    return CategoricalDistribution(sorted(set(texts))), texts
