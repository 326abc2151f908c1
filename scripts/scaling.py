"""Fit a scaling law to small runs of equal budgets, and predict larger runs from it.

  python -m scripts.scaling hours=0.5                   # plan a grid of runs, train it, fit the law
  python -m scripts.scaling hours=0.5 dry_run=true      # only print the grid
  python -m scripts.scaling predict=1e15                # the best size and tokens for these FLOPs
  python -m scripts.scaling held_out=larger             # compare a run with its prediction

The same command again resumes the grid. Takes all settings of train.py, too, for its runs. Needs
SciPy. docs/scaling.md explains the numbers.
"""

from conf.launch import launch
from conf.scaling import ScalingSettings
from optional import import_optional

if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.scaling:main", ScalingSettings, __doc__)

import math
import shlex
from bisect import bisect_left
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

import atomic
from checkpointing.tokens import with_vocab_size
from conf.convert import rebuild
from conf.schema import compose, folder_name
from data.prepare import prepare
from evaluation.scaling_law import LEVEL, Fit, fit_law
from model import GPTConfig
from report.figures import as_image, new_figure
from report.history import open_history
from report.labels import abbreviate, log_ticks
from report.runs import choose, tokens_of
from scripts import scaling_grid
from scripts.scaling_grid import GRID, size_of, tokens_of_step
from sweep.grid import run_plan
from sweep.jobs import refuse_run
from sweep.summary import report_failures
from terminal import counted, say

PICTURE = "scaling.png"


@dataclass(frozen=True)
class Result:
    """A finished run. `size` is a sixth of the model's FLOPs per token."""

    name: str
    size: float
    tokens: float
    loss: float  # on the validation split, in nats per token
    text: frozenset[tuple[str, str]]  # runs on other tokens have other losses
    budget: float = 0.0  # of the grid, in FLOPs

    @property
    def flops(self) -> float:
        return 6 * self.size * self.tokens


def main(scaling: ScalingSettings) -> int:
    # Name the folder, and find mistakes before anything is trained.
    import_optional("scipy.optimize", "Scaling laws need SciPy", "scipy")
    name = scaling.name or folder_name(Path(scaling.sweep).stem)
    folder = Path(scaling.runs_dir) / name
    refuse_run(folder)
    compared = choose(Path(scaling.runs_dir), scaling.held_out)[0] if scaling.held_out else []

    # Find the grid, or plan a new one.
    grid = scaling_grid.find_grid(folder, scaling) or scaling_grid.plan_grid(folder, scaling)
    scaling_grid.describe(folder, grid)
    if scaling.dry_run:
        return 0
    if not (folder / GRID).exists():
        atomic.write_json(folder / GRID, grid, indent=2)

    # Train the runs that are not finished.
    results, unusable = read_results(folder, grid)
    failures: list[str] = []
    if unusable:
        plan = scaling_grid.jobs_of(scaling, name, grid)
        code, _ = run_plan(plan)
        if code:
            return code
        failures = plan.failures
        results, unusable = read_results(folder, grid)
    for problem in unusable:
        say(f"Left out: {problem}")

    # Fit the law, and answer the questions about larger runs.
    numbers = np.array([(one.size, one.tokens, one.loss) for one in results]).reshape(-1, 3)
    fit = fit_law(*numbers.T)
    print_law(fit, len(results))
    held_out = [read_result(path, name) for path, name in compared]
    for result in held_out:
        print_comparison(fit, result, results[0])
    if scaling.predict:
        largest = max(grid["runs"].values(), key=lambda run: run["size"])
        print_best(fit, scaling.predict, largest["overrides"], grid["epoch_tokens"])
    try:
        atomic.write_bytes(folder / PICTURE, draw(fit, results, held_out))
        say(f"Picture: {folder / PICTURE}")
    except ValueError as error:
        say(f"No picture: {error}")
    return report_failures(failures)


def read_results(folder: Path, grid: dict[str, Any]) -> tuple[list[Result], list[str]]:
    """The finished runs of the grid, and a sentence about each of the others."""
    results, unusable = [], []
    for name, run in grid["runs"].items():
        try:
            results.append(replace(read_result(folder / name, name), budget=run["budget"]))
        except ValueError as error:
            unusable.append(str(error))
    return results, unusable


def read_result(folder: Path, name: str) -> Result:
    """Raises ValueError for a run that has no final loss, or whose loss diverged."""
    run = open_history(folder, name)
    if not run.finished or run.last_loss is None:
        raise ValueError(f"{name} is not finished ({run.state}).")
    values = {key.removeprefix("model."): value for key, value in run.settings.items()
              if key.startswith("model.")}
    config = rebuild(GPTConfig, values, str(folder))
    uniform = math.log(config.vocab_size)
    if not run.last_loss < uniform:
        raise ValueError(f"{name} diverged: its loss is {run.last_loss:.4g}, that of guessing "
                         f"{uniform:.4g}.")
    return Result(name, size_of(config), run.reached[1], run.last_loss, tokens_of(run))


