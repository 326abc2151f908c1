"""Progress: a bar on a terminal, a plain line now and then in a file, a pipe or a notebook."""

import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from tqdm import tqdm

from terminal import can_redraw, escaped

# The shortest time between two plain lines.
PLAIN_SECONDS = 10
# The time between them as a fraction of the elapsed time: a run of a day writes hundreds of lines.
PLAIN_FRACTION = 0.02
WITH_TOTAL = ("{desc}{percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {elapsed} elapsed, "
              "{remaining} left{postfix}")
WITHOUT_TOTAL = "{desc}{n_fmt}{unit}, {elapsed} elapsed{postfix}"


def print_line(text: str) -> None:
    """Print a message for people above the bar, if there is one. A write error is ignored."""
    if sys.stdout is None:
        return
    with suppress(OSError):
        ProgressBar.write(escaped(text), file=sys.stdout)
        sys.stdout.flush()


class ProgressBar(tqdm):
    """Progress on stderr: tqdm's bar on a terminal, elsewhere a plain line now and then.

    Takes tqdm's arguments. `plain_format` is the format of a plain line, with tqdm's fields. Work
    that takes less than PLAIN_SECONDS writes no plain line.
    """

    # No monitor thread: a process with a bar can fork.
    monitor_interval = 0
    # An estimate of the seconds per unit.
    expected: float | None = None
    # The time in seconds at which the work ends even if it is not complete.
    time_limit = math.inf

    def __init__(self, iterable: Iterable[Any] | None = None, desc: str | None = None,
                 plain_format: str = "", **settings: Any) -> None:
        self.plain, self.plain_format = not can_redraw(sys.stderr), plain_format
        if self.plain:
            settings |= {"mininterval": PLAIN_SECONDS, "delay": PLAIN_SECONDS}
        settings |= {"file": sys.stderr, "dynamic_ncols": True, "miniters": 0}
        super().__init__(iterable, desc, **settings)
        # tqdm uses the time of day, which can be set back or forward.
        self._time = monotonic
        self.last_print_t = self.start_t = monotonic()

    def expect(self, seconds: float, limited: bool = False) -> None:
        """Start now with an estimate of the time left, with the weight of a tenth of the work.

        `limited`: the work ends after `seconds`, complete or not.
        """
        left = self.total - self.n
        if left <= 0:
            return
        self.start_here()
        if limited:
            self.expected, self.time_limit = None, seconds
        else:
            self.expected, self.time_limit = seconds / left, math.inf

    def start_here(self) -> None:
        """Leave out what is done so far in the estimate of the time left."""
        self.initial, self.start_t = self.n, self._time()

    @property
    def format_dict(self) -> dict[str, Any]:
        """The displayed state; its rate combines the estimate and the measured time."""
        state = super().format_dict
        # As if a tenth of the work had been done at the expected pace.
        done, elapsed = max(0, self.n - self.initial), state["elapsed"]
        if self.expected and not self.disable:
            state["rate"] = 1 / self.expected
            # Before the first unit is done, the elapsed time says nothing.
            if done:
                weight = 0.1 * (self.total - self.initial)
                state["rate"] = (weight + done) / (weight * self.expected + elapsed)
        # The bar then shows the time until the limit, unless the work is complete before.
        if self.time_limit < math.inf and self.total > self.n:
            measured = done / max(elapsed, 1e-9)
            needed = (self.total - self.n) / max(self.time_limit - elapsed, 1e-9)
            state["rate"] = max(measured, needed)
        return state

    def plain_line(self) -> str:
        """The state as a plain line."""
        state = self.format_dict
        # tqdm's fields, with spaces around words instead of its punctuation.
        line_format = self.plain_format
        if not line_format:
            line_format = WITH_TOTAL if self.total else WITHOUT_TOTAL
            state["prefix"] += ": " if state["prefix"] else ""
        if state["unit"] != "B":
            state["unit"] = f" {state['unit']}"
        state |= {"ncols": None, "bar_format": line_format}
        return self.format_meter(**state)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar or write a plain line. tqdm calls this when it is time."""
        # A write error must not stop the work.
        with suppress(OSError):
            if not self.plain:
                return super().display(msg, pos)
            if msg is None:
                self.fp.write(escaped(self.plain_line(), keep="") + "\n")
                self.fp.flush()
                self.mininterval = max(PLAIN_SECONDS, PLAIN_FRACTION * self.format_dict["elapsed"])
        return False

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> bool | None:
        """Draw the bar again. A plain line is not repeated after other output."""
        # write() passes nolock: it has written over a bar.
        if self.plain and nolock:
            return False
        return super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """Make room for other output."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Show the last state, if one was shown before and the bar stays."""
        if self.plain and not self.disable:
            shown = self.last_print_t >= self.start_t + self.delay
            if self.leave and shown and self.n > self.last_print_n:
                self.display()
            # tqdm would end the line, which has ended.
            self.leave = False
        with suppress(OSError):
            super().close()
