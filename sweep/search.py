"""Search a space of settings with Optuna: each trial is a training in a process of its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import atomic
from checkpointing.run_folder import describe_process
from conf.identity import differences, listed
from conf.presets import ConfigError
from conf.schema import compose, folder_name
from conf.settings import Settings
from report.history import PRUNED
from setting import FilePath
from sweep.jobs import (
    INTERRUPTED,
    Job,
    LocalRunner,
    Progress,
    comparison_metric,
    job_overrides,
    next_commands,
    refuse_run,
    report_failures,
    run_jobs,
)
from sweep.space import Point, Range, Space, read_space
from terminal import counted, say

JOURNAL = "study.log"
MAX_REFUSED = 100  # points in a row that Optuna may suggest and the space not allow


@dataclass(frozen=True)
class SweepSettings:
    """What is searched, for how long, and how; all other settings are the trainings' own."""

    sweep: FilePath = ""  # the space: a name in conf/sweep, or a YAML file
    name: str = ""  # of the folder and of the study; empty: the space's
    runs_dir: FilePath = "runs"
    trials: int | None = 20  # in all; null for no limit
    hours: float | None = None  # of this search; whichever limit comes first ends it
    jobs: int = 1  # trials at a time
    pruner: Literal["median", "hyperband", "none"] = "median"
    storage: str = ""  # a URL for Optuna; empty: a journal in the folder
    train: tuple[str, ...] = ()  # what the command line says about the trainings

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if not self.sweep:
            yield "sweep= is empty: name a space, as in sweep=lr_width."
        for name in ("trials", "jobs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        if self.hours is not None and not self.hours > 0:
            yield f"hours={self.hours} must be more than 0, or null for no limit."
        if self.trials is None and self.hours is None:
            yield "trials=null and hours=null have no end: give one of them."
        yield from Settings(name=self.name, runs_dir=self.runs_dir).problems()


def search(settings: SweepSettings) -> int:
    """Search, or go on with it; print the best. Returns the exit code."""
    space = read_space(settings.sweep, settings.train)
    folder = Path(settings.runs_dir) / (settings.name or folder_name(Path(settings.sweep).stem))
    usual = space.usual()
    refuse_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = Search(settings, space, folder, usual)
    ended = [trial for trial in source.taken() if trial.state.is_finished()]
    say(f"Sweep: {folder}, its study in {hide_password(settings.storage) or folder / JOURNAL}"
          + f", {counted(len(ended), 'trial')} before" * bool(ended))
    try:
        code = run_jobs(source, LocalRunner(settings.jobs), Progress(settings.trials, len(ended), 0))
        print_best_trial(source, "\nThe same command goes on." * bool(code))
    except Exception as error:  # of which each kind of storage has its own
        if isinstance(error, ValueError) or getattr(error, "filename", None):  # which says what is wrong with what
            raise
        raise ValueError(f"{storage_error(settings, error)} The same command goes on.") from error
    finally:
        source.release()
    return code or report_failures(source.failures)


class FileLock:
    """A lock that is waited for, and dies with its holder; Optuna's own for a journal outlives a kill. See atomic.Lock.

    Optuna takes it as a journal's lock. Whoever has its turn finds only whole lines in `journal`.
    """

    def __init__(self, path: Path, journal: Path | None = None) -> None:
        self.path, self.journal = path, journal

    def acquire(self) -> bool:
        while True:
            try:
                self.lock = atomic.Lock(self.path, describe_process())
                break
            except BlockingIOError:
                time.sleep(0.01)
        if self.journal:
            atomic.LineFile(self.journal).close()  # which removes a line that a kill cut short
        return True

    def release(self) -> None:
        self.lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *failure: object) -> None:
        self.release()


