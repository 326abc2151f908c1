"""Show that a training which is killed again and again becomes the training that was never stopped.

  python -m scripts.verify_resume                                   the default model, a few steps
  python -m scripts.verify_resume experiment=shakespeare_cpu kills=20 training.max_steps=200

It trains once straight through and once under `kill -9` at random moments, every third of them inside a save, each time
going on with the same command. Then it compares the two runs bit by bit, prints a table, and exits with 1 if
anything differs. Each setting of train.py can be given; without them the training is made short.

  kills=20         how often
"""

from __future__ import annotations

from conf.launch import launch
from progress import ProgressBar

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.verify_resume:verify", "scripts.verify_resume:VerifySettings", __doc__)

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import atomic
from checkpointing import checkpoint, store
from conf.schema import compose
from terminal import counted

ROOT = Path(__file__).parent.parent
SHORT = ("training.max_steps=40", "training.checkpoint_every=7", "training.eval_every=10", "training.eval_tokens=8192",
         "training.sample_tokens=0")
TIMES = ("step_ms", "seconds")  # what a clock gives is not compared


@dataclass(frozen=True)
class VerifySettings:
    """How a training is stopped and compared; all other settings are the training's own."""

    kills: int = 20  # each a kill -9
    train: tuple[str, ...] = ()  # what the command line says about the training

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.kills < 0:
            yield f"kills={self.kills} must be at least 0."


def verify(settings: VerifySettings) -> int:
    """Train twice, compare, and print; 0 if nothing differs."""
    overrides = [*SHORT, *settings.train]
    max_steps = compose("config", overrides).training.max_steps
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as scratch:
        straight, killed = Path(scratch, "straight"), Path(scratch, "killed")
        print("Training straight through.", flush=True)
        finish(overrides, straight)
        print(f"Training under {counted(settings.kills, 'kill')}.", flush=True)
        inside, lost = train_under_kills(overrides, killed, settings.kills, max_steps)
        found = compare(straight, killed)
        print(f"\n{counted(settings.kills, 'kill')}, {inside} of them inside a save; "
              f"{counted(lost, 'step')} lost and taken again.\n")
        for what, difference in found.items():
            print(f"  {what:<40} {difference or 'the same'}")
        same = not any(found.values())
        print("\nThe killed run is the straight one, bit by bit." if same else "\nThe runs DIFFER.")
    return 0 if same else 1


def start(overrides: list[str], run: Path) -> subprocess.Popen[str]:
    """`python train.py` into the folder `run`, as a process of its own."""
    words = [*overrides, f"runs_dir={run.parent}", f"name={run.name}"]
    return subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(overrides: list[str], run: Path) -> None:
    """Train to the end. Raises ValueError with the last words if that fails."""
    program = start(overrides, run)
    said, _ = program.communicate()
    if program.returncode:
        raise ValueError(f"train.py ended with {program.returncode}: {said.strip().splitlines()[-1]}")


def train_under_kills(overrides: list[str], run: Path, kills: int, max_steps: int) -> tuple[int, int]:
    """Train to the end, killed on the way; return how many kills fell inside a save and how many steps were lost."""
    moments = sorted(random.randrange(max_steps) for _ in range(kills))
    inside = lost = 0
    for number, step in enumerate(ProgressBar(moments, "Kills", unit="kills", leave=False)):
        earlier, aimed = half_written(run), number % 3 == 0
        with start(overrides, run) as program:
            while program.poll() is None and steps(run) < step:
                time.sleep(0.002)
            while aimed and program.poll() is None and half_written(run) <= earlier:
                pass
            time.sleep(random.random() * (0.003 if aimed else 0.1))
            program.kill()
            program.communicate()
        inside += not half_written(run) <= earlier
        saved = store.list_checkpoints(run / "checkpoints")
        lost += steps(run) - (saved[-1].step if saved else 0)
    finish(overrides, run)
    return inside, lost


def half_written(run: Path) -> set[Path]:
    """The checkpoints that are being written, or that a kill left so."""
    return set(run.glob(f"checkpoints/{atomic.PARTIAL}step_*"))


def steps(run: Path) -> int:
    """How many steps a run's metrics have."""
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics, without those that hold samples."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "sample" not in row]


def compare(one: Path, other: Path) -> dict[str, str]:
    """What two runs' last checkpoints and metrics hold, each with its first difference, or "" where there is none."""
    a, b = (store.list_checkpoints(run / "checkpoints")[-1] for run in (one, other))
    found = {}
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        tensors, others = load_file(a.folder / name), load_file(b.folder / name)
        numbers = sum(tensor.numel() for tensor in tensors.values())
        differing = [key for key in tensors.keys() | others.keys()
                     if key not in tensors or key not in others or not torch.equal(tensors[key], others[key])]
        found[f"{name}: {numbers:,} numbers"] = f"{len(differing)} tensors differ, as {min(differing)}" if differing else ""
    for key in ("step", "batches_skipped", "nonfinite", "val_loss", "scaler"):
        found[f"state: {key}"] = "" if a.state[key] == b.state[key] else f"{a.state[key]} and {b.state[key]}"
    rows, others = ([{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run)]
                    for run in (one, other))
    differing = [f"{x} and {y}" for x, y in zip(rows, others, strict=False) if x != y]
    if len(rows) != len(others):
        differing.append(f"{counted(len(rows), 'row')} and {len(others)}")
    found[f"metrics.jsonl: {counted(len(rows), 'row')}"] = differing[0] if differing else ""
    return found
