"""How a run is asked to stop: the first Ctrl-C or SIGTERM lets it finish its step and save, the second does not wait."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """Notes SIGINT and SIGTERM while the context lasts; `exit_code` is 128 plus the signal, or 0 without one."""

    def __init__(self) -> None:
        self.exit_code = 0

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *failure: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
