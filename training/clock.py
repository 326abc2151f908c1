"""Training time: seconds while the process runs, without those while it is stopped. Knows nothing of steps."""

from __future__ import annotations

import threading
import time

TICK = 0.2  # seconds
LONGEST_GAP = 1.0  # seconds between two ticks of a process that runs, on a busy machine too
IDLE = 0.1  # of a gap: a process that used less CPU time was stopped, and not only waiting for a thread


class Clock:
    """Counts seconds while the process runs. Use as a context manager.

    A thread ticks. It misses ticks only while the whole process is stopped, as by SIGSTOP, a debugger, a frozen
    container or a paused virtual machine: while training computes, or waits for a GPU or a disk, it ticks. A gap
    without CPU time counts as one tick.
    """

    def __init__(self) -> None:
        self.stopped = 0.0
        self.last_tick, self.last_cpu = time.perf_counter(), time.process_time()
        self.turn = threading.Lock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._tick, name="clock", daemon=True)

    def seconds(self) -> float:
        """Since an arbitrary moment, as of `time.perf_counter`."""
        with self.turn:
            now, cpu = time.perf_counter(), time.process_time()
            gap, used = now - self.last_tick, cpu - self.last_cpu
            if gap > LONGEST_GAP and used < IDLE * gap:
                self.stopped += gap - TICK
            self.last_tick, self.last_cpu = now, cpu
            return now - self.stopped

    def _tick(self) -> None:
        while not self.ended.wait(TICK):
            self.seconds()

    def __enter__(self) -> Clock:
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.ended.set()
        self.thread.join()
