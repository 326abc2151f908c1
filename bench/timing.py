"""Shared by the benchmarks: alternating timings, measurements in fresh processes, tables, JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atomic

ROOT = Path(__file__).parent.parent


def alternating_medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call.

    Each round makes every call once, so that a disturbance of the machine affects all of them.
    The first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def run_command(command: list[str], folder: Path = ROOT) -> str:
    """Run a command in `folder` and return its standard output.

    Raises ValueError with the last line of its standard error if it fails.
    """
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        errors = result.stderr.strip().splitlines() or ["it failed without a message"]
        raise ValueError(f"{' '.join(command[1:4])[:200]}: {errors[-1]}")
    return result.stdout


def measure_in_process(module: str, *arguments: Any) -> dict[str, Any]:
    """The result of `measure(*arguments)` of a module, from a process of its own."""
    result = f"json.dumps(measure(*{arguments!r}))"
    program = f"import json; from {module} import measure; print({result})"
    return json.loads(run_command([sys.executable, "-c", program]).splitlines()[-1])


def print_header(*names: str) -> None:
    print_row(*names)
    print("|---" * len(names) + "|")


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def write_json(out: str, content: Any) -> None:
    """Write the measurements to the file `out`; if it is empty, write nothing."""
    if out:
        atomic.write_bytes(Path(out), json.dumps(content, indent=2).encode())
