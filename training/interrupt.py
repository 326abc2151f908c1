"""How a run is asked to stop: the first signal lets it finish its micro-step and save, the second does not wait."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """Notes SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone; not under nohup) while the context lasts.

    `exit_code` is 128 plus the signal, or 0 without one.
    """

    def __init__(self) -> None:
        self.exit_code = 0

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def __enter__(self) -> Interrupt:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *failure: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
