"""Run jobs, each a training in a child process, several at a time on this machine.

A child whose parent ends, even by `kill -9`, notices that its standard input was closed: it saves
and stops, as after SIGTERM. Knows nothing of where jobs come from: grid.py and search.py do.
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
import locks
from checkpointing.run_folder import LOCK, describe_process, first_run
from progress import ProgressBar, print_line
from terminal import counted, say
from training.interrupt import CHILD, REQUESTS, WARNINGS, Interrupt

TRAIN = Path(__file__).parent.parent / "train.py"
# Exit codes of a job that saved after a signal, or was killed by one.
INTERRUPTED = {128 + number for number in (*REQUESTS, *WARNINGS)}
INTERRUPTED |= {-number for number in (*REQUESTS, *WARNINGS, signal.SIGKILL)}
RESUME = "Run the same command again to resume."


def python(processes: int) -> list[str]:
    """The words before a program's name that start it in this many processes on this machine."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}"]


@dataclass(eq=False)
class Job:
    """One training of a sweep: `python train.py` with `overrides`, into the folder SWEEP/NAME.

    With several `processes`, torchrun starts them.
    """

    name: str
    sweep: Path
    overrides: list[str]
    max_steps: int
    metric: str = "val_loss"
    processes: int = 1
    process: Any = None  # a Popen, or its like on a cluster
    slot: int = 0
    started_at: float = 0.0
    stop_requested: bool = False
    step: int = 0
    best: float = math.inf
    metrics_read: int = 0  # bytes
    log_start: int = 0  # bytes of the log that earlier attempts wrote
    new_rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.sweep / self.name

    @property
    def log(self) -> Path:
        """The output of all attempts. It is not in the run's folder, which restart= renames."""
        return self.sweep / "logs" / f"{self.name}.txt"

    @property
    def command(self) -> list[str]:
        """The command line. W&B groups the jobs of a sweep, unless the overrides say otherwise."""
        wandb = [f"logger.group={self.sweep.name}", "logger.tags=sweep"]
        place = [f"runs_dir={self.sweep.parent}", f"name={self.sweep.name}/{self.name}"]
        return [*python(self.processes), str(TRAIN), *wandb, *self.overrides, *place]

    def is_locked(self) -> bool:
        """Whether a process trains in the folder: a killed sweep's child may still be saving."""
        try:
            if (self.folder / LOCK).exists():
                locks.Lock(self.folder / LOCK, describe_process()).release()
        except BlockingIOError:
            return True
        return False

    def open_log(self) -> Path:
        """Note the start of an attempt; return the log that its output is appended to."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self.log_start = self.log.stat().st_size
        self.started_at = time.monotonic()
        return self.log

    def update(self) -> None:
        """Read the metrics that were written since the last call, into `new_rows`."""
        self.new_rows = []
        metrics = self.folder / "metrics.jsonl"
        with suppress(OSError), os.fdopen(atomic.open_regular(metrics), "rb") as file:
            # A run that resumes cuts its metrics back to the checkpoint.
            if os.fstat(file.fileno()).st_size < self.metrics_read:
                self.metrics_read = 0
            file.seek(self.metrics_read)
            for line in file:
                # The last line may still be being written.
                if not line.endswith(b"\n"):
                    break
                self.metrics_read += len(line)
                with suppress(ValueError):
                    self._add(atomic.parse_json(line))

    def _add(self, row: Any) -> None:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        self.new_rows.append(row)
        self.step = row["step"]
        if isinstance(row.get(self.metric), int | float):
            self.best = min(self.best, row[self.metric])

    def stop(self) -> None:
        """Ask the process to save and end."""
        self.stop_requested = True
        self.process.terminate()

    def exit_code(self, code: int) -> int:
        """The run's exit code, for that of its process.

        torchrun exits with 1 also where the run was stopped. Then the run's own files tell whether
        all that it has trained is saved.
        """
        if code != 1 or self.processes == 1 or not self.stop_requested:
            return code
        # Imports torch, which --help should not wait for.
        from checkpointing import store

        saved = store.list_checkpoints(self.folder / "checkpoints")
        last_step = saved[-1].step if saved else 0
        return 128 + signal.SIGTERM if last_step == self.step else code

    def failed(self, code: int) -> bool:
        """Whether it ended with an error, rather than because we stopped it."""
        return code != 0 and not (self.stop_requested and code in INTERRUPTED)

    def failure(self, code: int) -> str:
        """The reason for an exit code: the last error message, or the signal that killed it."""
        if code < 0:
            return (f"killed by {signal.Signals(-code).name}; "
                    f"run the same command again to resume it")
        output = b""
        if self.log.exists():
            output = self.log.read_bytes()[self.log_start :]
        text = output.decode(errors="replace").replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("Error: ", "Interrupted: "))]
        if self.processes > 1 and not errors:
            # The last lines are torchrun's table.
            return (f"one of its {self.processes} processes ended without a message, perhaps "
                    f"killed; run the same command again to resume it.")
        last = (errors or lines or [f"exit code {code}"])[-1]
        return last.removeprefix("Error: ")

    def failure_line(self, code: int) -> str:
        """One line of the list of failures."""
        return f"{self.name}: {self.failure(code)} Log: {self.log}"


class JobSource(Protocol):
    """Creates jobs, and is told about new metrics in `job.new_rows` and about exit codes."""

    pending: bool  # whether a job may follow although there is none now

    def next_job(self) -> Job | None: ...
    def on_metrics(self, job: Job) -> None: ...
    def on_exit(self, job: Job, code: int) -> None: ...


class Runner:
    """Runs jobs, at most `max_jobs` at a time. None of them outlives the context."""

    poll_seconds = 0.1

    def __init__(self, max_jobs: float) -> None:
        self.max_jobs = max_jobs
        self.running: list[Job] = []

    def wait(self) -> None:
        while any(job.process.poll() is None for job in self.running):
            time.sleep(self.poll_seconds)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        """Have the running jobs save and stop. A second Ctrl-C kills them."""
        try:
            if kind is KeyboardInterrupt:
                raise KeyboardInterrupt
            for job in self.running:
                job.stop()
            self.wait()
        except KeyboardInterrupt:
            for job in self.running:
                job.process.kill()
            self.wait()
            raise


class Torchrun(subprocess.Popen):
    """torchrun with the processes of a job."""

    def terminate(self) -> None:
        """Have the processes save and stop, as they do when their standard input ends.

        After a signal, torchrun would kill those that take longer than 30 s.
        """
        self.stdin.close()


class LocalRunner(Runner):
    """Runs jobs on this machine, each in `processes` processes.

    Each process gets the same share of the threads, and one of the GPUs.
    """

    def __init__(self, max_jobs: int, processes: int = 1) -> None:
        # Importing torch takes a second, which an error in the settings should not wait for.
        import torch

        super().__init__(max_jobs)
        self.processes = processes
        self.threads = torch.get_num_threads()
        self.gpus = [str(number) for number in range(torch.cuda.device_count())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and self.gpus:
            self.gpus = visible.split(",")[: len(self.gpus)]

    def environment(self, slot: int) -> dict[str, str]:
        """A job's environment. With other thread counts, results would differ in the last bits."""
        share = {CHILD: "1"}
        all_processes = self.max_jobs * self.processes
        if all_processes > 1:
            share["OMP_NUM_THREADS"] = str(max(1, self.threads // all_processes))
        if all_processes > 1 and self.gpus:
            first = slot * self.processes
            own = [self.gpus[number % len(self.gpus)]
                   for number in range(first, first + min(self.processes, len(self.gpus)))]
            share["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return os.environ | share

    def start(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.slot = min(set(range(self.max_jobs)) - {other.slot for other in self.running})
            log = atomic.LineFile(job.open_log())
            try:
                # In a session of its own, a job does not receive Ctrl-C from our terminal.
                start = Torchrun if job.processes > 1 else subprocess.Popen
                job.process = start(
                    job.command, stdin=subprocess.PIPE, stdout=log.descriptor,
                    stderr=log.descriptor,
                    env=self.environment(job.slot), start_new_session=True)
            finally:
                log.close()
            self.running.append(job)


def run_jobs(source: JobSource, runner: Runner, progress: Progress) -> int:
    """Run the jobs of `source` until there are no more.

    Returns the exit code of an interruption, or 0.
    """
    with Interrupt() as interrupt, progress, runner:
        stopping = False
        while True:
            if not interrupt:
                runner.start(next_jobs(source, runner))
            if not runner.running and (interrupt or not source.pending):
                return interrupt.exit_code
            if interrupt and not stopping:
                stopping = True
                print_line(f"Stopping: waiting for {counted(len(runner.running), 'running job')} "
                           f"to save. Press Ctrl-C again to kill.")
                for job in runner.running:
                    job.stop()
            for job in list(runner.running):
                # Poll first: the metrics of a job that has ended are complete.
                code = job.process.poll()
                job.update()
                source.on_metrics(job)
                if code is not None:
                    code = job.exit_code(code)
                    runner.running.remove(job)
                    progress.on_exit(job, code)
                    source.on_exit(job, code)
            progress.show(runner.running)
            time.sleep(runner.poll_seconds)


def next_jobs(source: JobSource, runner: Runner) -> list[Job]:
    """The jobs that can start now."""
    jobs: list[Job] = []
    while len(runner.running) + len(jobs) < runner.max_jobs:
        job = source.next_job()
        if not job:
            break
        jobs.append(job)
    return jobs


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a grid's folder, so that no second process runs its jobs. Raises ValueError."""
    refuse_run(folder)
    try:
        lock = locks.Lock(folder / "sweep.lock", describe_process())
    except BlockingIOError as error:
        raise ValueError(f"{folder} is being swept by {error.strerror}: wait for it to end, or "
                         f"use another name=.") from None
    try:
        yield
    finally:
        lock.release()


def refuse_run(folder: Path) -> None:
    """Raise ValueError for a run's folder and for one inside it, where no job could train."""
    run = first_run((folder, *folder.parents))
    if run:
        raise ValueError(f"{run} holds a run, not a sweep: use another name=.")


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


class Progress:
    """One line: the number of jobs in each state, the best result so far, and the time left.

    `total` is the number of jobs, if it is known, of which some are done or have failed already.
    """

    def __init__(self, total: int | None, done: int, failed: int) -> None:
        self.counts = {"done": done, "stopped": 0, "failed": failed}
        self.best, self.best_name = math.inf, ""
        bar, times = "{desc} [{elapsed}]", "{elapsed} elapsed"
        if total:
            bar = "|{bar:10}| {desc} [{elapsed}<{remaining}]"
            times += ", {remaining} left"
        # smoothing=0 computes the time left from the mean speed.
        self.bar = ProgressBar(
            total=total, initial=done + failed, smoothing=0, mininterval=0.5,
            bar_format=bar, plain_format=f"{{desc}}, {times}")

    def on_exit(self, job: Job, code: int) -> None:
        """Count a job that has ended, and print how it ended."""
        self.add_result(job)
        result = f"no {job.metric}"
        if math.isfinite(job.best):
            result = f"{job.metric} {job.best:.4f}"
        state = "stopped" if code else "done"
        if job.failed(code):
            state, result = "failed", job.failure(code)
        self.counts[state] += 1
        minutes, seconds = divmod(round(time.monotonic() - job.started_at), 60)
        print_line(f"{job.name}: {state} after {minutes}:{seconds:02d}, {result}")

    def show(self, running: list[Job]) -> None:
        # The part of a running job that is done counts too.
        done = sum(self.counts.values())
        for job in running:
            self.add_result(job)
            done += min(1.0, job.step / job.max_steps)
        parts = [f"{len(running)} running"]
        parts += [f"{count} {state}" for state, count in self.counts.items()]
        if self.best_name:
            parts.append(f"best {self.best:.4f} ({self.best_name})")
        self.bar.set_description_str(", ".join(parts), refresh=False)
        self.bar.update(done - self.bar.n)

    def add_result(self, job: Job) -> None:
        if job.best < self.best:
            self.best, self.best_name = job.best, job.name

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.close()
