"""Read a run's folder: settings, losses, samples, environment. Changes nothing."""

import math
import re
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import atomic
from checkpointing.provenance import STARTS
from checkpointing.run_folder import check_file_types
from conf.identity import flat
from report import results
from report.metrics import Rows, read_rows, table, thinned
from setting import as_word
from terminal import counted, escaped, say

# libyaml's loader is ten times as fast, where PyYAML was built with it.
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
AXES = ("steps", "tokens", "seconds")
LOSS, BITS = "best validation loss", "bits per byte"
# Settings that can be "auto", and the names of their values in the record of a start.
RECORDED = {"training.device": "device", "training.precision": "precision",
            "training.compile": "compiled"}
# In the folder of a run that was evaluated.
EVALUATION = "evaluation.json"
# The beginning of the names of metrics on standard tasks.
TASKS = "tasks/"
# In the folder of a run that a search stopped early.
PRUNED = "pruned.json"
MAX_SETTINGS = 2**20  # bytes of a config.yaml
# Errors of reading files that no training wrote.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
          yaml.YAMLError)


@dataclass(frozen=True, eq=False)
class History:
    """The content of a run's folder. Losses are in nats per token; unknown values are None.

    `training`, `validation` and the values of `diagnostics` are curves, arrays `[n, 6]`: steps,
    tokens, seconds, and the mean, lowest and highest value since the point before.
    """

    name: str
    settings: dict[str, Any]  # {"model.n_layer": 4, ...}
    environment: dict[str, Any]  # of the last start
    training: np.ndarray
    validation: np.ndarray
    diagnostics: dict[str, np.ndarray]
    samples: list[tuple[int, str]]  # step and text
    reached: tuple[int, int, float]  # steps, tokens, seconds
    finished: bool
    state: str  # such as "finished" or "30 of 60 steps"
    first_loss: float | None = None  # in training, before the first update
    train_loss: float | None = None  # the mean of the last twentieth of the steps
    last_loss: float | None = None  # in validation
    best_loss: float | None = None
    best_step: int | None = None
    bits_per_byte: float | None = None  # at the best step
    measure: str = LOSS  # LOSS, or BITS for runs with different tokens
    evaluated: tuple[dict[str, Any], ...] = ()  # the models in evaluation.json, this run's

    @property
    def score(self) -> float | None:
        """The result that runs are compared by; lower is better. None if it is not finite."""
        score = self.best_loss if self.measure == LOSS else self.bits_per_byte
        return score if score is not None and math.isfinite(score) else None

    @property
    def unit_factor(self) -> float | None:
        """The factor from nats per token to the unit of `measure`."""
        if self.measure == LOSS:
            return 1.0
        if self.bits_per_byte and self.best_loss:
            return self.bits_per_byte / self.best_loss
        return None


