"""Find the folder of a run: by its name, the run saved last, or the best one of a sweep."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import atomic
from checkpointing.run_folder import check_file_types, first_run, is_run
from conf.hints import closest
from terminal import say

LISTED = 20  # runs in a message


def find_run(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`: inside `runs_dir`, or a path. Default: the run saved last.

    For a sweep it is the best run, also if the run saved last belongs to one. Raises ValueError,
    listing the runs, if there is none, and if there is a link inside the run.
    """
    run = search_run(runs_dir, name)
    check_file_types(run)
    return run


def find_runs(runs_dir: Path, names: str) -> list[Path]:
    """The folders of several runs, as `find_run`; their names are separated by commas."""
    # The names that are made from settings can contain commas.
    if (runs_dir / names).is_dir() or Path(names).is_dir():
        return [find_run(runs_dir, names)]
    return [find_run(runs_dir, name) for name in names.split(",")]


def search_run(runs_dir: Path, name: str) -> Path:
    """The folder of a run, whose content is not checked."""
    # The name of a run or of a sweep in `runs_dir`, or its path.
    places = (runs_dir / name, Path(name)) if name else ()
    for place in places:
        if has_checkpoint(place):
            return place
        if is_sweep(place) and any(runs_below(place)):
            return best_run(place)
    if first_run(places):
        raise ValueError(f"run={name} has no checkpoint yet: the first is saved after "
                         f"training.checkpoint_every steps, or when you stop the run.")

    # Without a name: the run saved last, or the best one of its sweep.
    runs = sorted(runs_below(runs_dir))
    if not name and runs:
        last = max(runs, key=saved_at)
        return best_run(last.parent) if is_sweep(last.parent) else last

    # There is none: say why, and which runs there are.
    none = f"{runs_dir} has no run with a checkpoint: train one with python train.py."
    if not name:
        raise ValueError(none)
    problem = "is not a run" if any(map(os.path.exists, places)) else "does not exist"
    if not runs:
        raise ValueError(f"run={name} {problem}, and {none}")
    names = [str(run.relative_to(runs_dir)) for run in runs]
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    raise ValueError(f"run={name} {problem}{closest(name, names)}. There are: "
                     f"{', '.join(names[:LISTED])}{more}.")


def is_sweep(folder: Path) -> bool:
    """Whether the folder belongs to a grid or a search, which keep the output of their runs."""
    return (folder / "logs").is_dir() and not is_run(folder)


def best_run(sweep: Path) -> Path:
    """The run of a sweep with the fewest bits per byte, which is printed; else the last one."""
    runs = sorted(runs_below(sweep), key=saved_at, reverse=True)
    results = {run: lowest_bits_per_byte(run) for run in runs}
    best = min(runs, key=results.__getitem__)
    if len(runs) > 1 and math.isfinite(results[best]):
        result = f"{results[best]:.4f} bits per byte"
        say(f"The best of {len(runs)} runs in {sweep}: {best.name}, {result}", sys.stderr)
    return best


def lowest_bits_per_byte(run: Path) -> float:
    """The lowest validation result of a run, comparable for any tokenizers; inf without one."""
    lowest = math.inf
    with (suppress(OSError),
          os.fdopen(atomic.open_regular(run / "metrics.jsonl"), "rb") as lines):
        for line in lines:
            with suppress(ValueError, KeyError, TypeError, OverflowError):
                lowest = min(lowest, float(atomic.parse_json(line)["bits_per_byte"]))
    return lowest


def runs_below(runs_dir: Path) -> Iterator[Path]:
    """The runs with a checkpoint; other processes may create and delete folders meanwhile."""
    for folder, subfolders, _ in os.walk(runs_dir):
        if "checkpoints" in subfolders:
            subfolders.clear()
            if has_checkpoint(Path(folder)):
                yield Path(folder)


def has_checkpoint(run: Path) -> bool:
    try:
        return any(name.startswith("step_") for name in os.listdir(run / "checkpoints"))
    except (FileNotFoundError, NotADirectoryError):
        return False


def saved_at(run: Path) -> float:
    """The time at which the checkpoints last changed; 0 if there are none."""
    try:
        return (run / "checkpoints").stat().st_mtime
    except FileNotFoundError:
        return 0.0
