"""The progress and the results of a sweep's jobs, in words."""

import math
import shlex
import time
from pathlib import Path

from progress import ProgressBar, print_line
from sweep.jobs import Job
from terminal import say

# The part of a job after which the time left is estimated.
FIRST_ESTIMATE = 0.1
RESUME = "Run the same command again to resume."


class Progress:
    """One line: the number of jobs in each state, the best result so far, and the time left.

    `total` is the number of jobs, if it is known, of which some are `done` already. `failures` has
    a line for each job that failed; others are added.
    """

    def __init__(self, total: int | None, done: int, failures: list[str]) -> None:
        self.counts = {"done": done, "stopped": 0, "failed": len(failures)}
        self.failures = failures
        self.best, self.best_name = math.inf, ""
        bar, times = "{desc} [{elapsed}]", "{elapsed} elapsed"
        if total:
            bar = "|{bar:10}| {desc} [{elapsed}<{remaining}]"
            times += ", {remaining} left"
        # smoothing=0 computes the time left from the mean speed.
        self.bar = ProgressBar(
            total=total, initial=done + len(failures), smoothing=0, mininterval=0.5,
            bar_format=bar, plain_format=f"{{desc}}, {times}")

    def on_exit(self, job: Job, code: int) -> None:
        """Count a job that has ended, and print how it ended."""
        self.add_result(job)
        has_result = math.isfinite(job.best)
        result = f"{job.metric} {job.best:.4f}" if has_result else f"no {job.metric}"
        state = "stopped" if code else "done"
        if job.failed(code):
            state, result = "failed", job.failure(code)
            self.failures.append(f"{job.name}: {result} Log: {job.log}")
        self.counts[state] += 1
        duration = ProgressBar.format_interval(time.monotonic() - job.started_at)
        print_line(f"{job.name}: {state} after {duration}, {result}")

    def show(self, running: list[Job]) -> None:
        # The part of a running job that is done counts too.
        done = sum(self.counts.values())
        for job in running:
            self.add_result(job)
            done += min(1.0, job.step / job.max_steps)
        counts = {"running": len(running), **self.counts}
        parts = [f"{count} {state}" for state, count in counts.items()]
        if self.best_name:
            parts.append(f"best {self.best:.4f} ({self.best_name})")
        self.bar.set_description_str(", ".join(parts), refresh=False)
        # At first a job only imports and opens its data, which says little about the time left.
        has_begun = done - self.bar.initial >= FIRST_ESTIMATE
        self.bar.update(done - self.bar.n if has_begun else 0)

    def add_result(self, job: Job) -> None:
        if job.best < self.best:
            self.best, self.best_name = job.best, job.name


def comparison_metric(swept: list[str]) -> str:
    """The metric that compares jobs which differ in the settings `swept`.

    Losses per token are not comparable between texts or tokenizers; bits per byte are.
    """
    changes_data = any(key.startswith("data") or key == "experiment" for key in swept)
    return "bits_per_byte" if changes_data else "val_loss"


def print_best(jobs: list[Job]) -> None:
    """Print the best job and the next commands; nothing if no job has a result."""
    best = min(jobs, key=lambda job: job.best, default=None)
    if best and math.isfinite(best.best):
        say(f"Best: {best.folder}, {best.metric} {best.best:.4f}\n{next_commands(best.folder)}")


def next_commands(best: Path) -> str:
    """The commands that sample from a sweep's best run, and compare all of its runs."""
    return (f"  {shlex.join(['python', 'sample.py', f'run={best}'])}\n"
            f"  {shlex.join(['python', '-m', 'scripts.report', f'runs={best.parent}'])}")


def report_failures(failures: list[str]) -> int:
    """Print which jobs failed and why; return the exit code."""
    if not failures:
        return 0
    say(f"{len(failures)} failed:\n  " + "\n  ".join(failures))
    return 1
