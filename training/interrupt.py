"""Stop signals: after the first, a run finishes its micro-step and saves; a second ends it.

Knows nothing of training.
"""

from __future__ import annotations

import builtins
import signal
import sys
import threading
from types import FrameType

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Schedulers send these before SIGTERM or SIGKILL. The kernel repeats SIGXCPU every second.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
ALWAYS_HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context that records the first stop signal; in the main thread only.

    The second of REQUESTS goes to the earlier handler if `second_ends`; WARNINGS never do. Ignored
    signals stay ignored, such as SIGHUP under nohup, except SIGINT and SIGTERM.
    `exit_code` is 128 plus the number of the signal, or 0 without one.
    """

    def __init__(self, second_ends: bool = True) -> None:
        self.exit_code = 0
        self.second_ends = second_ends
        self.before: dict[signal.Signals, object] = {}

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def __enter__(self) -> Interrupt:
        # Python allows signal handlers in the main thread only.
        if not in_main_thread():
            return self
        for number in (*REQUESTS, *WARNINGS):
            if number in ALWAYS_HANDLED or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *failure: object) -> None:
        self._restore(*self.before)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = self.exit_code or 128 + number
        if number in REQUESTS and self.second_ends:
            self._restore(*REQUESTS)

    def _restore(self, *which: signal.Signals) -> None:
        for number in which:
            if number in self.before:
                # None stands for a handler that was set in C, which Python cannot restore.
                handler = self.before[number]
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def embedded() -> bool:
    """Whether this runs in a notebook, an interactive session, or a thread."""
    return hasattr(builtins, "__IPYTHON__") or hasattr(sys, "ps1") or not in_main_thread()
