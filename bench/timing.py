"""Shared by the benchmarks: settings, alternating timings, measurements in fresh processes, tables.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atomic
from progress import ProgressBar
from setting import FilePath, SettingsBase, setting

ROOT = Path(__file__).parent.parent
# The line of a traceback that names the exception.
FAILURE = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class BenchSettings(SettingsBase):
    """The settings that most benchmarks have."""

    rounds: int = setting(3, "how often each side is measured, in turn", ge=1)
    out: FilePath = setting("", "write the measurements as JSON")


def in_turn(sides: Iterable[Any], rounds: int,
            measure: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """What `measure` returns for each side in each round.

    Each round measures every side once, so that a disturbance of the machine affects all of them.
    """
    results: dict[Any, list[Any]] = {side: [] for side in sides}
    with ProgressBar(total=rounds * len(results), desc="Measuring", leave=False) as bar:
        for _ in range(rounds):
            for side, of_side in results.items():
                of_side.append(measure(side))
                bar.update()
    return results


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def with_seconds(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a call returns, and the seconds that it took in all."""
    start = time.perf_counter()
    return call(*arguments) | {"seconds_in_all": time.perf_counter() - start}


def alternating_medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call. The first round warms up and is not counted."""
    seconds = in_turn(calls, rounds + 1, lambda name: seconds_of(calls[name]))
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def step_seconds(step: Callable[[int], Any], least_seconds: float, warm_up: int) -> list[float]:
    """Seconds of steps, which are given their number.

    After `warm_up` steps there are at least as many again, and at least `least_seconds` of them.
    """
    seconds: list[float] = []
    while len(seconds) < 2 * warm_up or sum(seconds[warm_up:]) < least_seconds:
        seconds.append(seconds_of(step, len(seconds)))
    return seconds


def best_rate(amount: float, call: Callable[..., Any], *arguments: Any) -> float:
    """The highest of eight rates at which a call does an amount of work, in units per second."""
    return max(amount / seconds_of(call, *arguments) for _ in range(8))


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median over the runs of each of their numbers."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def median_ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> float:
    """The median over the rounds of our number divided by theirs in the same round."""
    return statistics.median(a[name] / b[name] for a, b in zip(ours, theirs, strict=True))


def run_command(command: list[str], folder: Path = ROOT, timeout: float | None = None) -> str:
    """Run a command in `folder` and return its standard output.

    Raises ValueError with the last line of its standard error if it fails, or if it takes more than
    `timeout` seconds.
    """
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{shown(command)}: not finished after {timeout:.0f} s") from error
    check_exit(command, result.returncode, result.stdout + result.stderr)
    return result.stdout


def measure_command(command: list[str], folder: Path = ROOT) -> dict[str, float]:
    """Run a command in `folder`: its seconds, and the most memory that its process held.

    Raises ValueError with the last line of its standard error if it fails.
    """
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        check_exit(command, process.returncode, errors.read())
    return {"seconds": seconds, "peak_bytes": resident_bytes(usage)}


def check_exit(command: list[str], code: int, printed: str) -> None:
    """Raise ValueError, with the last lines as a note, if the exit code of a command is not 0."""
    if code:
        lines = printed.strip().splitlines() or [f"it ended with {code} and without a message"]
        # CUDA's errors end in advice, after the line that says what has failed.
        failure = next((line for line in reversed(lines) if FAILURE.match(line)), lines[-1])
        error = ValueError(f"{shown(command)}: {failure}")
        error.add_note("\n".join(lines[-60:]))
        raise error


def shown(command: list[str]) -> str:
    """The beginning of a command, for messages."""
    return " ".join(command[1:4]).partition(";")[0][:200]


def measure_in_process(module: str, *arguments: Any, processes: int = 1,
                       timeout: float | None = None) -> dict[str, Any]:
    """The result of `measure(*arguments)` of a module, from a process of its own.

    Several processes are started by torchrun. All but the first must return None. Raises ValueError
    as `run_command` does.
    """
    program = (f"from {module} import measure; import json; result = measure(*{arguments!r}); "
               "result is None or print(json.dumps(result))")
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                  str(processes), "--no-python", sys.executable]
    printed = run_command([*start, "-c", program], timeout=timeout)
    return json.loads(printed.splitlines()[-1])


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage gives includes the process that started this one.
        peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return 1024 * int(peak[1])
    return resident_bytes(resource.getrusage(resource.RUSAGE_SELF))


def resident_bytes(usage: resource.struct_rusage) -> int:
    """The most memory of a process; its unit depends on the system."""
    return usage.ru_maxrss if sys.platform == "darwin" else 1024 * usage.ru_maxrss


def print_header(*names: str) -> None:
    print_row(*names)
    print("|---" * len(names) + "|")


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def write_json(out: str, content: Any) -> None:
    """Write the measurements to the file `out`; if it is empty, write nothing."""
    if out:
        atomic.write_bytes(Path(out), json.dumps(content, indent=2).encode())