def open_history(folder: Path, name: str) -> History:
    """Read a run. Raises ValueError for a folder that is not a run or that no training wrote."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run: it has no config.yaml.")
    check_file_types(folder)
    try:
        return read_history(folder, name)
    except DAMAGE as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"{folder} is not a run that nanohydra wrote ({reason}).") from None


def read_history(folder: Path, name: str) -> History:
    # Read the files of the run.
    settings = read_settings(folder / "config.yaml")
    rows = read_rows(folder / "metrics.jsonl")
    starts = read_rows(folder / STARTS)
    last_start = starts[-1] if starts else {}

    # Summarize the losses in training and in validation.
    trained, validated = table(rows, "loss"), table(rows, "val_loss")
    losses: dict[str, Any] = {}
    reached = (0, 0, 0.0)
    if len(trained):
        reached = (int(rows[-1]["step"]), *map(float, trained[-1, 1:3]))
        if not all(map(math.isfinite, reached)):
            raise ValueError("the last tokens or seconds are not finite")
        losses["first_loss"] = float(trained[0, 3])
        losses["train_loss"] = float(trained[-math.ceil(len(trained) / 20) :, 3].mean())
        # Rows of validation have no tokens and seconds: they are those of the training step.
        for axis in (1, 2):
            validated[:, axis] = np.interp(validated[:, 0], trained[:, 0], trained[:, axis])
    if len(validated):
        rows_with_loss = (row for row in rows if row.get("val_loss") is not None)
        # NaN is less than no number, so it would stay the lowest.
        best = min(rows_with_loss, key=lambda row: (math.isnan(row["val_loss"]), row["val_loss"]))
        bits = best.get("bits_per_byte")
        losses["last_loss"] = float(validated[-1, 3])
        losses["best_loss"] = float(best["val_loss"])
        losses["best_step"] = best["step"]
        losses["bits_per_byte"] = None if bits is None else float(bits)

    # How far the run is, and what else its files tell.
    finished, state = state_of(folder, rows, reached, settings)
    environment = last_start | {"starts": len(starts)} if starts else {}
    samples = [(row["step"], str(row["sample"])) for row in rows if "sample" in row]
    return History(
        escaped(name, keep=""), resolved(settings, last_start), environment, thinned(trained),
        thinned(validated), diagnostics(rows, settings), samples, reached, finished, state,
        evaluated=read_evaluation(folder / EVALUATION, name), **losses)


def read_evaluation(path: Path, name: str) -> tuple[dict[str, Any], ...]:
    """The results of the last evaluation of a run; none if there was none, or if it is damaged."""
    try:
        models = [model | {"name": name} for model in atomic.read_json(path)["models"]]
        # Whether they can be shown.
        results.cells(models)
        return tuple(models)
    except FileNotFoundError:
        return ()
    except (OSError, *DAMAGE):
        say(f"{path} is damaged and left out: run eval.py again.", sys.stderr)
        return ()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml. Raises ValueError for aliases, and if it is too large.

    A few lines with aliases can stand for more than any memory holds.
    """
    config = atomic.read_regular(path, MAX_SETTINGS)
    # libyaml refuses the bytes of file names that are not UTF-8, which YAML writes as surrogates.
    config = re.sub(rb"\\uDC[89A-F].", rb"\\uFFFD", config)
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(config, SAFE_LOADER)):
        raise ValueError("config.yaml has aliases")
    settings = flat(yaml.load(config, SAFE_LOADER))
    return {escaped(key, keep=""): value for key, value in settings.items()}


def state_of(folder: Path, rows: Rows, reached: tuple[int, int, float],
             settings: dict[str, Any]) -> tuple[bool, str]:
    """Whether a run is finished (a pruned one is not), and its state in words."""
    steps, _, seconds = reached
    max_steps, max_seconds = map(settings.get, ("training.max_steps", "training.max_seconds"))
    # The rows of the last step: of its training, its validation, tasks and a sample.
    last_rows = takewhile(lambda row: row["step"] == rows[-1]["step"], reversed(rows))

    # It has reached a limit, or stopped early, or is unfinished.
    finished = True
    if max_steps is not None and (steps >= max_steps or (max_seconds and seconds >= max_seconds)):
        state = "finished"
    elif any(row.get("stopped_early") for row in last_rows):
        state = f"stopped early, after {counted(steps, 'step')}"
    else:
        finished = False
        state = counted(steps, "step")
        if max_steps:
            state = f"{steps:,} of {counted(max_steps, 'step')}"
        # A run that was resumed is beyond the step at which it was pruned.
        if any(steps <= row["step"] for row in read_rows(folder / PRUNED)):
            state = f"pruned after {state}"
    nonfinite = len(list(folder.glob("nonfinite/*.json")))
    return finished, f"{state}, {nonfinite} not finite" if nonfinite else state


def diagnostics(rows: Rows, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The curves of learning rate, gradient norm, speed and tasks that were recorded."""
    # A row has the learning rate as a fraction of the peak.
    rates = table(rows, "lr_scale")
    peak = settings.get("optim.lr")
    if isinstance(peak, int | float):
        rates[:, 3] *= peak
    # The speed in tokens per second, by the mean number of tokens of a step.
    speeds = table(rows, "step_ms")
    speeds = speeds[(speeds[:, 0] > 0) & (speeds[:, 3] > 0)]
    speeds[:, 3] = 1000 * speeds[:, 1] / speeds[:, 0] / speeds[:, 3]
    norms = table(rows, "gradient_norm")
    curves = {"learning rate": rates, "gradient norm": norms, "tokens per second": speeds}
    tasks = dict.fromkeys(key for row in rows for key in row if key.startswith(TASKS))
    curves |= {escaped(key.removeprefix(TASKS), keep=""): table(rows, key) for key in tasks}
    return {name: thinned(points) for name, points in curves.items() if len(points)}


def resolved(settings: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """The settings with the values that "auto" stood for at a start."""
    values = {key: as_word(start[name]) for key, name in RECORDED.items()
              if settings.get(key) == "auto" and start.get(name) is not None}
    return settings | values
