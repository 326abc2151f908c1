"""Several runs: those that names select, their order, and the settings in which they differ."""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpointing.find_runs import find_run, is_sweep
from conf.identity import kind
from report.history import BITS, History

MAX_FLOAT = sys.float_info.max


def choose(runs_dir: Path, names: str) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The runs that `names` selects, each with its name in the report, and the named folders.

    Names are separated by commas, and are folders in `runs_dir` or paths; a folder of runs stands
    for those in it. Without names it is the run that was saved last, or all runs of its sweep.
    Raises ValueError for a name that is neither.
    """
    # Find the folders, each once.
    if names:
        named = named_folders(runs_dir, names.split(","))
        folders = list({folder.resolve(): folder for folder in named}.values())
    else:
        run = find_run(runs_dir, "")
        folders = [run.parent if is_sweep(run.parent) else run]

    # Find their runs, and name each by its path in the folder.
    chosen: dict[Path, tuple[Path, str]] = {}
    for folder in folders:
        runs = runs_in(folder)
        if not runs:
            raise ValueError(f"{folder} is not a run and holds none: a run's folder has a "
                             "config.yaml.")
        # Runs of several sweeps often share names such as trial_0001: the sweep's name is added.
        alone = len(folders) == 1 and runs != [folder]
        above = folder if alone else folder.parent
        for run in runs:
            chosen.setdefault(run.resolve(), (run, str(run.relative_to(above))))

    # Runs that still share a name are named by their whole paths.
    uses = Counter(name for _, name in chosen.values())
    runs = [(run, name if uses[name] == 1 else str(run)) for run, name in chosen.values()]
    return runs, folders


def named_folders(runs_dir: Path, parts: list[str]) -> Iterator[Path]:
    """The folders that are named; a comma can be part of a name, as in lr=0.1,n_layer=2."""
    while parts:
        # The longest name that is a folder.
        for count in range(len(parts), 0, -1):
            name = ",".join(parts[:count])
            places = [place for place in (runs_dir / name, Path(name)) if name and place.is_dir()]
            if places:
                yield places[0]
                parts = parts[count:]
                break
        else:
            name = parts[0] or "An empty name"
            raise ValueError(f"{name} is neither a folder in {runs_dir} nor a path of one.")


def runs_in(folder: Path) -> list[Path]:
    """The folder if it is a run, else the runs in it, without those that restart=true renamed."""
    if (folder / "config.yaml").is_file():
        return [folder]
    runs: list[Path] = []
    for path in sorted(folder.iterdir()):
        renamed = re.search(r"^\.|\.old(-\d+)?$", path.name)
        if path.is_dir() and not path.is_symlink() and not renamed:
            runs += runs_in(path)
    return runs


def best_first(runs: list[History]) -> list[History]:
    """The runs sorted by their scores, those without one last.

    Runs with different texts or tokenizers are compared by bits per byte: their tokens stand for
    different amounts of text, so their losses per token cannot be compared.
    """
    if len({tokens_of(run) for run in runs}) > 1:
        runs = [replace(run, measure=BITS) for run in runs]
    return sorted(runs, key=lambda run: (math.inf if run.score is None else run.score, run.name))


def tokens_of(run: History) -> frozenset[tuple[str, str]]:
    """The settings that decide the text and its tokens."""
    return frozenset((key, str(value)) for key, value in run.settings.items()
                     if key.startswith("data.") or key == "model.vocab_size")


def differing(runs: list[History]) -> list[str]:
    """The settings that differ between the runs and can change the result."""
    return differing_settings([run.settings for run in runs])


def comparable(runs: list[History]) -> tuple[list[History], list[str]]:
    """The finished runs that can be compared, and the settings in which they differ."""
    keys = differing(runs)
    finished = [run for run in runs if run.finished and run.score is not None
                and run.settings.keys() >= set(keys)]
    return finished, [key for key in differing(finished) if key in keys]


def differing_settings(settings: list[dict[str, Any]]) -> list[str]:
    """The names of flat settings that differ and can change the result of a run."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys
            if can_matter(key) and len({str(one.get(key)) for one in settings}) > 1]


def can_matter(key: str) -> bool:
    """Whether a setting can change the result of a run by itself."""
    try:
        # The size of the vocabulary follows from the tokenizer.
        return kind(key) != "free" and key != "model.vocab_size"
    except KeyError:
        # A setting of another version of nanohydra.
        return True


def arms_of(runs: list[History]) -> dict[str, dict[int, History]]:
    """The runs that differ in nothing but their seed, by seed, under what differs from others.

    Raises ValueError for a run without a seed, and for two with the same settings and seed.
    """
    keys = [key for key in differing(runs) if key != "seed"]
    arms: dict[str, dict[int, History]] = {}
    for run in runs:
        seed = run.settings.get("seed")
        if not isinstance(seed, int):
            raise ValueError(f"{run.name} has the seed {seed}, which is not a whole number: leave "
                             "it out.")
        # The arm is named by its settings; a second run with the same seed would be a copy.
        name = ", ".join(f"{key}={run.settings.get(key)}" for key in keys)
        other = arms.setdefault(name, {}).setdefault(seed, run)
        if other is not run:
            raise ValueError(f"{other.name} and {run.name} have the same settings and the same "
                             f"seed: name one of them.")
    return arms


def are_numbers(values: list[Any]) -> bool:
    """Whether all `values` are finite numbers, and integers not too large for a float."""
    return all(type(value) in (int, float) and abs(value) <= MAX_FLOAT for value in values)
