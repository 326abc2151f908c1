"""Grid search: one run for each combination of the values on a command line, in runs/SWEEP/JOB/.

Jobs run in processes of their own (runner.py) or on a cluster (cluster.py), and the failure of one
stops no other.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from conf.hints import last_part
from conf.identity import flat, kind
from conf.schema import as_yaml, compose, folder_name
from conf.settings import Settings, leaves
from conf.yaml_files import ConfigError
from setting import SettingsBase, as_word, setting
from sweep.cluster import ClusterRunner
from sweep.jobs import Job, locked
from sweep.runner import JobSource, LocalRunner, Runner, run_jobs
from sweep.summary import RESUME, Progress, comparison_metric, print_best, report_failures
from sweep.values import MAX_JOBS, too_many_jobs, values_of
from terminal import counted, output, say

LAUNCHER_PREFIXES = ("hydra/launcher=", "hydra.launcher.")


@dataclass(frozen=True)
class GridSettings(SettingsBase):
    """The settings of a grid itself; its other overrides are for the jobs."""

    jobs: int = setting(1, "that run at a time on this machine", ge=1)
    processes_per_job: int = setting(1, "started by torchrun; with GPUs, one for each", ge=1)


@dataclass(frozen=True)
class Plan:
    """The jobs of a grid's command line."""

    swept: list[str]  # the settings that differ between jobs
    composed: dict[str, tuple[list[str], Settings]]  # by job name
    failures: list[str]  # combinations that cannot be composed, with the reason
    launcher: list[str]  # overrides that choose a cluster
    own: GridSettings

    @property
    def folder(self) -> Path:
        _, settings = next(iter(self.composed.values()))
        return Path(settings.runs_dir) / settings.name

    def runner(self) -> Runner:
        if self.launcher:
            return ClusterRunner(self.launcher, self.folder, self.own.processes_per_job)
        return LocalRunner(self.own.jobs, self.own.processes_per_job)


class Grid(JobSource):
    """A source of jobs for run_jobs: a list."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    @property
    def pending(self) -> bool:
        return bool(self.jobs)

    def next_job(self) -> Job | None:
        for job in self.jobs:
            if not job.is_locked():
                self.jobs.remove(job)
                return job
        return None


def run_grid(overrides: list[str], show: bool = False) -> int:
    """Run all combinations that are not finished; return the exit code.

    With `show`, print the settings of each job as a YAML document instead. Raises ValueError,
    before any job starts, if no job can be composed or a folder holds a different run.
    """
    plan = plan_grid(overrides)
    if show:
        for name, (_, settings) in plan.composed.items():
            output(f"---  # {name}\n{as_yaml(settings)}", end="")
        return report_failures(plan.failures)
    code, jobs = run_plan(plan)
    print_best(jobs)
    return code or report_failures(plan.failures)


def run_plan(plan: Plan) -> tuple[int, list[Job]]:
    """Run the jobs that are not finished; return the exit code of an interruption or 0, and all.

    Adds the jobs that fail to `plan.failures`. Raises ValueError as `run_grid` does.
    """
    runner = plan.runner()
    # Imports torch, which an error above should not wait for.
    from checkpointing.resume import is_finished

    with locked(plan.folder):
        # Find the jobs that are left to run.
        jobs, left, finished = [], [], []
        metric = comparison_metric(plan.swept)
        for name, (words, settings) in plan.composed.items():
            job = Job(name, plan.folder, words, settings.training.max_steps, metric,
                      plan.own.processes_per_job)
            jobs.append(job)
            if is_finished(settings, job.folder):
                finished.append(job)
            else:
                left.append(job)

        # Say how many jobs there are, and how many need not or cannot run.
        total = len(jobs) + len(plan.failures)
        parts = [f"Sweep: {plan.folder}", counted(total, "job")]
        if finished:
            parts.append(f"{len(finished)} finished before")
        if plan.failures:
            parts.append(f"{len(plan.failures)} invalid (listed at the end)")
        say(", ".join(parts))

        # Run the others. The best result so far may be that of a finished job.
        progress = Progress(total, len(finished), plan.failures)
        for job in finished:
            job.update()
            progress.add_result(job)
        code = run_jobs(Grid(left), runner, progress)

    say(f"{progress.counts['done']} of {counted(total, 'job')} finished in {plan.folder}.")
    if code:
        say(RESUME)
    return code, jobs


def plan_grid(overrides: list[str]) -> Plan:
    """The jobs of a grid's command line. Raises ValueError if no job can be composed."""
    # Tell apart the settings of the grid itself, its name, those of a cluster, and those of jobs.
    own = [word for word in overrides if word.partition("=")[0] in leaves(GridSettings)]
    names = [word for word in overrides if word.startswith("name=")]
    launcher = [word for word in overrides if word.startswith(LAUNCHER_PREFIXES)]
    settings = compose(GridSettings, own)
    others = [word for word in overrides if word not in (*own, *names, *launcher)]
    choices = {word: values_of(word) for word in others}

    # Find the settings that have several values.
    if not choices:
        raise ValueError("-m found no values to sweep: separate several values by commas, as in "
                         "optim.lr=1e-3,3e-3, or leave -m out.")
    several = [word for word, values in choices.items() if len(values) > 1]
    for word in several:
        if word.startswith("runs_dir="):
            raise ValueError(f"{word} names several folders: choose one for the whole sweep.")
    if not several:
        # A sweep of one job, which other values of the same settings can join later.
        several = [word for word in choices if changes_run(word)] or list(choices)
    swept = list(dict.fromkeys(word.partition("=")[0] for word in several))
    if math.prod(map(len, choices.values())) > MAX_JOBS:
        raise too_many_jobs(" ".join(several))

    # Compose the settings of each combination.
    name = names[-1] if names else f"name={automatic_name(choices, swept)}"
    combinations = [[*words, name] for words in product(*choices.values())]
    composed, failures = compose_all(combinations, swept)
    return Plan(swept, composed, failures, launcher, settings)


