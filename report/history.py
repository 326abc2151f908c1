"""Read a run's folder: settings, losses, samples, environment. Changes nothing.

A run that is training or was killed can leave an incomplete last line: lines that cannot be read are skipped.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from checkpointing.provenance import STARTS
from checkpointing.run_folder import check_file_types, find_run, is_sweep
from conf.identity import flat, kind
from terminal import counted, escaped

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
POINTS = 250  # of a curve: more than a picture can show
AXES = ("steps", "tokens", "seconds")
LOSS, BITS = "best validation loss", "bits per byte"
PRUNED = "pruned.json"  # in the folder of a run that a search stopped early


@dataclass(frozen=True, eq=False)
class History:
    """What a run's folder holds. Losses are in nats per token; None where there is none.

    A curve is an array `[n, 6]`: steps, tokens, seconds, and the mean, lowest and highest value since the
    point before.
    """

    folder: Path
    name: str
    settings: dict[str, Any]  # {"model.n_layer": 4, ...}
    environment: dict[str, Any]  # of the last start
    training: np.ndarray  # curve
    validation: np.ndarray  # curve
    diagnostics: dict[str, np.ndarray]  # curves: "learning rate", "gradient norm", "tokens per second"
    samples: list[tuple[int, str]]  # of a step
    reached: tuple[int, int, float]  # steps, tokens, seconds
    first_loss: float | None  # before anything was learned
    train_loss: float | None  # the mean of the last twentieth of the steps
    last_loss: float | None  # in validation
    best_loss: float | None
    best_step: int | None
    bits_per_byte: float | None  # at the best step
    bits_per_nat: float | None  # bits per byte for a loss of one nat per token
    finished: bool
    state: str  # such as "finished" or "30 of 60 steps"
    measure: str = LOSS  # what it is compared by: see best_first

    @property
    def score(self) -> float | None:
        """The result that runs are compared by, the lower the better."""
        return self.best_loss if self.measure == LOSS else self.bits_per_byte

    @property
    def unit(self) -> float | None:
        """The factor from nats per token to the unit of `measure`; None if it is not known."""
        return 1.0 if self.measure == LOSS else self.bits_per_nat


def best_first(runs: list[History]) -> list[History]:
    """The runs by their best losses, those without one last.

    Runs with different texts or tokenizers are compared by bits per byte: their tokens stand for different
    amounts of text, so their losses per token cannot be compared.
    """
    if not share_tokens(runs):
        runs = [replace(run, measure=BITS) for run in runs]
    return sorted(runs, key=lambda run: (math.inf if run.score is None else run.score, run.name))


def share_tokens(runs: list[History]) -> bool:
    """Whether all runs have the same data settings, and so the same text in the same tokens."""
    def data(run: History) -> dict[str, str]:
        return {key: str(value) for key, value in run.settings.items()
                if key.startswith("data.") or key == "model.vocab_size"}

    return all(data(run) == data(runs[0]) for run in runs)


def open_history(folder: Path, name: str) -> History:
    """Raises ValueError for a folder that is not a run's, or holds what no training writes."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run: it has no config.yaml.")
    check_file_types(folder)
    try:
        config = (folder / "config.yaml").read_bytes()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(config, SAFE_LOADER)):
            raise ValueError("config.yaml has aliases")  # a few lines of which can stand for more than any memory holds
        settings = flat(yaml.load(config, SAFE_LOADER))
        rows = read_rows(folder / "metrics.jsonl")
        starts = read_rows(folder / STARTS)
        trained = table(rows, "loss")
        validated = table(rows, "val_loss")
        if len(validated) and len(trained):  # a validation's tokens and seconds are those of its training step
            for axis in (1, 2):
                validated[:, axis] = np.interp(validated[:, 0], trained[:, 0], trained[:, axis])
        best = min((row for row in rows if row.get("val_loss") is not None), key=lambda row: row["val_loss"], default={})
        nonfinite = len(list(folder.glob("nonfinite/*.json")))
        reached = (int(rows[-1]["step"]), *map(float, trained[-1, 1:3])) if len(trained) else (0, 0, 0.0)
        stopped_early = any(row.get("stopped_early") and row["step"] == rows[-1]["step"] for row in rows[-2:])
        pruned = any(reached[0] <= row["step"] for row in read_rows(folder / PRUNED))
        finished, state = how_far(reached, settings, stopped_early, pruned)
        if nonfinite:
            state += f", {nonfinite} not finite"
        loss, bits = number(best.get("val_loss")), number(best.get("bits_per_byte"))
        return History(
            folder, escaped(name, keep=""), resolved(settings, starts[-1]) if starts else settings,
            starts[-1] | {"starts": len(starts)} if starts else {},
            thinned(trained), thinned(validated), diagnostics(rows, settings),
            [(row["step"], str(row["sample"])) for row in rows if "sample" in row],
            reached,
            first_loss=float(trained[0, 3]) if len(trained) else None,
            train_loss=float(trained[-math.ceil(len(trained) / 20):, 3].mean()) if len(trained) else None,
            last_loss=float(validated[-1, 3]) if len(validated) else None,
            best_loss=loss, best_step=best.get("step"),
            bits_per_byte=bits, bits_per_nat=bits / loss if bits and loss else None,
            finished=finished, state=state)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} is not a run that nanohydra wrote ({str(error).splitlines()[0][:100]}).") from None


def number(value: Any) -> float | None:
    return None if value is None else float(value)


