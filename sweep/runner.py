"""Run jobs in child processes, several at a time on this machine."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import closing
from typing import Protocol

import atomic
from progress import print_line
from sweep.jobs import Job
from sweep.summary import Progress
from terminal import counted
from training.interrupt import Interrupt
from training.parent import CHILD


class JobSource(Protocol):
    """Creates jobs, and may react to new metrics in `job.new_rows` and to exit codes."""

    pending: bool  # whether a job may follow although there is none now

    def next_job(self) -> Job | None: ...
    def on_metrics(self, job: Job) -> None: ...
    def on_exit(self, job: Job, code: int) -> None: ...


def watch(job: Job, source: JobSource, runner: Runner, progress: Progress) -> None:
    """Read the new metrics of a running job, and whether it has ended."""
    # Poll first: the metrics of a job that has ended are complete.
    code = job.process.poll()
    job.update()
    source.on_metrics(job)
    if code is not None:
        code = job.exit_code(code)
        runner.running.remove(job)
        progress.on_exit(job, code)
        source.on_exit(job, code)


def run_jobs(source: JobSource, runner: Runner, progress: Progress) -> int:
    """Run the jobs of `source` until there are no more.

    Returns the exit code of an interruption, or 0.
    """
    with Interrupt() as interrupt, progress.bar, runner:
        stopping = False
        while True:
            # Fill the free slots; end when nothing runs and nothing more can start.
            if not interrupt:
                runner.start(next_jobs(source, runner))
            if not runner.running and (interrupt or not source.pending):
                return interrupt.exit_code

            # After the first signal, the running jobs save and end.
            if interrupt and not stopping:
                stopping = True
                print_line(f"Stopping: waiting for {counted(len(runner.running), 'running job')} "
                           f"to save. Press Ctrl-C again to kill.")
                for job in runner.running:
                    job.stop()

            for job in list(runner.running):
                watch(job, source, runner, progress)
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
            # With fewer GPUs than processes, the slots go around them.
            first = slot * self.processes
            last = first + min(self.processes, len(self.gpus))
            share["CUDA_VISIBLE_DEVICES"] = ",".join((self.gpus * all_processes)[first:last])
        return os.environ | share

    def start(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.slot = min(set(range(self.max_jobs)) - {other.slot for other in self.running})
            start = Torchrun if job.processes > 1 else subprocess.Popen
            with closing(atomic.LineFile(job.open_log())) as log:
                # In a session of its own, a job does not receive Ctrl-C from our terminal.
                job.process = start(
                    job.command, env=self.environment(job.slot), start_new_session=True,
                    stdin=subprocess.PIPE, stdout=log.descriptor, stderr=log.descriptor)
            self.running.append(job)
