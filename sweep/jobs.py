"""A job: one training of a sweep, in a child process and a folder of its own.

A child whose parent ends, even by `kill -9`, notices that its standard input was closed: it saves
and stops, as after SIGTERM. Knows nothing of where jobs come from: grid.py and search.py do.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import locks
from checkpointing.run_folder import LOCK, describe_process, first_run
from report.metrics import Rows, read_new_rows
from training.interrupt import REQUESTS, WARNINGS

TRAIN = Path(__file__).parent.parent / "train.py"
# Exit codes of a job that saved after a signal, or was killed by one.
INTERRUPTED = {128 + number for number in (*REQUESTS, *WARNINGS)}
INTERRUPTED |= {-number for number in (*REQUESTS, *WARNINGS, signal.SIGKILL)}


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
    new_rows: Rows = field(default_factory=list)

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
        return locks.is_locked(self.folder / LOCK)

    def open_log(self) -> Path:
        """Note the start of an attempt; return the log that its output is appended to."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self.log_start, self.started_at = self.log.stat().st_size, time.monotonic()
        return self.log

    def update(self) -> None:
        """Read the metrics that were written since the last call, into `new_rows`."""
        self.new_rows = []
        with suppress(OSError):
            metrics = self.folder / "metrics.jsonl"
            self.new_rows, _, self.metrics_read = read_new_rows(metrics, self.metrics_read)
        for row in self.new_rows:
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
            name = signal.Signals(-code).name
            return f"killed by {name}; run the same command again to resume it"
        # The lines that this attempt wrote; a progress bar separates its states by \r.
        output = self.log.read_bytes()[self.log_start :] if self.log.exists() else b""
        text = output.decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]

        errors = [line for line in lines if line.startswith(("Error: ", "Interrupted: "))]
        if self.processes > 1 and not errors:
            # The last lines are torchrun's table.
            return (f"one of its {self.processes} processes ended without a message, perhaps "
                    f"killed; run the same command again to resume it.")
        return (errors or lines or [f"exit code {code}"])[-1].removeprefix("Error: ")


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
