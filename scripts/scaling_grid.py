"""The grid of a scaling law: small runs of several sizes at several budgets, planned by time.

A budget is a number of FLOPs: at each one, all sizes are trained for as many tokens as it allows.
The grid is a file, grid.json, so that the same command resumes it.
"""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import atomic
from checkpointing.tokens import with_vocab_size
from conf.identity import differences, listed
from conf.scaling import ScalingSettings
from conf.schema import compose
from conf.settings import Settings
from data.prepare import prepare
from data.shards import read_meta
from evaluation.scaling_law import MIN_RUNS
from model import GPT, GPTConfig
from report.runs import are_numbers
from scripts.plan import pace_of
from sweep.grid import GridSettings, Plan, job_name
from sweep.space import Range, Space, read_space
from terminal import counted, readable_time, say
from training.configure import configure
from training.device import Device
from training.estimate import Pace

# The index of a size, the number of steps, and the budget.
GridRun = tuple[int, int, float]
GRID = "grid.json"
MIN_STEPS = 100  # of a run
START_SECONDS = 6.0  # of a job, to import torch and to save
LOWEST_BUDGETS = np.geomspace(1e6, 1e26, 1 + 20 * 40)  # forty steps for each power of ten


def find_grid(folder: Path, scaling: ScalingSettings) -> dict[str, Any] | None:
    """The grid that was planned in a folder; None if there is none.

    Raises ValueError if the command asks for a different one.
    """
    if not (folder / GRID).exists():
        return None
    try:
        grid = atomic.read_json(folder / GRID)
        known = grid["asked"]
        check_fields(grid)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{folder / GRID} is damaged: use another name=.") from None
    # A command that only asks about the law need not repeat how the grid was planned.
    if scaling.hours is None and not scaling.train:
        return grid
    changes = differences(known, asked(scaling, read_space(scaling.sweep, scaling.train)))
    if changes:
        raise ValueError(f"{folder} has a grid that was planned otherwise: {listed(changes)}. Use "
                         f"another name=, or restore the old values.")
    return grid


def check_fields(grid: dict[str, Any]) -> None:
    """Raise LookupError, TypeError or AttributeError for missing fields or those of wrong types."""
    numbers, words = [grid["seconds"], grid["epoch_tokens"]], [*grid["varied"]]
    for run in grid["runs"].values():
        numbers += [run["size"], run["budget"], run["tokens"]]
        words += run["overrides"]
    if len(numbers) == 2 or not are_numbers(numbers) or min(numbers) <= 0:
        raise TypeError("a number is missing or invalid")
    "".join(words)


def asked(scaling: ScalingSettings, space: Space) -> dict[str, Any]:
    """What a grid was planned by, as JSON can hold it."""
    limits = {"hours": scaling.hours, "budgets": scaling.budgets, "ratio": scaling.ratio}
    return limits | space.description()


