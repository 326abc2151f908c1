"""Start-up beside nanoGPT: seconds from the start of the process to the end of the first step.

  python -m bench start peer=../nanoGPT

nanoGPT's side is its Shakespeare recipe for CPUs, which evaluates before the first step: as little
as it can (eval_iters=1). Our sides are the same recipe and the default run, with prepared data.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import peer as nanogpt
from bench.timing import ROOT, in_turn, print_header, print_row, write_json
from setting import setting

OURS = ["name=new", "training.eval_every=1", "training.eval_tokens=1"]


@dataclass(frozen=True)
class StartSettings(nanogpt.ShakespeareSettings):
    """Settings of the benchmark of start-up."""

    rounds: int = setting(5, "starts of each side", ge=1)


def main(settings: StartSettings) -> int:
    text = nanogpt.shakespeare_override(settings.peer)
    recipes = {
        "nanoGPT": [*nanogpt.RECIPE, "--eval_iters=1"],
        "the same recipe": [*OURS, "experiment=shakespeare_cpu", text],
        "the default run": OURS,
    }

    def measure(side: str) -> float:
        new = tempfile.mkdtemp(dir=folder)
        words = ["train.py", *recipes[side]]
        if side == "nanoGPT":
            return seconds_until("iter 0:", [*words, f"--out_dir={new}"], Path(settings.peer))
        return seconds_until("Step 1:", [*words, f"runs_dir={new}"], ROOT)

    with tempfile.TemporaryDirectory() as folder:
        runs = in_turn(recipes, settings.rounds + 1, measure)
    # The first round may prepare the data, and is not counted.
    seconds = {side: of_side[1:] for side, of_side in runs.items()}
    print_header("side", "seconds to the end of the first step", "x")
    reference = statistics.median(seconds["nanoGPT"])
    for side, times in seconds.items():
        median = statistics.median(times)
        print_row(side, f"{median:.2f}", f"{median / reference:.2f}")
    write_json(settings.out, seconds)
    return 0


def seconds_until(prefix: str, arguments: list[str], folder: Path) -> float:
    """Seconds until Python with these arguments prints a line that starts with `prefix`.

    Raises ValueError if the process ends before.
    """
    start = time.perf_counter()
    command = [sys.executable, "-u", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        for line in process.stdout:
            if line.startswith(prefix):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise ValueError(f"{' '.join(command)[:200]} ended before its first step.")
