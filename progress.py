"""Progress: a bar on a terminal, a plain line now and then in a file, a pipe or a notebook."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from terminal import can_redraw, escaped

PLAIN_SECONDS = 10  # between two plain lines
PLAIN_SHARE = 0.02  # of the time so far: a run of a day writes hundreds of lines, not thousands
COUNTED = "{desc}{percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {elapsed} elapsed, {remaining} left{postfix}"
COUNTING = "{desc}{n_fmt}{unit}, {elapsed} elapsed{postfix}"


def print_line(text: str) -> None:
    """Print a message for people above the bar, if one is drawn. A write error is ignored."""
    with suppress(OSError):
        ProgressBar.write(escaped(text), file=sys.stdout)
        sys.stdout.flush()


class ProgressBar(tqdm):
    """Progress on stderr: tqdm's bar on a terminal, elsewhere a plain line every PLAIN_SECONDS or more.

    It takes tqdm's arguments. `plain_format` is the format of a plain line, in tqdm's fields. What takes less than
    PLAIN_SECONDS writes no plain line.
    """

    monitor_interval = 0  # No thread of tqdm's, so that a process with a bar can fork.
    expected: float | None = None  # an estimate of seconds for each unit
    ends = math.inf  # seconds after which the work ends, done or not

    def __init__(self, iterable: Iterable[Any] | None = None, desc: str | None = None, plain_format: str = "",
                 **settings: Any) -> None:
        self.plain, self.plain_format = not can_redraw(sys.stderr), plain_format
        if self.plain:
            settings |= {"mininterval": PLAIN_SECONDS, "delay": PLAIN_SECONDS}
        super().__init__(iterable, desc, file=sys.stderr, dynamic_ncols=True, miniters=0, **settings)

    def expect(self, seconds: float, limited: bool = False) -> None:
        """Begin now with an estimate of the time left. It counts as much as the first tenth of the work.

        `limited`: the work ends after `seconds`, done or not.
        """
        left = self.total - self.n
        if left > 0:
            self.initial, self.start_t = self.n, self._time()
            self.expected, self.ends = (None, seconds) if limited else (seconds / left, math.inf)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The state that is shown; with an estimate the rate is the mean of it and of what was measured."""
        state = super().format_dict
        if self.expected and not self.disable:
            weight = 0.1 * (self.total - self.initial)
            done = max(0, self.n - self.initial)
            seconds = (weight * self.expected + state["elapsed"]) / (weight + done)
            # Elapsed time without a finished unit is part of the next one.
            if done:
                state["rate"] = 1 / seconds
            else:
                state["rate"] = 1 / self.expected
        if math.isfinite(self.ends) and self.total > self.n:
            measured = max(0, self.n - self.initial) / max(state["elapsed"], 1e-9)
            state["rate"] = max(measured, (self.total - self.n) / max(self.ends - state["elapsed"], 1e-9))
        return state

    def plain_line(self) -> str:
        """The state in words."""
        state = self.format_dict
        desc, unit = state["prefix"], state["unit"]
        if not self.plain_format:
            desc = f"{desc}: " if desc else ""
        state |= {"ncols": None, "prefix": desc, "unit": unit if unit == "B" else f" {unit}",
                  "bar_format": self.plain_format or (COUNTED if self.total else COUNTING)}
        return self.format_meter(**state)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or write a plain line; called by tqdm when it is time."""
        with suppress(OSError):  # Work goes on when its progress cannot be shown.
            if not self.plain:
                return super().display(msg, pos)
            if msg is None:
                self.fp.write(escaped(self.plain_line(), keep="") + "\n")
                self.fp.flush()
                self.mininterval = max(PLAIN_SECONDS, PLAIN_SHARE * self.format_dict["elapsed"])
        return False

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> bool | None:
        """Display it again; a plain line that other output followed stays where it is."""
        if self.plain and nolock:  # by write(), which drew over a bar
            return False
        return super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """Make room for other output."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Draw or write the last state, if there was one before and it is to stay."""
        if self.plain and not self.disable:
            shown = self.last_print_t >= self.start_t + self.delay
            if self.leave and shown and self.n > self.last_print_n:
                self.display()
            self.leave = False  # tqdm would end its line, which has ended
        with suppress(OSError):
            super().close()