def plan_grid(folder: Path, scaling: ScalingSettings) -> dict[str, Any]:
    """A new grid: for each run its overrides, its size and its budget.

    Raises ValueError if `hours` hold none.
    """
    if scaling.hours is None:
        raise ValueError(f"{folder} has no grid yet: say how long it may train, as in hours=0.5.")
    # Compose the settings of each size.
    space = read_space(scaling.sweep, scaling.train)
    overrides = [space.overrides(point) for point in points_of(space)]
    composed = [compose("config", ["name=-", *words]) for words in overrides]
    first = composed[0]
    if any((one.data, tokens_of_step(one)) != (first.data, tokens_of_step(first))
           for one in composed):
        raise ValueError(f"The sizes {space.place} differ in their text or in the tokens of a "
                         f"step: vary only the model.")

    # Compute the size of each model, which depends on the vocabulary.
    prepared = prepare(first.data)
    meta = read_meta(prepared)
    epoch_tokens = meta["splits"]["train"]["tokens"]
    composed = [with_vocab_size(one, prepared) for one in composed]
    sizes = [size_of(one.model) for one in composed]

    # Time a step of each, and choose the grid that fits into the hours.
    say(f"Timing {counted(len(sizes), 'size')} ...")
    device = Device(first.training.device, first.training.precision,
                    threads=max(1, torch.get_num_threads() // scaling.jobs))
    configure(device)
    paces = [pace_of(one, device, meta) for one in composed]
    chosen, seconds = longest_grid(scaling, sizes, paces, tokens_of_step(first), epoch_tokens)

    # Name each run by its size and its steps.
    varied, runs = list(space.varied), {}
    for index, steps, budget in chosen:
        words = [*overrides[index], f"training.max_steps={steps}"]
        values = dict(word.partition("=")[::2] for word in words)
        name = job_name([*varied, "training.max_steps"], values)
        runs[name] = {"overrides": words, "size": sizes[index], "budget": budget,
                      "tokens": steps * tokens_of_step(first)}
    return {"asked": asked(scaling, space), "varied": varied, "seconds": seconds,
            "epoch_tokens": epoch_tokens, "runs": runs}


def points_of(space: Space) -> list[dict[str, Any]]:
    """The sizes of a space: the combinations of its choices that its constraints allow."""
    for key, values in space.varied.items():
        if isinstance(values, Range):
            raise ValueError(f"{key} ({space.place}) is a range: list the sizes, as in [32, 64].")
    points = (dict(zip(space.varied, values, strict=True))
              for values in product(*space.varied.values()))
    return list(filter(space.allows, points))


def longest_grid(scaling: ScalingSettings, sizes: list[float], paces: list[Pace],
                 tokens_per_step: int, epoch_tokens: int) -> tuple[list[GridRun], float]:
    """The grid with the most runs, and of those the largest budgets, in `hours`; its seconds.

    No run reads a token twice. Raises ValueError if that leaves no grid.
    """
    # The time of a grid for each lowest budget.
    grids = []
    for lowest in LOWEST_BUDGETS:
        budgets = lowest * scaling.ratio ** np.arange(scaling.budgets)
        grid = isoflop_grid(sizes, budgets, tokens_per_step, epoch_tokens)
        seconds = sum(paces[index].step * steps + paces[index].evaluation + START_SECONDS
                      for index, steps, _ in grid)
        if len(grid) >= MIN_RUNS:
            grids.append((grid, seconds / scaling.jobs))
    if not grids:
        raise ValueError(f"The text has {epoch_tokens:,} tokens, too few for a grid of "
                         f"{MIN_RUNS} runs in one epoch: use a longer text, or smaller models.")

    # Those that can be trained in time.
    fitting = [(grid, seconds) for grid, seconds in grids if seconds <= 3600 * scaling.hours]
    if not fitting:
        least = min(seconds for _, seconds in grids) / 3600
        raise ValueError(f"hours={scaling.hours} is too short: the smallest grid of {MIN_RUNS} "
                         f"runs takes {least:.2g} hours on this machine. Raise hours=, or use "
                         f"smaller models.")
    # The last run has the largest budget.
    return max(fitting, key=lambda pair: (len(pair[0]), pair[0][-1][2]))


def isoflop_grid(sizes: list[float], budgets: Iterable[float], tokens_per_step: int,
                 max_tokens: float) -> list[GridRun]:
    """The runs of a grid.

    A budget in FLOPs is divided by 6 times the size. Runs of fewer than MIN_STEPS, or of more
    tokens than `max_tokens`, are left out.
    """
    runs = []
    for budget in budgets:
        for index, size in enumerate(sizes):
            steps = round(budget / (6 * size * tokens_per_step))
            if steps >= MIN_STEPS and steps * tokens_per_step <= max_tokens:
                runs.append((index, steps, float(budget)))
    return runs


def jobs_of(scaling: ScalingSettings, name: str, grid: dict[str, Any]) -> Plan:
    """The runs of the grid as jobs of a sweep."""
    composed = {}
    for run_name, run in grid["runs"].items():
        words = [*run["overrides"], f"runs_dir={scaling.runs_dir}", f"name={name}"]
        composed[run_name] = words, compose("config", words)
    return Plan([*grid["varied"], "training.max_steps"], composed, [], [],
                GridSettings(scaling.jobs))


def describe(folder: Path, grid: dict[str, Any]) -> None:
    runs = grid["runs"].values()
    flops = sorted({run["budget"] for run in runs})
    say(f"Grid: {counted(len(runs), 'run')} in {folder}, {len(flops)} budgets from {flops[0]:.3g} "
        f"to {flops[-1]:.3g} FLOPs, about {readable_time(grid['seconds'])}")
    for size in sorted({run["size"] for run in runs}):
        tokens = ", ".join(f"{run['tokens']:,}" for run in runs if run["size"] == size)
        say(f"  N = {size:>12,.0f}: {tokens} tokens")


def tokens_of_step(settings: Settings) -> int:
    return settings.training.step_tokens(settings.model.block_size)


def size_of(config: GPTConfig) -> float:
    """The size of a model in the law: a sixth of its FLOPs per token."""
    return GPT.empty(config).flops_per_token() / 6
