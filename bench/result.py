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

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import peer as nanogpt
from bench.timing import in_turn, medians, print_header, run_command, with_seconds, write_json
from progress import print_line
from report.history import open_history
from setting import setting
from training.device import Device

EXPERIMENTS = {"cpu": ("speedrun_shakespeare", "modern_shakespeare"), "cuda": ("shakespeare_gpu",)}


@dataclass(frozen=True)
class ResultSettings(nanogpt.ShakespeareSettings):
    """Settings of the benchmark of complete runs."""

    device: Literal["cpu", "cuda"] = setting("cpu", "to train on")
    seed: int = setting(1337, "of the first round; each round adds 1", ge=0)


def main(settings: ResultSettings) -> int:
    sides = ("nanoGPT", *EXPERIMENTS[settings.device])
    seeds = dict.fromkeys(sides, settings.seed)

    def measure(side: str) -> dict[str, Any]:
        run = with_seconds(train_side, side, settings, seeds[side])
        number = seeds[side] - settings.seed + 1
        print_line(f"| {number} | {side} | {run['parameters']:,} | {run['seconds']:.1f} "
                   f"| {run['seconds_in_all']:.1f} | {run['val_loss']:.4f} |")
        seeds[side] += 1
        return run

    print(f"torch {torch.__version__}, {Device(settings.device).describe()}\n")
    print_header("round", "side", "parameters", "seconds of training", "seconds in all",
                 "validation loss")
    runs = in_turn(sides, settings.rounds, measure)

    of_sides = {side: medians(each) for side, each in runs.items()}
    for side, median in of_sides.items():
        seconds, ratio = median["seconds"], of_sides["nanoGPT"]["seconds"] / median["seconds"]
        comparison = "" if side == "nanoGPT" else f": nanoGPT trains {ratio:.1f} times as long"
        print(f"{side}: medians {seconds:.1f} s, validation loss {median['val_loss']:.4f}"
              f"{comparison}")
    write_json(settings.out, {"runs": runs, "medians": of_sides})
    return 0


def train_side(side: str, settings: ResultSettings, seed: int) -> dict[str, Any]:
    """Train nanoGPT, or one of our experiments, from a seed."""
    if side == "nanoGPT":
        return nanogpt.train(Path(settings.peer), seed, settings.device)
    text = nanogpt.shakespeare_override(settings.peer)
    with tempfile.TemporaryDirectory() as folder:
        return train_in(Path(folder, "run"), f"experiment={side}", text,
                        f"training.device={settings.device}", f"seed={seed}")


def train_in(run: Path, *overrides: str) -> dict[str, Any]:
    """Run train.py: seconds of training, final validation loss and number of parameters."""
    fixed = [f"runs_dir={run.parent}", f"name={run.name}", "training.sample_tokens=0"]
    run_command([sys.executable, "train.py", *fixed, *overrides])
    found = open_history(run, run.name)
    [parameters] = re.findall(r"Model: ([\d,]+) parameters", (run / "log.txt").read_text())
    return {"seconds": found.reached[2], "val_loss": found.last_loss,
            "parameters": int(parameters.replace(",", ""))}