class Search:
    """Asks Optuna for trials, tells it how they go, and takes over those whose worker is gone.

    A trial that is trained carries its `worker`, a file that this one holds as long as it lives. A suggestion that the
    space does not allow is told as failed and carries none.
    """

    def __init__(self, settings: SweepSettings, space: Space, folder: Path, usual: Settings) -> None:
        self.optuna = import_optuna()
        self.settings, self.space, self.folder, self.usual = settings, space, folder, usual
        self.metric = comparison_metric(list(space.varied))
        self.turn = FileLock(folder / "turn.lock")
        self.failures: list[str] = []
        self.trials: dict[Job, Any] = {}
        self.hopeless: set[Job] = set()
        self.looked, self.waiting = -math.inf, False
        self.ends = time.monotonic() + 3600 * (settings.hours or math.inf)
        with self.turn:
            self.study = self.open_study()
        self.worker = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.alive = atomic.Lock(self.worker_file(self.worker), describe_process())

    def open_study(self) -> Any:
        """The study, begun or gone on with. Raises ValueError if it is out of reach, or of another space."""
        optuna, settings = self.optuna, self.settings
        limits = self.usual.training
        pruner = {"median": lambda: optuna.pruners.MedianPruner(),
                  "hyperband": lambda: optuna.pruners.HyperbandPruner(max(1, limits.eval_every), limits.max_steps),
                  "none": lambda: optuna.pruners.NopPruner()}[settings.pruner]()
        journal = self.folder / JOURNAL
        try:
            storage = settings.storage or optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(
                str(journal), FileLock(self.folder / "journal.lock", journal)))
            study = optuna.create_study(storage=storage, study_name=self.folder.name, load_if_exists=True, pruner=pruner)
            began = study.user_attrs.get("space")
            if began is None:
                study.set_user_attr("space", self.space.description())
                study.set_user_attr("metric", self.metric)
        except Exception as error:  # of which each kind of storage has its own
            raise ValueError(storage_error(settings, error) + damaged_line(journal)) from error
        if began and (changes := differences(began, self.space.description())):
            raise ValueError(f"{self.folder} is the search of another space: {listed(changes)}. Choose another name=, or "
                             f"keep the old space.")
        return study

    def worker_file(self, worker: str) -> Path:
        return self.folder / "workers" / worker

    def taken(self) -> list[Any]:
        """The trials that are trained or were, by whatever worker."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if "worker" in trial.user_attrs]

    def next_job(self) -> Job | None:
        if time.monotonic() > self.ends or time.monotonic() - self.looked < 1:
            return None
        with self.turn:
            trial = self.left_behind() or self.fresh()
            if trial is None:
                self.looked = time.monotonic()
                return None
            trial.set_user_attr("worker", self.worker)
        job = self.job_of(trial)
        self.trials[job] = trial
        return job

    def job_of(self, trial: Any) -> Job:
        point = {key: trial.params[key] for key in self.space.varied}
        return Job(f"trial_{trial.number:04d}", self.folder, job_overrides(self.space.words(point), self.folder),
                   self.composed(point).training.max_steps, self.metric)

    def left_behind(self) -> Any:
        """A trial whose worker is gone: its file is there and nobody holds it. While its last process saves, we wait."""
        self.waiting = False
        for trial in self.taken():
            file = self.worker_file(trial.user_attrs["worker"])
            if trial.state.is_finished() or not file.exists():
                continue
            try:
                atomic.Lock(file, describe_process()).release()  # our own is held too
            except BlockingIOError:
                continue
            if not self.job_of(trial).busy():
                return self.optuna.trial.Trial(self.study, trial._trial_id)
            self.waiting = True
        return None

    def fresh(self) -> Any:
        """A new trial that the space allows; None if there are enough."""
        refused: ConfigError | None = None
        for attempt in range(2 * MAX_REFUSED):
            if self.settings.trials is not None and len(self.taken()) >= self.settings.trials:
                return None
            if attempt >= MAX_REFUSED:  # what Optuna believes in is not allowed
                self.study.enqueue_trial(self.space.draw(self.seed()))
            self.study.sampler = self.optuna.samplers.TPESampler(seed=self.seed(), constant_liar=True)
            trial = self.study.ask()
            point = {key: suggest(trial, key, values) for key, values in self.space.varied.items()}
            try:
                if self.space.allows(point):
                    self.composed(point)
                    return trial
            except ConfigError as error:
                refused = error
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        raise refused or ValueError(f"{self.space.place}: the constraints allow too little to search: widen the space.")

    def seed(self) -> int:
        """A function of how many trials there are: going on does not draw again what was drawn at the beginning."""
        number = len(self.study.get_trials(deepcopy=False))
        return int.from_bytes(hashlib.sha256(f"{self.usual.seed} {number}".encode()).digest()[:4])

    def composed(self, point: Point) -> Settings:
        return compose("config", [*self.space.words(point), "name=-"])

    def heard(self, job: Job) -> None:
        trial = self.trials[job]
        for row in job.heard:
            if row.get(self.metric) is not None and row["step"] not in self.reported(trial):
                trial.report(row[self.metric], row["step"])
                if row["step"] < job.max_steps and not job.stopped and trial.should_prune():
                    self.hopeless.add(job)
                    job.stop()
        if time.monotonic() > self.ends and not job.stopped:
            job.stop()

    def reported(self, trial: Any) -> dict[int, float]:
        """What Optuna knows of the trial's course: one that goes on tells it again."""
        return self.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    def ended(self, job: Job, code: int) -> None:
        trial, states = self.trials[job], self.optuna.trial.TrialState
        if job.failed(code):
            self.failures.append(f"{job.name}: {job.reason(code)} Log: {job.log}")
        if code == 0 and math.isfinite(job.best):
            self.study.tell(trial, job.best)
        elif code in INTERRUPTED and job in self.hopeless:
            with suppress(OSError):  # only its report needs it
                atomic.write_bytes(job.folder / PRUNED, json.dumps({"step": job.step}).encode())
            self.study.tell(trial, state=states.PRUNED)
        elif code in INTERRUPTED or (code != 0 and not (job.folder / "nonfinite").exists()):
            return  # a kill, a full disk: no fault of its settings, and left for the next time
        else:
            trial.set_user_attr("reason", job.reason(code) if code else f"It has no {self.metric}.")
            self.study.tell(trial, state=states.FAIL)
        del self.trials[job]

    def release(self) -> None:
        """Let go of what is not finished: the next worker finds it by our file."""
        if not self.trials:
            self.worker_file(self.worker).unlink()
        self.alive.release()


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("Searching needs optuna: pip install optuna.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def suggest(trial: Any, key: str, values: Range | list[Any]) -> Any:
    """Optuna's value for a setting."""
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    if isinstance(values.low, int):
        return trial.suggest_int(key, values.low, values.high, step=values.step or 1, log=values.log)
    return trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)


