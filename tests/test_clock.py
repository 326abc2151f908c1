"""Training time, by clocks that the tests set and by a process that is really stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import clock
from training.clock import LONGEST_GAP, TICK, Clock

ROOT = Path(__file__).parent.parent


class Times:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.wall, self.cpu = 100.0, 5.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu


@pytest.fixture
def times(monkeypatch):
    monkeypatch.setattr(clock, "time", times := Times())
    return times


@pytest.mark.parametrize("gap, cpu, counted", [
    pytest.param(30.0, 0.0, TICK, id="stopped"),
    pytest.param(30.0, 0.5, TICK, id="stopped within a step"),
    pytest.param(1e6, 1.0, TICK, id="stopped for days"),
    pytest.param(30.0, 29.0, 30.0, id="computing, and no thread got its turn"),
    pytest.param(30.0, 58.0, 30.0, id="computing with two threads"),
    pytest.param(LONGEST_GAP, 0.0, LONGEST_GAP, id="a busy machine"),
    pytest.param(0.0, 0.0, 0.0, id="no time at all")])
def test_a_gap_counts_unless_the_process_was_stopped(times, gap, cpu, counted):
    one = Clock()
    before = one.seconds()
    times.wall, times.cpu = times.wall + gap, times.cpu + cpu
    assert one.seconds() - before == pytest.approx(counted)


def test_waiting_counts_in_full_while_the_thread_ticks(times):
    """As for a GPU: without CPU time, and with ticks."""
    one = Clock()
    before = one.seconds()
    for _ in range(100):
        times.wall += TICK
        one.seconds()
    assert one.seconds() - before == pytest.approx(100 * TICK)


def test_a_process_that_sleeps_was_not_stopped():
    with Clock() as one:
        before = one.seconds()
        time.sleep(LONGEST_GAP + 0.3)
        assert one.seconds() - before >= LONGEST_GAP + 0.3


@pytest.mark.slow
def test_time_while_stopped_by_sigstop_does_not_count():
    program = ("import time\nfrom training.clock import Clock\nwith Clock() as one:\n"
               "  start, until = one.seconds(), time.time() + 3.5\n  print('started', flush=True)\n"
               "  while time.time() < until: pass\n"
               "  print(one.seconds() - start)")
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "started\n"
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(child.pid, signal.SIGCONT)
    assert float(child.communicate()[0]) < 2