def how_far(reached: tuple[int, int, float], settings: dict[str, Any], stopped_early: bool,
            pruned: bool) -> tuple[bool, str]:
    """Whether a run is finished, and its state in words.

    `stopped_early`: by training.patience; `pruned`: by a search, so it is not finished.
    """
    steps, _, seconds = reached
    planned, most = settings.get("training.max_steps"), settings.get("training.max_seconds")
    if planned is not None and (steps >= planned or bool(most and seconds >= most)):
        return True, "finished"
    if stopped_early:
        return True, f"stopped early, after {counted(steps, 'step')}"
    state = f"{steps:,} of {counted(planned, 'step')}" if planned else counted(steps, "step")
    return False, f"pruned after {state}" if pruned else state


def diagnostics(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The curves of learning rate, gradient norm and speed, of those that were recorded."""
    peak = settings.get("optim.lr")
    rates, speeds = table(rows, "lr_scale"), table(rows, "step_ms")
    rates[:, 3] *= peak if isinstance(peak, int | float) else 1.0
    speeds = speeds[(speeds[:, 0] > 0) & (speeds[:, 3] > 0)]
    tokens_per_step = speeds[:, 1] / speeds[:, 0]
    speeds[:, 3] = 1000 * tokens_per_step / speeds[:, 3]
    curves = {"learning rate": rates, "gradient norm": table(rows, "gradient_norm"), "tokens per second": speeds}
    return {name: thinned(points) for name, points in curves.items() if len(points)}


def resolved(settings: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """The settings with the values that "auto" stood for at that start."""
    came_to = {"training.device": start.get("device"), "training.precision": start.get("precision"),
               "training.compile": {True: "true", False: "false"}.get(start.get("compiled"))}
    return settings | {key: value for key, value in came_to.items() if settings.get(key) == "auto" and value is not None}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects; none if it is not there."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    gc.disable()  # which would look through all these objects again and again: a quarter of the time
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # in one call: half the time
    except (ValueError, RecursionError):
        rows = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    finally:
        gc.enable()
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def table(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """Steps, tokens, seconds and the value `key` `[N, 4]` of the rows that have it."""
    return np.array([(row["step"], row.get("tokens", 0), row.get("seconds", 0), row[key])
                     for row in rows if row.get(key) is not None], dtype=float).reshape(-1, 4)


def thinned(points: np.ndarray) -> np.ndarray:
    """At most POINTS points of `[N, 4]` as a curve: each is the end of a stretch, with the values in it."""
    if not len(points):
        return np.empty((0, 6))
    starts = np.unique(np.linspace(0, len(points), min(len(points), POINTS), endpoint=False).astype(int))
    ends = np.append(starts[1:], len(points))
    losses = points[:, 3]
    return np.column_stack((points[ends - 1, :3], np.add.reduceat(losses, starts) / (ends - starts),
                            np.minimum.reduceat(losses, starts), np.maximum.reduceat(losses, starts)))


def choose(runs_dir: Path, names: str) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The runs that `names` selects, each with its name in the report, and the folders that were named.

    Names are separated by commas, and are below `runs_dir` or paths; a folder of runs stands for those in it.
    Without any, it is the run that was saved last, or all runs of its sweep. Raises ValueError for a name that is neither.
    """
    if names:
        folders = list({folder.resolve(): folder for folder in named(runs_dir, names.split(","))}.values())
    else:
        run = find_run(runs_dir, "")
        folders = [run.parent if is_sweep(run.parent) else run]
    chosen: dict[Path, tuple[Path, str]] = {}
    for folder in folders:
        if not runs_in(folder):
            raise ValueError(f"{folder} is not a run and holds none: a run's folder has a config.yaml.")
        for run in runs_in(folder):
            # Runs of several sweeps often have the same names, such as trial_0001: the sweep's name tells them apart.
            above = folder if run != folder and len(folders) == 1 else folder.parent
            chosen.setdefault(run.resolve(), (run, str(run.relative_to(above))))
    uses = Counter(name for _, name in chosen.values())
    return [(run, name if uses[name] == 1 else str(run)) for run, name in chosen.values()], folders


def named(runs_dir: Path, words: list[str]) -> Iterator[Path]:
    """The folders; a comma can also be part of a name, as in lr=0.1,n_layer=2."""
    while words:
        for count in range(len(words), 0, -1):
            name = ",".join(words[:count])
            found = next((place for place in (runs_dir / name, Path(name)) if name and place.is_dir()), None)
            if found:
                yield found
                words = words[count:]
                break
        else:
            raise ValueError(f"runs={words[0]} is neither a folder in {runs_dir} nor a path of one.")


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs in it, without those that were moved aside."""
    if (folder / "config.yaml").is_file():
        return [folder]
    inner = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink())
    return [run for path in inner if not re.search(r"^\.|\.old(-\d+)?$", path.name) for run in runs_in(path)]


def differing(runs: list[History]) -> list[str]:
    """The settings that differ between the runs, without those that change nothing in what is learned."""
    def matters(key: str) -> bool:
        try:
            return kind(key) != "free" and key != "model.vocab_size"  # which follows from the tokenizer
        except KeyError:  # a setting of another version
            return True

    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if matters(key) and len({str(run.settings.get(key)) for run in runs}) > 1]


def are_numbers(values: list[Any]) -> bool:
    """Whether all `values` are finite numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
               for value in values)