def storage_error(settings: SweepSettings, error: Exception) -> str:
    """The sentence about a storage that does not answer."""
    said = " ".join(str(error).split())
    return (f"storage={hide_password(settings.storage) or JOURNAL} cannot be reached or used "
            f"({type(error).__name__}: {hide_password(said)[:200]}).")


def damaged_line(journal: Path) -> str:
    """What to do about a journal of which a line is not what Optuna writes; empty if it is not that."""
    for number, line in enumerate(journal.read_bytes().splitlines() if journal.is_file() else (), 1):
        try:
            atomic.parse_json(line)
        except ValueError:
            return f" Line {number} of {journal} is damaged: put a copy back, or choose another name=."
    return ""


def hide_password(text: str) -> str:
    """A URL without the password in it, wherever that stands and whatever it is made of."""
    return re.sub(r"\?\S*", "?...", re.sub(r"://.*@", "://...@", text))


def print_best_trial(source: Search, advice: str) -> None:
    """Print how the trials ended, and the command line of the best one."""
    trials = source.taken()
    states = {"finished": "COMPLETE", "stopped early": "PRUNED", "failed": "FAIL", "not finished": "RUNNING"}
    counts = {word: sum(trial.state.name == name for trial in trials) for word, name in states.items()}
    ended = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    say(f"{counted(len(trials), 'trial')}: {ended}.{advice}")
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if complete:
        best = min(complete, key=lambda trial: trial.value)
        words = source.space.words({key: best.params[key] for key in source.space.varied})
        run = source.folder / f"trial_{best.number:04d}"
        say(f"Best: {run}, {source.metric} {best.value:.4f}\n"
            f"  {shlex.join(['python', 'train.py', *words])}\n{next_commands(run)}")
