"""Training to a result beside nanoGPT: the time and the validation loss of complete runs.

  python -m bench result peer=../nanoGPT
  python -m bench result peer=../nanoGPT device=cuda rounds=1

nanoGPT trains its Shakespeare recipe for CPUs with its own train.py. Our side trains
`experiment=speedrun_shakespeare` and `experiment=modern_shakespeare` on the same text. On a GPU,
nanoGPT trains its recipe for GPUs, and our side `experiment=shakespeare_gpu`. The loss is that of
the whole validation split, in windows that do not overlap. Seconds of training leave out evaluation
and the start of the process. Three rounds take about ten minutes on a CPU.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import peer as nanogpt
from bench.timing import print_header, run_command, write_json
from progress import ProgressBar, print_line
from setting import FilePath, SettingsBase, setting
from training.device import Device

EXPERIMENTS = {"cpu": ("speedrun_shakespeare", "modern_shakespeare"), "cuda": ("shakespeare_gpu",)}


@dataclass(frozen=True)
class ResultSettings(SettingsBase):
    """Settings of the benchmark of complete runs."""

    peer: FilePath = setting("", "a nanoGPT checkout, its data/shakespeare_char prepared")
    device: Literal["cpu", "cuda"] = setting("cpu", "to train on")
    rounds: int = setting(3, "runs of each side", ge=1)
    seed: int = setting(1337, "of the first round; each round adds 1", ge=0)
    out: FilePath = setting("", "write the measurements as JSON")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from nanogpt.shakespeare_problems(self.peer)
        yield from super().problems()


def main(settings: ResultSettings) -> int:
    sides = ("nanoGPT", *EXPERIMENTS[settings.device])
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    print(f"torch {torch.__version__}, {Device(settings.device).describe()}\n")
    print_header("round", "side", "parameters", "seconds of training", "seconds in all",
                 "validation loss")
    total = settings.rounds * len(runs)
    with ProgressBar(desc="Training", total=total, unit="runs", leave=False) as bar:
        for number in range(settings.rounds):
            for side in runs:
                run = train_side(side, settings, settings.seed + number)
                runs[side].append(run)
                print_line(f"| {number + 1} | {side} | {run['parameters']:,} "
                           f"| {run['seconds']:.1f} | {run['seconds_in_all']:.1f} "
                           f"| {run['val_loss']:.4f} |")
                bar.update()

    medians: dict[str, dict[str, float]] = {}
    for side, of_side in runs.items():
        seconds = statistics.median(run["seconds"] for run in of_side)
        val_loss = statistics.median(run["val_loss"] for run in of_side)
        medians[side] = {"seconds": seconds, "val_loss": val_loss}
        line = f"{side}: medians {seconds:.1f} s, validation loss {val_loss:.4f}"
        if side != "nanoGPT":
            ratio = medians["nanoGPT"]["seconds"] / seconds
            line += f": nanoGPT trains {ratio:.1f} times as long"
        print(line)
    write_json(settings.out, {"runs": runs, "medians": medians})
    return 0


def train_side(side: str, settings: ResultSettings, seed: int) -> dict[str, Any]:
    """Train nanoGPT, or one of our experiments, from a seed."""
    start = time.perf_counter()
    if side == "nanoGPT":
        run = nanogpt.train(Path(settings.peer), seed, settings.device)
    else:
        text = nanogpt.shakespeare_override(settings.peer)
        device = f"training.device={settings.device}"
        run = train_ours(f"experiment={side}", text, device, f"seed={seed}")
    return run | {"seconds_in_all": time.perf_counter() - start}


def train_ours(*overrides: str) -> dict[str, Any]:
    """Run train.py: seconds of training, final validation loss and number of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        return train_in(Path(folder, "run"), *overrides)


def train_in(run: Path, *overrides: str) -> dict[str, Any]:
    """The same, in the folder of a run that stays."""
    fixed = [f"runs_dir={run.parent}", f"name={run.name}", "training.sample_tokens=0"]
    run_command([sys.executable, "train.py", *fixed, *overrides])
    last: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    log = (run / "log.txt").read_text()
    parameters = re.search(r"Model: ([\d,]+) parameters", log)[1].replace(",", "")
    return {
        "seconds": last["seconds"],
        "val_loss": last["val_loss"],
        "parameters": int(parameters),
    }