def changes_run(override: str) -> bool:
    """Whether an override sets a value that belongs to a run's identity: no preset, no path."""
    key = override.partition("=")[0]
    return key in leaves(Settings) and kind(key) != "free"


def compose_all(combinations: list[list[str]],
                swept: list[str]) -> tuple[dict[str, tuple[list[str], Settings]], list[str]]:
    """The overrides and settings of each job by its name, and the errors of the others.

    Raises ConfigError if none can be composed, ValueError if two share a name.
    """
    # Compose all, so that all errors come in one report.
    composed: dict[str, tuple[list[str], Settings]] = {}
    errors: dict[str, ConfigError] = {}
    for words in combinations:
        # Without settings, a job that cannot be composed is named by its overrides.
        values = dict(word.partition("=")[::2] for word in words)
        try:
            settings = compose("config", words)
        except ConfigError as error:
            errors[job_name(swept, values)] = error
            continue
        # Values that mean the same, such as 1e-3 and 0.001, are one job.
        name = job_name(swept, values | flat(asdict(settings)))
        if composed.setdefault(name, (words, settings))[1] != settings:
            other = composed[name][0]
            raise ValueError(f"{' '.join(words)} and {' '.join(other)} have the same name, {name}: "
                             f"sweep them separately, each with its own name=.")
    if not composed:
        raise next(iter(errors.values()))
    return composed, [f"{name}: {error}" for name, error in errors.items()]


def job_name(swept: list[str], values: dict[str, object]) -> str:
    """A job's folder, as in "lr=0.001,n_layer=2"."""
    return folder_name(",".join(f"{last_part(key)}={as_word(values[key])}" for key in swept))


def automatic_name(choices: dict[str, list[str]], swept: list[str]) -> str:
    """The name of a sweep does not depend on the values, so that new ones join its folder."""
    fixed = [values[0] for word, values in choices.items() if word.partition("=")[0] not in swept]
    base = ""
    with suppress(ConfigError):
        settings = compose("config", fixed, validate=False)
        # A sweep that resumes can use the tokens of a text that is gone.
        gone = {f"data.{problem}" for problem in settings.data.missing_files()}
        # Some settings are only valid together with the swept ones.
        if gone.issuperset(settings.problems()):
            base = settings.auto_name
    return folder_name(f"{base or 'sweep'}-by-{','.join(map(last_part, swept))}")
