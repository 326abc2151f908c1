"""Progress: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from progress import ProgressBar, print_line
from terminal import can_redraw, has_colors


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time that tqdm sees, in a list of one number."""
    now = [1000.0]
    monkeypatch.setattr("progress.monotonic", lambda: now[0])
    return now


@pytest.fixture
def streams(monkeypatch):
    """Replace stdout and stderr; returns both."""
    def replace(kind, term="xterm"):
        monkeypatch.setenv("TERM", term)
        out, err = kind(), kind()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err
    return replace


def work(bar: ProgressBar, clock: list[float], steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock[0] += seconds
        bar.update()


def test_progress_does_not_follow_the_time_of_day(clock, streams, monkeypatch):
    _, err = streams(io.StringIO)
    monkeypatch.setattr("tqdm.std.time", lambda: -5000.0 * clock[0])
    with ProgressBar(total=20, unit="steps") as bar:
        work(bar, clock, 20, 1.0)
    assert err.getvalue().splitlines() == [
        "50%, 10 of 20 steps, 00:10 elapsed, 00:10 left", "100%, 20 of 20 steps, 00:20 elapsed, 00:00 left"]


@pytest.mark.parametrize("kind, term", [(io.StringIO, "xterm"), (Screen, "dumb"), (Screen, "")])
def test_without_a_terminal_progress_is_plain_lines(clock, streams, kind, term):
    out, err = streams(kind, term)
    with ProgressBar(desc="Reading", total=40, unit="files") as bar:
        work(bar, clock, 30, 1.0)
        print_line("Step 3: loss 2.1")
        work(bar, clock, 10, 1.0)
    assert err.getvalue().splitlines() == [
        "Reading: 25%, 10 of 40 files, 00:10 elapsed, 00:30 left", "Reading: 50%, 20 of 40 files, 00:20 elapsed, 00:20 left",
        "Reading: 75%, 30 of 40 files, 00:30 elapsed, 00:10 left", "Reading: 100%, 40 of 40 files, 00:40 elapsed, 00:00 left"]
    assert out.getvalue() == "Step 3: loss 2.1\n" and err.getvalue().endswith("left\n")


@pytest.mark.parametrize("settings", [{"leave": False}, {"leave": True}, {"delay": 2}, {"mininterval": 0.1}])
def test_short_work_writes_no_plain_line(clock, streams, settings):
    out, err = streams(io.StringIO)
    with ProgressBar(desc="Reading", total=9, **settings) as bar:
        work(bar, clock, 9, 1.0)
    assert list(ProgressBar(range(3), **settings)) == [0, 1, 2]
    assert (out.getvalue(), err.getvalue()) == ("", "")


@pytest.mark.parametrize("settings, line", [
    ({"unit": "B", "unit_scale": True, "desc": "Preparing"}, "Preparing: 12.0MB, 00:16 elapsed"),
    ({"unit": "B", "unit_scale": True, "total": 48_000_000}, "25%, 12.0M of 48.0MB, 00:16 elapsed, 00:48 left"),
    ({"total": 48_000_000, "plain_format": "at {n_fmt}{postfix}", "postfix": {"loss": "2.0"}}, "at 12000000, loss=2.0"),
])
def test_a_plain_line_says_units_and_what_is_known(clock, streams, settings, line):
    _, err = streams(io.StringIO)
    with ProgressBar(leave=False, **settings) as bar:
        clock[0] += 16
        bar.update(12_000_000)
    assert err.getvalue() == line + "\n"


def test_loops_within_loops_move_no_cursor(clock, streams):
    _, err = streams(io.StringIO)
    for _ in ProgressBar(range(2), "Outer"):
        for _ in ProgressBar(range(3), "Inner", leave=False):
            clock[0] += 11
    lines = err.getvalue().splitlines()
    assert len(lines) == 8 and all(line.startswith(("Outer: ", "Inner: ")) for line in lines)


@pytest.mark.parametrize("steps_a_second, left", [(3, "00:15"), (100, "00:09")])
def test_a_time_limit_shows_the_time_left_until_then(clock, streams, steps_a_second, left):
    _, err = streams(io.StringIO)
    with ProgressBar(total=1900, leave=False) as bar:
        bar.expect(25, limited=True)
        for _ in range(10):
            clock[0] += 1
            bar.update(steps_a_second)
    assert err.getvalue().endswith(f"00:10 elapsed, {left} left\n")


def test_plain_lines_become_rarer_as_work_takes_longer(clock, streams):
    _, err = streams(io.StringIO)
    with ProgressBar(total=86_400) as bar:
        work(bar, clock, 86_400, 1.0)
    assert 100 < len(err.getvalue().splitlines()) < 400


def test_a_terminal_gets_a_bar_below_other_output(clock, streams):
    out, err = streams(Screen)
    with ProgressBar(desc="Reading", total=4, unit="files") as bar:
        work(bar, clock, 2, 1.0)
        print_line("hello")
        work(bar, clock, 2, 1.0)
    assert out.getvalue() == "hello\n" and err.getvalue().count("\r") >= 5 and "4/4" in err.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Screen])
def test_progress_that_cannot_be_shown_stops_nothing(clock, streams, monkeypatch, kind):
    class Gone(kind):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    streams(Gone)
    with ProgressBar(total=60) as bar:
        work(bar, clock, 60, 1.0)
        print_line("text")
    assert bar.n == 60


@pytest.mark.parametrize("term, no_color, redraw, colors", [
    ("xterm-256color", "", True, True), ("xterm", "1", True, False), ("dumb", "", False, False), ("", "", False, False)])
def test_bars_need_a_cursor_and_colors_consent(monkeypatch, term, no_color, redraw, colors):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert (can_redraw(Screen()), has_colors(Screen())) == (redraw, colors)
    assert not can_redraw(io.StringIO()) and not has_colors(io.StringIO())


def test_a_closed_or_missing_stream_is_no_terminal():
    closed = io.StringIO()
    closed.close()
    assert not can_redraw(closed) and not can_redraw(None)
