"""A grid: one run for each combination of the values on a command line, in runs/SWEEP/JOB/.

Numbers are read by Hydra's grammar, text is split at its commas. Each job is a process of its own
(sweep/jobs.py), or one on a cluster (sweep/cluster.py), and a job that fails stops no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString, RangeSweep
from hydra.errors import HydraException

from conf.convert import is_text
from conf.identity import flat, kind
from conf.presets import ConfigError, groups, options
from conf.schema import as_yaml, compose, folder_name
from conf.settings import Settings, leaves
from setting import as_word
from sweep.cluster import ClusterRunner
from sweep.jobs import (
    Job,
    LocalRunner,
    Progress,
    comparison_metric,
    job_overrides,
    locked,
    print_best,
    report_failures,
    run_jobs,
)
from terminal import counted, output, say

MOST_JOBS = 10_000
FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle)\(.*\)$", re.DOTALL)
# What stands before the next comma, or at the end.
QUOTED_TEXT = re.compile(
    r"""\s*(?P<quote>['"])(?P<text>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)\s*(?=,|$)""", re.DOTALL)
PLAIN_TEXT = re.compile(r"(?P<text>(?:\{[^{}]*\}|\[[^][]*\]|\([^()]*\)|\\.|[^,])*)", re.DOTALL)
# How the overrides begin that are not for the jobs.
OWN = ("jobs=", "name=", "hydra/launcher=", "hydra.launcher.")


@dataclass(frozen=True)
class GridSettings:
    """How a grid is run; all else on its command line is for its jobs."""

    jobs: int = 1  # at a time, on this machine

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.jobs < 1:
            yield f"jobs={self.jobs} must be at least 1."


class Grid:
    """The jobs that wait for their turn, and why others failed."""

    def __init__(self, left: list[Job], failures: list[str]) -> None:
        self.left, self.failures, self.done = left, failures, 0

    @property
    def waiting(self) -> bool:
        return bool(self.left)

    def next_job(self) -> Job | None:
        job = next((job for job in self.left if not job.busy()), None)
        if job:
            self.left.remove(job)
        return job

    def heard(self, job: Job) -> None:
        pass

    def ended(self, job: Job, code: int) -> None:
        if job.failed(code):
            self.failures.append(f"{job.name}: {job.reason(code)} Log: {job.log}")
        self.done += code == 0


@dataclass(frozen=True)
class Plan:
    """What a grid's command line comes to."""

    swept: list[str]  # the settings that tell its jobs apart
    composed: dict[str, tuple[list[str], Settings]]  # by a job's name, its overrides and settings
    failures: list[str]  # why other combinations are no jobs
    launcher: list[str]  # overrides that choose a cluster
    jobs: int  # at a time

    @property
    def folder(self) -> Path:
        some = next(iter(self.composed.values()))[1]
        return Path(some.runs_dir) / some.name


def run_grid(overrides: list[str], show: bool = False) -> int:
    """Run all combinations, or what is left of them; return the exit code.

    With `show`, print each job's settings instead, as documents of one YAML text.

    Raises ValueError for what no job can be made of, and where a folder holds another run, before
    any job starts.
    """
    plan = plan_grid(overrides)
    if show:
        for job, (_, settings) in plan.composed.items():
            output(f"---  # {job}\n{as_yaml(settings)}", end="")
        return report_failures(plan.failures)
    folder, composed, failures = plan.folder, plan.composed, plan.failures
    slots = ClusterRunner(plan.launcher, folder) if plan.launcher else LocalRunner(plan.jobs)
    from checkpointing.resume import is_finished  # imports torch, which a mistake above need not wait for

    with locked(folder):
        jobs = [Job(job, folder, job_overrides(words, folder), settings.training.max_steps,
                    comparison_metric(plan.swept))
                for job, (words, settings) in composed.items()]
        finished = [job for job in jobs if is_finished(composed[job.name][1], job.folder)]
        source = Grid([job for job in jobs if job not in finished], failures)
        total = len(jobs) + len(failures)
        say(f"Sweep: {folder}, {counted(total, 'job')}"
            + (f", {len(finished)} finished before" if finished else "")
            + (f", {len(failures)} that cannot be: see below" if failures else ""))
        progress = Progress(total, len(finished), len(failures))
        for job in finished:
            job.update()
            progress.note(job.best, job.name)
        code = run_jobs(source, slots, progress)
    say(f"{len(finished) + source.done} of {counted(total, 'job')} finished in {folder}."
        + (" The same command goes on." if code else ""))
    print_best(jobs)
    return code or report_failures(source.failures)


def plan_grid(overrides: list[str]) -> Plan:
    """The jobs of a grid's command line. Raises ValueError for what no job can be made of."""
    def about(*beginnings: str) -> list[str]:
        return [word for word in overrides if word.startswith(beginnings)]

    limits = compose(GridSettings, about("jobs="))
    choices = {word: values_of(word) for word in overrides if not word.startswith(OWN)}
    if not choices:
        raise ValueError("-m runs several values, and there are none: separate them by commas, as "
                         "in optim.lr=1e-3,3e-3, or leave -m out.")
    # Where each setting has a single value, the sweep is one job, which others can join later.
    several = [word for word, values in choices.items() if len(values) > 1]
    if not several:
        several = [word for word in choices if tells_apart(word)] or list(choices)
    swept = {word.partition("=")[0]: word for word in several}
    name = about("name=")[-1] if about("name=") else f"name={automatic_name(choices, swept)}"
    if math.prod(len(values) for values in choices.values()) > MOST_JOBS:
        raise too_many(" ".join(several))
    combinations = [[*words, name] for words in product(*choices.values())]
    composed, failures = compose_all(combinations, list(swept))
    launcher = about("hydra/launcher=", "hydra.launcher.")
    return Plan(list(swept), composed, failures, launcher, limits.jobs)


def tells_apart(override: str) -> bool:
    """Whether an override is of a setting that makes one run another: no preset, and no folder."""
    key = override.partition("=")[0]
    return key in leaves(Settings) and kind(key) != "free"


def too_many(words: str) -> ConfigError:
    return ConfigError([f"{words} would be more than {MOST_JOBS:,} jobs: name fewer values; "
                        f"python -m scripts.sweep searches large spaces."])


def compose_all(
    combinations: list[list[str]], swept: list[str]
) -> tuple[dict[str, tuple[list[str], Settings]], list[str]]:
    """Each job's name, words and settings, and what is wrong with those that cannot be composed.

    Raises ConfigError if none can, and ValueError if two would share a name.
    """
    composed: dict[str, tuple[list[str], Settings]] = {}
    errors: dict[str, ConfigError] = {}
    for words in combinations:
        values = dict(word.partition("=")[::2] for word in words)
        try:
            settings = compose("config", words)
        except ConfigError as error:
            errors[job_name(swept, values)] = error
            continue
        name = job_name(swept, values | flat(asdict(settings)))
        if composed.setdefault(name, (words, settings))[1] != settings:
            other = composed[name][0]
            raise ValueError(f"{' '.join(words)} and {' '.join(other)} would both be the run {name}: "
                             f"sweep them apart, each with a name= of its own.")
    if not composed:
        raise next(iter(errors.values()))
    return composed, [f"{name}: {error}" for name, error in errors.items()]


def job_name(swept: list[str], values: dict[str, object]) -> str:
    """As in "lr=0.001,n_layer=2": the swept settings, by the last part of their names."""
    parts = [f"{key.rpartition('.')[2]}={as_word(values[key])}" for key in swept]
    return folder_name(",".join(parts))


def automatic_name(choices: dict[str, list[str]], swept: dict[str, str]) -> str:
    """A name for the sweep that does not depend on the values: new ones join the old in its folder."""
    fixed = [values[0] for word, values in choices.items() if word not in swept.values()]
    try:
        base = compose("config", fixed).auto_name
    except ConfigError:  # without what is swept it is nothing yet
        base = "sweep"
    return folder_name(f"{base}-by-{','.join(key.rpartition('.')[2] for key in swept)}")


def values_of(override: str) -> list[str]:
    """The overrides, one or more, that an override of a grid stands for.

    Values are written as Hydra has them; text is split at its commas. Raises ValueError for what
    cannot be listed, such as interval(0, 1).
    """
    key, _, value = override.partition("=")
    takes_text = key in groups() or is_text(leaves(Settings).get(key))
    if takes_text and not FUNCTION.match(value):
        return [f"{key}={text}" for text in split_text(value)]
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError):
        return [override]  # for the schema to refuse
    if not parsed.is_sweep_override():
        return [override]
    if isinstance(parsed.value(), Glob) and key in groups():
        names = parsed.value().filter(options(key))
        if not names:
            raise ValueError(f"{override} fits no preset. There are: {', '.join(options(key))}.")
        return [f"{key}={name}" for name in names]
    values: list[object] = []
    span = parsed.value()
    if isinstance(span, RangeSweep) and abs(span.stop - span.start) > MOST_JOBS * abs(span.step):
        raise too_many(override)
    with suppress(HydraException, ValueError):
        plain, values = list(parsed.sweep_string_iterator()), list(parsed.sweep_iterator())
    if not values:
        raise ValueError(f"{override} has no values that can be listed: write them with commas "
                         f"between, or as range(1,4); for what lies between two limits there is "
                         f"python -m scripts.sweep.")
    # Text as it is: Hydra's form of it has quotes and backslashes, which nobody would take out.
    text = [value.text if isinstance(value, QuotedString) else
            value if isinstance(value, str) else word
            for value, word in zip(values, plain, strict=True)]
    return [f"{key}={word}" for word in text]


def split_text(value: str) -> list[str]:
    """The texts between commas.

    A comma in quotes or brackets, or behind a backslash, is part of a text. A text in quotes loses
    them; a comma or quote behind a backslash loses that.
    """
    found: list[str] = []
    rest: str | None = value
    while rest is not None:
        match = QUOTED_TEXT.match(rest) or PLAIN_TEXT.match(rest)
        text = match["text"].strip() if match.re is PLAIN_TEXT else match["text"]
        found.append(re.sub(r"""\\([,'"])""", r"\1", text))
        end = match.end()
        rest = rest[end + 1 :] if end < len(rest) else None
    return found
