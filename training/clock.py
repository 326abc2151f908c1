"""Training time: the seconds during which the process was not stopped. Knows no steps."""

from __future__ import annotations

import threading
import time

TICK = 0.2  # seconds
# The longest time between two ticks of a running process, even on a busy machine.
LONGEST_GAP = 1.0  # seconds
# A process that used a smaller fraction of a longer gap was stopped.
LEAST_CPU_TIME = 0.1


class Clock:
    """Counts seconds except while the process is stopped. Use as a context manager.

    A thread ticks while training computes or waits for a GPU or a disk, but not while SIGSTOP, a
    debugger, a frozen container or a paused virtual machine stops the whole process. A gap without
    CPU time counts as one tick.
    """

    def __init__(self) -> None:
        self.stopped = 0.0
        self.last_tick, self.last_cpu = time.perf_counter(), time.process_time()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._tick, name="clock", daemon=True)

    def seconds(self) -> float:
        """The seconds since an arbitrary point in time, as in `time.perf_counter`."""
        with self.lock:
            now, cpu = time.perf_counter(), time.process_time()
            gap, used = now - self.last_tick, cpu - self.last_cpu
            if gap > LONGEST_GAP and used < LEAST_CPU_TIME * gap:
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
