"""Jobs in slots: each training a child process of its own, some at a time, each with its share of the machine.

A child whose parent is gone, however that went, notices by the end of its standard input: it saves and stops, as after
SIGTERM. Knows nothing of what the jobs are for; sweep/grid.py and scripts/sweep.py do.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import atomic
from checkpointing.run_folder import LOCK, describe_process, first_run
from progress import ProgressBar, print_line
from terminal import counted, say
from training.interrupt import CHILD, REQUESTS, WARNINGS, Interrupt

TRAIN = Path(__file__).parent.parent / "train.py"
# Exit codes of a job that saved after a signal, or was killed by one.
INTERRUPTED = (*(128 + number for number in (*REQUESTS, *WARNINGS)),
               *(-number for number in (*REQUESTS, *WARNINGS, signal.SIGKILL)))


class Process(Protocol):
    """What runs a job: a child process, or something on a cluster that stands for one."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(eq=False)
class Job:
    """One training of a sweep: `python train.py` with the overrides `words`, into the folder SWEEP/NAME."""

    name: str
    sweep: Path
    words: list[str]
    max_steps: int
    metric: str = "val_loss"
    process: Process | None = None
    slot: int = 0
    began: float = 0.0
    stopped: bool = False  # by us
    best: float = math.inf
    step: int = 0
    read: int = 0  # bytes of the metrics that were heard of
    said: int = 0  # bytes of the log that earlier attempts wrote
    heard: list[dict[str, Any]] = field(default_factory=list)  # what the last look at the metrics found

    @property
    def folder(self) -> Path:
        return self.sweep / self.name

    @property
    def log(self) -> Path:
        """What the process printed, all attempts in turn; beside the runs, for a run may be moved aside."""
        return self.sweep / "logs" / f"{self.name}.txt"

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(TRAIN), *self.words, f"runs_dir={self.sweep.parent}",
                f"name={self.sweep.name}/{self.name}"]

    def busy(self) -> bool:
        """Whether another process trains in its folder: the child of a sweep that was killed may still be saving."""
        try:
            if (self.folder / LOCK).exists():
                atomic.Lock(self.folder / LOCK, describe_process()).release()
        except BlockingIOError:
            return True
        return False

    def update(self) -> None:
        """Read what the metrics have grown by."""
        self.heard = []
        with suppress(OSError), os.fdopen(atomic.open_regular(self.folder / "metrics.jsonl"), "rb") as file:
            if os.fstat(file.fileno()).st_size < self.read:
                self.read = 0  # going on from a checkpoint cut them back
            file.seek(self.read)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.read += len(whole)
            for line in whole.splitlines():
                with suppress(ValueError):
                    row = atomic.parse_json(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        self.heard.append(row)
        for row in self.heard:
            self.step = row["step"]
            if isinstance(row.get(self.metric), int | float):
                self.best = min(self.best, row[self.metric])

    def stop(self) -> None:
        """Have it save and end."""
        self.stopped = True
        self.process.terminate()

    def failed(self, code: int) -> bool:
        """Whether it ended by itself, and not well."""
        return code != 0 and not (self.stopped and code in INTERRUPTED)

    def reason(self, code: int) -> str:
        """Why it ended as it did: its last words, or the signal that it died of."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}; the same command goes on with it"
        said = self.log.read_bytes()[self.said :].decode(errors="replace") if self.log.exists() else ""
        lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
        errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
        return (errors or lines or [f"exit code {code}"])[-1]


class Source(Protocol):
    """Where jobs come from, and who hears how they go."""

    waiting: bool  # there will be a next job, though not now

    def next_job(self) -> Job | None:
        """The next one to start; None if there is none now."""

    def heard(self, job: Job) -> None:
        """A running job has written metrics: `job.heard`."""

    def ended(self, job: Job, code: int) -> None:
        """A job has ended, with an exit code that is 0 if it is finished."""


class LocalRunner:
    """Starts jobs on this machine, `count` at a time. None outlives the context."""

    poll_seconds = 0.1

    def __init__(self, count: int) -> None:
        import torch  # takes a second or more, which a mistake in the settings need not wait for

        self.running: list[Job] = []
        self.threads = torch.get_num_threads()
        self.count = count
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = [str(number) for number in range(torch.cuda.device_count())]
        if given is not None and self.gpus:
            self.gpus = given.split(",")[: len(self.gpus)]

    def environment(self, slot: int) -> dict[str, str]:
        """As many threads for each, or their results would differ in the last bits; a GPU of its own where there is one."""
        share = {CHILD: "1"}
        if self.count > 1:
            share["OMP_NUM_THREADS"] = str(max(1, self.threads // self.count))
            if self.gpus:
                share["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return os.environ | share

    def start(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.slot = min(set(range(self.count)) - {one.slot for one in self.running})
            job.process = start(job.command, self.environment(job.slot), log_of(job))
            self.running.append(job)

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        """Whatever happened, no job is left behind: they save, unless a second Ctrl-C does not wait for that."""
        try:
            if kind is KeyboardInterrupt:
                raise KeyboardInterrupt
            for job in self.running:
                job.stop()
            while any(job.process.poll() is None for job in self.running):
                time.sleep(self.poll_seconds)
        except KeyboardInterrupt:
            for job in self.running:
                job.process.kill()
            while any(job.process.poll() is None for job in self.running):
                time.sleep(self.poll_seconds)
            raise


def log_of(job: Job) -> Path:
    """The log of a job that is about to start."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.said = job.log.stat().st_size if job.log.exists() else 0
    job.began = time.monotonic()
    return job.log


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A child in a session of its own, which Ctrl-C in our terminal does not reach: we decide what becomes of it."""
    lines = atomic.LineFile(log)
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=lines.handle, stderr=lines.handle, env=environment,
                                start_new_session=True)
    finally:
        lines.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a grid's folder: no second one starts the same jobs. Raises ValueError naming the holder, or for a run."""
    refuse_run(folder)
    try:
        lock = atomic.Lock(folder / "sweep.lock", describe_process())
    except BlockingIOError as error:
        raise ValueError(f"{folder} is being swept by {error.strerror}: wait for it, or choose another name=.") from None
    try:
        yield
    finally:
        lock.release()


def refuse_run(folder: Path) -> None:
    """Raises ValueError for the folder of a run, and for one inside it: no job could be trained there."""
    if run := first_run((folder, *folder.parents)):
        raise ValueError(f"{run} holds a run, not a sweep: choose another name=.")


def job_overrides(words: list[str], folder: Path) -> list[str]:
    """A job's overrides, with what W&B knows a sweep's jobs by unless they say it themselves."""
    return [f"logger.group={folder.name}", "logger.tags=sweep", *words]


def comparison_metric(keys: list[str]) -> str:
    """What tells jobs apart that differ in these settings: tokens of other texts and tokenizers have losses of their own."""
    return "bits_per_byte" if any(key.startswith("data") or key == "experiment" for key in keys) else "val_loss"


def run_jobs(source: Source, slots: LocalRunner, progress: Progress) -> int:
    """Run what `source` gives until there is no more; show how it goes. Returns the exit code of an interruption, or 0."""
    with Interrupt() as interrupt, progress, slots:
        told = False
        while True:
            jobs: list[Job] = []
            while not interrupt and len(slots.running) + len(jobs) < slots.count and (job := source.next_job()):
                jobs.append(job)
            slots.start(jobs)
            if not slots.running and (interrupt or not source.waiting):
                return interrupt.exit_code
            if interrupt and not told:
                told = True
                progress.say(f"Stopping: {counted(len(slots.running), 'running job')} saving first; "
                             f"Ctrl-C again does not wait for that.")
                for job in slots.running:
                    job.stop()
            for job in list(slots.running):
                code = job.process.poll()
                job.update()  # once more after its end
                source.heard(job)
                if code is not None:
                    slots.running.remove(job)
                    progress.ended(job, code)
                    source.ended(job, code)
            progress.show(slots.running)
            time.sleep(slots.poll_seconds)


def print_best(jobs: list[Job]) -> None:
    """Name the best of these jobs, and commands that show more; nothing where none has a result."""
    best = min(jobs, key=lambda job: job.best, default=None)
    if best is None or not math.isfinite(best.best):
        return
    say(f"Best: {best.folder}, {best.metric} {best.best:.4f}\n{next_commands(best.folder)}")


def next_commands(best: Path) -> str:
    """The commands that sample from a sweep's best run, and compare all of its runs."""
    return (f"  {shlex.join(['python', 'sample.py', f'run={best}'])}\n"
            f"  {shlex.join(['python', '-m', 'scripts.report', f'runs={best.parent}'])}")


def report_failures(failures: list[str]) -> int:
    """Say which jobs failed, and why; return the exit code."""
    if failures:
        say(f"{len(failures)} failed:\n  " + "\n  ".join(failures))
    return 1 if failures else 0


class Progress:
    """One line: how many jobs run, are done, have failed; the best so far; the time left.

    `total` jobs are expected, if that is known, of which some are done and some have failed before.
    """

    def __init__(self, total: int | None, done: int, failed: int) -> None:
        self.counts = {"done": done, "stopped": 0, "failed": failed}
        self.best, self.best_name = math.inf, ""
        # The share of a running job that is done counts: smoothing=0 makes the time left that of the mean speed.
        times = "{elapsed} elapsed, {remaining} left" if total else "{elapsed} elapsed"
        self.bar = ProgressBar(total=total, initial=done + failed, smoothing=0, mininterval=0.5,
                               bar_format="|{bar:10}| {desc} [{elapsed}<{remaining}]" if total else "{desc} [{elapsed}]",
                               plain_format=f"{{desc}}, {times}")

    def ended(self, job: Job, code: int) -> None:
        minutes, seconds = divmod(round(time.monotonic() - job.began), 60)
        result = f"{job.metric} {job.best:.4f}" if math.isfinite(job.best) else f"no {job.metric}"
        self.note(job.best, job.name)
        how = "failed" if job.failed(code) else "stopped" if code else "done"
        self.counts[how] += 1
        self.say(f"{job.name}: {how} after {minutes}:{seconds:02d}, {job.reason(code) if how == 'failed' else result}")

    def show(self, running: list[Job]) -> None:
        for job in running:
            self.note(job.best, job.name)
        shown = f"{len(running)} running, " + ", ".join(f"{count} {what}" for what, count in self.counts.items())
        best = f", best {self.best:.4f} ({self.best_name})" if self.best_name else ""
        self.bar.set_description_str(shown + best, refresh=False)
        share = sum(min(1.0, job.step / job.max_steps) for job in running)
        self.bar.update(sum(self.counts.values()) + share - self.bar.n)

    def note(self, best: float, name: str) -> None:
        """A result, perhaps of earlier."""
        if best < self.best:
            self.best, self.best_name = best, name

    def say(self, text: str) -> None:
        print_line(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.close()
