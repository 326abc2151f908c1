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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import peer as nanogpt
from bench.timing import ROOT, print_header, print_row, write_json
from setting import FilePath, SettingsBase, setting

OURS = ["train.py", "name=new", "training.eval_every=1", "training.eval_tokens=1"]


@dataclass(frozen=True)
class StartSettings(SettingsBase):
    """Settings of the benchmark of start-up."""

    peer: FilePath = setting("", "a nanoGPT checkout, its data/shakespeare_char prepared")
    rounds: int = setting(5, "starts of each side", ge=1)
    out: FilePath = setting("", "write the measurements as JSON")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from nanogpt.shakespeare_problems(self.peer)
        yield from super().problems()


def main(settings: StartSettings) -> int:
    same_recipe = [*OURS, "experiment=shakespeare_cpu", nanogpt.shakespeare_override(settings.peer)]
    theirs = ["train.py", *nanogpt.RECIPE, "--eval_iters=1"]
    seconds: dict[str, list[float]] = {"nanoGPT": [], "the same recipe": [], "the default run": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(settings.rounds + 1):
            runs_dir = f"runs_dir={folder}/{number}"
            out_dir = f"--out_dir={folder}/peer"
            times = [
                seconds_until("iter 0:", [*theirs, out_dir], Path(settings.peer)),
                seconds_until("Step 1:", [*same_recipe, f"{runs_dir}-same"], ROOT),
                seconds_until("Step 1:", [*OURS, f"{runs_dir}-default"], ROOT),
            ]
            # The first round may prepare the data, and is not counted.
            if number > 0:
                for side, time_taken in zip(seconds, times, strict=True):
                    seconds[side].append(time_taken)

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
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith(prefix):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise ValueError(f"{' '.join(command)[:200]} ended before its first step.")
