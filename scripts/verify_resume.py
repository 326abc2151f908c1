"""Prove that a killed and resumed run is bit-identical to a run that was never stopped.

  python -m scripts.verify_resume                                  # the default model, a few steps
  python -m scripts.verify_resume experiment=shakespeare_cpu kills=20 training.max_steps=200
  python -m scripts.verify_resume processes=4 training.batch_size=8 training.tokens_per_step=4096

Trains once without a stop, and once under `kill -9` at random moments, every third of them during
a save. With processes=4, each start has another number of processes, in turn 1, 2 and 4, and the
first or the second of them is killed. Then compares weights, optimizer state and metrics, prints a
table, and exits with 1 if anything differs. Takes the settings of train.py; without any, the
training is short.
"""

from dataclasses import dataclass

from conf.launch import launch
from progress import ProgressBar
from setting import ScriptSettings, setting


@dataclass(frozen=True)
class VerifySettings(ScriptSettings):
    """The settings of the proof; all others are those of train.py."""

    kills: int = setting(20, "how often to kill the training", ge=0)
    processes: int = setting(1, "train with 1, 2, 4, ... processes, up to this number", ge=1)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.verify_resume:verify", VerifySettings, __doc__)

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import atomic
from checkpointing import store
from checkpointing.checkpoint import Checkpoint
from checkpointing.spec import MODEL, OPTIMIZER
from conf.schema import compose
from report.metrics import read_rows
from sweep.jobs import python
from terminal import counted

ROOT = Path(__file__).parent.parent
SHORT = ("training.max_steps=40", "training.checkpoint_every=7", "training.eval_every=10",
         "training.eval_tokens=8192", "training.sample_tokens=0")
TIMINGS = ("step_ms", "seconds")
COMPARED_STATE = ("step", "batches_skipped", "nonfinite", "val_loss", "scaler")


def verify(settings: VerifySettings) -> int:
    """Train twice, compare, and print; return 0 if nothing differs."""
    # The settings of both trainings.
    overrides = [*SHORT, *settings.train]
    if settings.processes > 1:
        # Each process would have a part of the CPUs, and another number of threads has other bits.
        overrides.insert(0, "training.threads=1")
    max_steps = compose("config", overrides).training.max_steps
    kills = counted(settings.kills, "kill")

    # Train twice, and compare.
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as scratch:
        straight, killed = Path(scratch, "straight"), Path(scratch, "killed")
        print("Training without a stop.", flush=True)
        finish(overrides, straight)
        print(f"Training under {kills}.", flush=True)
        in_saves, lost = train_under_kills(overrides, killed, settings.kills, max_steps,
                                           settings.processes)
        differences = compare(straight, killed)

    # Print the result.
    print(f"\n{kills}, {in_saves} of them during a save; "
          f"{counted(lost, 'step')} lost and trained again.\n")
    for part, difference in differences.items():
        print(f"  {part:<40} {difference or 'identical'}")
    differs = any(differences.values())
    print("\nThe runs DIFFER." if differs else "\nThe runs are bit-identical.")
    return int(differs)


