"""From the start of the process to the end of the first step, beside nanoGPT.

  python -m bench.bench start peer=../nanoGPT

nanoGPT's is its recipe for CPUs, which evaluates first: that is kept as short as it goes (eval_iters=1). Ours are the same
recipe and the default run, their data prepared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import atomic
from bench.result import RECIPE, ROOT, prepared_text
from conf.schema import FilePath


@dataclass(frozen=True)
class StartSettings:
    """How often both are started."""

    peer: FilePath = ""  # a nanoGPT checkout, its data/shakespeare_char prepared
    rounds: int = 5
    out: FilePath = ""

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        yield from prepared_text(self.peer)
        if self.rounds < 1:
            yield f"rounds={self.rounds} must be at least 1."


def to_first_step(settings: StartSettings) -> int:
    """Start both in turn, `rounds` times and once before."""
    with tempfile.TemporaryDirectory() as folder:
        ours = ["train.py", "name=new", "training.eval_every=1", "training.eval_tokens=1"]
        text = f"data.path={Path(settings.peer).resolve() / 'data/shakespeare_char/input.txt'}"
        sides = {"nanoGPT": (["train.py", "config/train_shakespeare_char.py", *RECIPE, "--eval_iters=1",
                              f"--out_dir={folder}/peer"], Path(settings.peer), "iter 0:"),
                 "the same recipe": ([*ours, "experiment=shakespeare_cpu", text], ROOT, "Step 1:"),
                 "the default run": (ours, ROOT, "Step 1:")}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(settings.rounds + 1):
            for side, (words, where, sign) in sides.items():
                fresh = [f"runs_dir={folder}/{side}-{number}"] * (where == ROOT)
                took = seconds_until(sign, [sys.executable, *words, *fresh], where)
                seconds[side] += [took] if number else []  # the first time prepares the data
    print("| side | seconds to the end of the first step | x |\n|---|---|---|")
    for side, times in seconds.items():
        middle = statistics.median(times)
        print(f"| {side} | {middle:.2f} | {middle / statistics.median(seconds['nanoGPT']):.2f} |")
    if settings.out:
        atomic.write_bytes(Path(settings.out), json.dumps(seconds, indent=2).encode())
    return 0


def seconds_until(sign: str, command: list[str], folder: Path) -> float:
    """Until the command prints a line that begins with `sign`. Raises ValueError if it ends before."""
    begun = time.perf_counter()
    with subprocess.Popen([*command[:1], "-u", *command[1:]], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        for line in process.stdout:
            if line.startswith(sign):
                took = time.perf_counter() - begun
                process.kill()
                return took
    raise ValueError(f"{' '.join(command)[:200]} ended before its first step.")
