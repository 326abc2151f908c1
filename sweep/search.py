"""Search a space of settings with Optuna; each trial is a training in a process of its own.

Several workers, also on other machines, can share one study. Knows nothing of the command line:
scripts/sweep.py does.
"""

import math
import random
import secrets
import shlex
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import atomic
import locks
from checkpointing.run_folder import describe_process
from conf.schema import folder_name
from conf.settings import Settings
from conf.yaml_files import ConfigError
from report.history import PRUNED
from setting import FilePath, ScriptSettings, setting
from sweep.jobs import INTERRUPTED, Job, refuse_run
from sweep.runner import JobSource, LocalRunner, run_jobs
from sweep.space import Range, Space, read_space
from sweep.study import FileLock, import_optuna, open_study, storage_error, storage_name
from sweep.summary import RESUME, Progress, comparison_metric, next_commands, report_failures
from terminal import counted, say

MAX_REJECTED = 100  # suggestions of Optuna in a row that are invalid
# Optuna's states of a trial, in the order of the summary.
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "not finished"}


@dataclass(frozen=True)
class SweepSettings(ScriptSettings):
    """The settings of a search itself; its other overrides are for the trials."""

    sweep: FilePath = setting("", "the space: a name in conf/sweep, or a YAML file")
    name: str = setting("", "of the folder and the study; empty: the name of the space")
    runs_dir: FilePath = setting("runs", "where the folder is")
    trials: int | None = setting(20, "in all, on all machines; null: no limit", ge=1)
    hours: float | None = setting(None, "of this command; then running trials are saved", gt=0)
    jobs: int = setting(1, "trials at a time", ge=1)
    processes_per_job: int = setting(1, "started by torchrun; with GPUs, one for each", ge=1)
    pruner: Literal["median", "hyperband", "none"] = setting("median", "stops poor trials")
    storage: str = setting("", "the study's URL for Optuna; empty: study.log in the folder")

    def problems(self) -> Iterator[str]:
        """One sentence for each value that is invalid."""
        yield from super().problems()
        if not self.sweep:
            yield "sweep= is empty: name a space, as in sweep=lr_width."
        if self.trials is None and self.hours is None:
            yield "trials=null and hours=null set no limit: set one of them."
        yield from Settings(name=self.name, runs_dir=self.runs_dir).problems()


def search(settings: SweepSettings) -> int:
    """Start or resume a search; print its best trial. Returns the exit code."""
    # Read the space, and open the study.
    folder = Path(settings.runs_dir) / (settings.name or folder_name(Path(settings.sweep).stem))
    space = read_space(settings.sweep, settings.train, folder)
    if space.sampler == "grid":
        settings = replace(settings, trials=grid_trials(settings.trials, len(space.grid)))
    refuse_run(folder)
    source = Search(settings, space)
    ended = sum(trial.state.is_finished() for trial in source.trained())
    before = f", {counted(ended, 'trial')} before" if ended else ""
    say(f"Sweep: {folder}, study in {storage_name(settings.storage, folder)}{before}")

    # Train the trials, those of workers that died first.
    progress = Progress(settings.trials, ended, [])
    try:
        code = run_jobs(source, LocalRunner(settings.jobs, settings.processes_per_job), progress)
        print_best_trial(source, resumable=code != 0)
    except Exception as error:
        # Each kind of storage has its own exceptions. These two kinds name their cause themselves.
        if isinstance(error, ValueError) or getattr(error, "filename", None):
            raise
        raise ValueError(f"{storage_error(settings.storage, error)} {RESUME}") from error
    finally:
        source.release()
    return code or report_failures(progress.failures)


def grid_trials(limit: int | None, points: int) -> int:
    """The number of trials of a grid. Says so if the limit leaves out points."""
    if limit is None or limit >= points:
        return points
    say(f"The grid has {counted(points, 'point')}, of which trials={limit} trains the first.")
    return limit