def start(overrides: list[str], run: Path, processes: int = 1) -> subprocess.Popen[str]:
    """Start train.py in the run folder `run`, with several processes by torchrun."""
    command = [*python(processes), "train.py", *overrides, f"runs_dir={run.parent}",
               f"name={run.name}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def finish(overrides: list[str], run: Path) -> None:
    """Train to the end. Raises ValueError with the last line of the output if that fails."""
    process = start(overrides, run)
    printed, _ = process.communicate()
    if process.returncode:
        last_line = printed.strip().splitlines()[-1]
        raise ValueError(f"train.py exited with {process.returncode}: {last_line}")


def train_under_kills(overrides: list[str], run: Path, kills: int, max_steps: int,
                      most_processes: int = 1) -> tuple[int, int]:
    """Train to the end under kills; return the number of kills during a save, and of lost steps."""
    # The numbers of processes, in turn, and the steps to kill them at.
    sizes = [2**power for power in range(most_processes.bit_length())]
    moments = sorted(random.randrange(max_steps) for _ in range(kills))
    in_saves = lost = 0
    for number, step in enumerate(ProgressBar(moments, "Kills", unit="kills", leave=False)):
        # Start the training, and wait for its step, or for a save after it.
        earlier = partial_checkpoints(run)
        during_save = number % 3 == 0
        size = sizes[number % len(sizes)]
        with start(overrides, run, size) as process:
            while process.poll() is None and last_recorded_step(run) < step:
                time.sleep(0.002)
            while during_save and process.poll() is None and partial_checkpoints(run) <= earlier:
                pass
            # Kill it a moment later: within the save, or within a step.
            time.sleep(random.random() * (0.003 if during_save else 0.1))
            kill(process, size)
            process.communicate()

        # Count a kill during a save, and the steps since the last checkpoint.
        in_saves += not partial_checkpoints(run) <= earlier
        saved = store.list_checkpoints(run / "checkpoints")
        lost += last_recorded_step(run) - (saved[-1].step if saved else 0)
    finish(overrides, run)
    return in_saves, lost


def kill(process: subprocess.Popen[str], processes: int) -> None:
    """Kill a training; of several processes, the first or the second, after which all end."""
    if processes == 1:
        process.kill()
        return
    # torchrun starts them in the order of their ranks.
    ranks: list[str] = []
    while process.poll() is None and len(ranks) < 2:
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                               text=True).stdout.split()
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(int(random.choice(ranks[:2])), signal.SIGKILL)


def partial_checkpoints(run: Path) -> set[Path]:
    """The checkpoints that are being written, or were when a process was killed."""
    return set(run.glob(f"checkpoints/{atomic.PARTIAL}step_*"))


def last_recorded_step(run: Path) -> int:
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics that can be read, except for samples."""
    return [row for row in read_rows(run / "metrics.jsonl") if "sample" not in row]


def compare(one: Path, other: Path) -> dict[str, str]:
    """The parts of two runs, each with its first difference, or "" if it is identical."""
    saved, other_saved = (store.list_checkpoints(run / "checkpoints")[-1] for run in (one, other))
    found = {}
    # Weights and optimizer state, bit by bit.
    for name in (MODEL, OPTIMIZER):
        tensors, others = all_tensors(saved, name), all_tensors(other_saved, name)
        equal = {key for key in tensors.keys() & others.keys()
                 if torch.equal(tensors[key], others[key])}
        differing = (tensors.keys() | others.keys()) - equal
        part = f"{name}: {sum(tensor.numel() for tensor in tensors.values()):,} numbers"
        found[part] = ""
        if differing:
            found[part] = f"{counted(len(differing), 'difference')}, such as {min(differing)}"

    # The rest of the last checkpoint, and the metrics.
    for key in COMPARED_STATE:
        value, other_value = saved.state[key], other_saved.state[key]
        found[f"state: {key}"] = "" if value == other_value else f"{value} and {other_value}"
    rows, other_rows = read_metrics(one), read_metrics(other)
    found[f"metrics.jsonl: {counted(len(rows), 'row')}"] = compare_rows(rows, other_rows)
    return found


def all_tensors(saved: Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's model or optimizer, also of one that is in several files."""
    tensors: dict[str, Tensor] = {}
    for file in saved.files(name):
        tensors |= load_file(saved.folder / file)
    return tensors


def compare_rows(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The first difference of two lists of metrics, timings left out; empty without one."""
    for row, other in zip(rows, others, strict=False):
        for key in row.keys() | other.keys():
            if key not in TIMINGS and row.get(key) != other.get(key):
                return f"{row} and {other}"
    if len(rows) != len(others):
        return f"{counted(len(rows), 'row')} and {len(others)}"
    return ""