def print_law(fit: Fit, count: int) -> None:
    law = fit.law
    say(f"Law of {counted(count, 'run')}: L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} "
        f"+ {law.B:.4g} / D^{law.beta:.4g}; {LEVEL:.0%} intervals:")
    numbers = {name: attrgetter(name) for name in ("E", "A", "B", "alpha", "beta")}
    numbers["a, of N = G (C / 6)^a"] = lambda law: law.beta / (law.alpha + law.beta)
    for name, number in numbers.items():
        low, high = fit.interval(number)
        say(f"  {name:<22} {number(law):>9.4g}   {low:.4g} to {high:.4g}")
    say(f"  runs differ from it by {fit.noise.std():.2%}")


def print_comparison(fit: Fit, result: Result, of_grid: Result) -> None:
    if result.text != of_grid.text:
        raise ValueError(f"{result.name} was trained on other tokens than the grid, so that their "
                         f"losses cannot be compared: use the data settings of the grid.")
    low, high = fit.interval_of_run(result.size, result.tokens)
    place = "inside" if low <= result.loss <= high else "outside"
    say(f"{result.name}: N = {result.size:,.0f}, D = {result.tokens:,.0f}, {result.flops:.3g} "
        f"FLOPs: predicted {fit.law.loss(result.size, result.tokens):.4f} ({low:.4f} to "
        f"{high:.4f}), measured {result.loss:.4f}, {place} the interval")


def print_best(fit: Fit, flops: float, overrides: list[str], epoch_tokens: int) -> None:
    """Print the best size and tokens, and the command that trains the nearest width.

    `overrides` are those of a run of the grid: only its width and its steps change.
    """
    # The best size and tokens of any model.
    law = fit.law
    size, tokens = law.best(flops)
    low, high = fit.interval(lambda law: law.best(flops)[0])
    fewest, most = fit.interval(lambda law: law.best(flops)[1])
    say(f"Best for {flops:.3g} FLOPs: N = {size:,.0f} ({low:,.0f} to {high:,.0f}), "
        f"D = {tokens:,.0f} ({fewest:,.0f} to {most:,.0f})")
    if tokens > epoch_tokens:
        say(f"Note: that is {tokens / epoch_tokens:.1f} epochs of the text, and the law is that of "
            f"tokens seen once: use a longer text.")

    # The nearest size that a width gives, by bisection: sizes grow with the width.
    settings = compose("config", ["name=-", *overrides])
    settings = with_vocab_size(settings, prepare(settings.data))

    def size_with(width: int) -> float:
        return size_of(replace(settings.model, n_embd=width))

    widths = range(2 * settings.model.n_head, 2**16 + 1, 2 * settings.model.n_head)
    place = bisect_left(widths, size, key=size_with)
    width = min(widths[max(0, place - 1) : place + 1],
                key=lambda width: abs(math.log(size_with(width) / size)))

    # The command that trains it, and its expected loss.
    size = size_with(width)
    steps = max(1, round(flops / (6 * size * tokens_of_step(settings))))
    tokens = steps * tokens_of_step(settings)
    low, high = fit.interval_of_run(size, tokens)
    words = [word for word in overrides
             if not word.startswith(("model.n_embd=", "training.max_steps="))]
    command = ["python", "train.py", *words, f"model.n_embd={width}", f"training.max_steps={steps}"]
    say(f"The nearest width: N = {size:,.0f}, D = {tokens:,}, predicted "
        f"{law.loss(size, tokens):.4f} ({low:.4f} to {high:.4f})\n  {shlex.join(command)}")


def draw(fit: Fit, results: list[Result], held_out: list[Result]) -> bytes:
    """The losses by size, with the law for each budget, as a PNG."""
    with new_figure(6.4, 4.2, "scaling") as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_xlabel("size N, FLOPs per token / 6")
        axes.set_ylabel("validation loss, nats per token")

        # For each budget the measured losses, and the law as a line.
        for budget in sorted({one.budget for one in results}):
            runs = [one for one in results if one.budget == budget]
            line = draw_budget(axes, fit, budget, [one.size for one in runs])
            axes.plot([one.size for one in runs], [one.loss for one in runs], "o", markersize=4,
                      color=line.get_color(), label=f"{budget:.2g} FLOPs")

        # Each run that is not in the fit, with the interval of its prediction.
        for one in held_out:
            sizes = [one.size, fit.law.best(one.flops)[0]]
            draw_budget(axes, fit, one.flops, sizes, color="k", linestyle="dashed")
            low, high = fit.interval_of_run(one.size, one.tokens)
            axes.vlines(one.size, low, high, color="k", linewidth=4, alpha=0.3)
            axes.plot(one.size, one.loss, "k*", markersize=8,
                      label=f"{one.flops:.2g} FLOPs, not in the fit")

        log_ticks(axes.xaxis)
        abbreviate(axes.xaxis)
        axes.legend()
        return as_image(figure, "png")


def draw_budget(axes: Any, fit: Fit, flops: float, sizes: list[float], **style: str) -> Any:
    """Draw the law around these sizes, each with the tokens that the FLOPs allow."""
    curve = np.geomspace(min(sizes) / 1.4, max(sizes) * 1.4, 100)
    line, = axes.plot(curve, fit.law.loss(curve, flops / 6 / curve), linewidth=1, **style)
    return line