class Search(JobSource):
    """A source of jobs for run_jobs: the trials that Optuna suggests.

    Each worker locks a file as long as it lives, and each trial that is trained names its worker:
    so others find the trials of a worker that died. A trial without a worker was invalid.
    """

    def __init__(self, settings: SweepSettings, space: Space) -> None:
        self.optuna = import_optuna()
        self.settings, self.space = settings, space
        self.folder = folder = space.folder
        # Both raise ValueError for a space without valid points, before anything is written.
        space.draw(seed=0)
        self.random_state = space.example.seed
        folder.mkdir(parents=True, exist_ok=True)
        self.metric = comparison_metric(list(space.varied))
        self.lock = FileLock(folder / "turn.lock")
        self.trials: dict[Job, Any] = {}
        self.pruned: set[Job] = set()
        self.last_asked, self.pending = -math.inf, False
        self.deadline = time.monotonic() + 3600 * (settings.hours or math.inf)
        with self.lock:
            self.study = open_study(folder, space, self.metric, settings.storage, settings.pruner)
        self.worker = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.worker_lock = locks.Lock(self.worker_file(self.worker), describe_process())

    def worker_file(self, worker: str) -> Path:
        return self.folder / "workers" / worker

    def trained(self) -> list[Any]:
        """The trials that any worker trained or trains."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if "worker" in trial.user_attrs]

    def next_job(self) -> Job | None:
        now = time.monotonic()
        if now > self.deadline or now < self.last_asked + 1:
            return None
        with self.lock:
            trial = self.abandoned_trial() or self.new_trial()
            if trial is None:
                self.last_asked = now
                return None
            trial.set_user_attr("worker", self.worker)
        job = self.job_of(trial)
        self.trials[job] = trial
        return job

    def job_of(self, trial: Any) -> Job:
        max_steps = self.space.settings(trial.params).training.max_steps
        return Job(f"trial_{trial.number:04d}", self.folder, self.space.overrides(trial.params),
                   max_steps, self.metric, self.settings.processes_per_job)

    def abandoned_trial(self) -> Any:
        """A trial whose worker died, if its training has ended too: it may still be saving."""
        self.pending = False
        for trial in self.trained():
            file = self.worker_file(trial.user_attrs["worker"])
            # The file of a worker that lives is locked, this one's too.
            if trial.state.is_finished() or not file.exists() or locks.is_locked(file):
                continue
            if not self.job_of(trial).is_locked():
                return self.optuna.trial.Trial(self.study, trial._trial_id)
            self.pending = True
        return None

    def new_trial(self) -> Any:
        """A new valid trial; None if there are enough."""
        invalid: ConfigError | None = None
        for attempt in range(2 * MAX_REJECTED):
            if self.settings.trials is not None and len(self.trained()) >= self.settings.trials:
                return None
            if self.space.sampler == "grid":
                # Points that are invalid settings have been tried, too.
                trials = self.study.get_trials(deepcopy=False)
                tried = {frozenset(trial.params.items()) for trial in trials}
                rest = (point for point in self.space.grid
                        if frozenset(point.items()) not in tried)
                point = next(rest, None)
                if point is None:
                    return None
                self.study.enqueue_trial(point)
            elif attempt >= MAX_REJECTED:
                # Optuna keeps suggesting invalid points.
                self.study.enqueue_trial(self.space.draw(self.seed()))

            # Ask for a suggestion. A new sampler, since its seed depends on the trials so far.
            sampler = self.optuna.samplers.TPESampler(seed=self.seed(), constant_liar=True)
            self.study.sampler = sampler
            trial = self.study.ask()
            point = {key: suggest(trial, key, values) for key, values in self.space.varied.items()}

            # Take it if it is valid; otherwise the trial fails, and is not counted.
            try:
                if self.space.allows(point):
                    self.space.settings(point)
                    return trial
            except ConfigError as error:
                invalid = error
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        raise invalid or ValueError(f"The constraints {self.space.place} reject nearly all "
                                    f"points: widen the space.")

    def seed(self) -> int:
        """A function of the number of trials, so that a resumed search repeats no suggestion."""
        number = len(self.study.get_trials(deepcopy=False))
        return random.Random(f"{self.random_state} {number}").getrandbits(32)

    def on_metrics(self, job: Job) -> None:
        # Report the results, and stop an unpromising trial.
        trial = self.trials[job]
        for row in job.new_rows:
            step, value = row["step"], row.get(self.metric)
            if value is None:
                continue
            # A resumed trial repeats some of the steps.
            if step in self.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
                continue
            trial.report(value, step)
            if step < job.max_steps and not job.stop_requested and trial.should_prune():
                self.pruned.add(job)
                job.stop()
        # At the end of the time, trials save, to be resumed by another command.
        if time.monotonic() > self.deadline and not job.stop_requested:
            job.stop()

    def on_exit(self, job: Job, code: int) -> None:
        trial, states = self.trials[job], self.optuna.trial.TrialState
        if code == 0 and math.isfinite(job.best):
            self.study.tell(trial, job.best)
        elif code in INTERRUPTED and job in self.pruned:
            # Only reports read the file.
            with suppress(OSError):
                atomic.write_json(job.folder / PRUNED, {"step": job.step})
            self.study.tell(trial, state=states.PRUNED)
        elif code in INTERRUPTED or (code != 0 and not (job.folder / "nonfinite").exists()):
            # A kill or a full disk has nothing to do with the settings: resume the trial later.
            return
        else:
            reason = job.failure(code) if code else f"It has no {self.metric}."
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, state=states.FAIL)
        del self.trials[job]

    def release(self) -> None:
        """End the worker. Its file stays if it has unfinished trials, so that others find them."""
        if not self.trials:
            self.worker_file(self.worker).unlink()
        self.worker_lock.release()


def suggest(trial: Any, key: str, values: Range | list[Any]) -> Any:
    """Optuna's suggestion for a setting."""
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    low, high, step = values.low, values.high, values.step
    if isinstance(low, int):
        return trial.suggest_int(key, low, high, step=step or 1, log=values.log)
    return trial.suggest_float(key, low, high, step=step, log=values.log)


def print_best_trial(source: Search, resumable: bool) -> None:
    """Print the number of trials in each state, and the command line of the best one."""
    trials = source.trained()
    counts = Counter(trial.state.name for trial in trials)
    summary = ", ".join(f"{counts[name]} {text}" for name, text in STATES.items() if counts[name])
    say(f"{counted(len(trials), 'trial')}: {summary}.")
    if resumable:
        say(RESUME)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if complete:
        best = min(complete, key=lambda trial: trial.value)
        job = source.job_of(best)
        say(f"Best: {job.folder}, {source.metric} {best.value:.4f}\n"
            f"  {shlex.join(['python', 'train.py', *job.overrides])}\n{next_commands(job.folder)}")
