"""Stop signals: which are noted, what the second one does, and what happens outside the main thread."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time

import pytest

from training.interrupt import REQUESTS, WARNINGS, Interrupt, embedded
from training.parent import stop_with_parent


@pytest.fixture
def unhandled():
    """Every stop signal has a handler that records it; as it was before is restored afterwards."""
    received = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number))
              for number in (*REQUESTS, *WARNINGS)}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*REQUESTS, *WARNINGS])
def test_a_stop_signal_is_noted_once_and_restored(unhandled, number):
    with Interrupt() as noted:
        assert not noted
        os.kill(os.getpid(), number)
        assert noted and noted.exit_code == 128 + number and not unhandled
    os.kill(os.getpid(), number)
    assert unhandled == [number]


@pytest.mark.parametrize("number", REQUESTS)
def test_a_second_request_reaches_the_earlier_handler(unhandled, number):
    with Interrupt():
        os.kill(os.getpid(), REQUESTS[0])
        os.kill(os.getpid(), number)
        assert unhandled == [number]


def test_repeated_signals_count_once_where_torchrun_repeats_them(unhandled):
    with Interrupt(second_ends=False) as noted:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert noted.exit_code == 143 and not unhandled
    os.kill(os.getpid(), signal.SIGTERM)
    assert unhandled == [signal.SIGTERM]


@pytest.mark.parametrize("warning", WARNINGS)
def test_a_warning_repeated_or_before_sigterm_still_saves(unhandled, warning):
    """The kernel repeats SIGXCPU, and a scheduler's SIGTERM follows its warning while the run saves."""
    with Interrupt() as noted:
        for number in (warning, warning, signal.SIGTERM, warning):
            os.kill(os.getpid(), number)
        assert noted.exit_code == 128 + warning and not unhandled


@pytest.mark.parametrize("number", [signal.SIGHUP, *WARNINGS])
def test_an_ignored_signal_stays_ignored(unhandled, number):
    signal.signal(number, signal.SIG_IGN)
    with Interrupt() as noted:
        os.kill(os.getpid(), number)
        assert not noted
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_thread_installs_no_handlers():
    def run():
        with Interrupt() as noted:
            found.append((bool(noted), noted.before, embedded()))

    found = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, {}, True)]


def test_a_handler_set_in_c_is_replaced_by_the_default(monkeypatch, unhandled):
    """Python calls such a handler None and cannot set it again."""
    with Interrupt() as noted:
        noted.before[signal.SIGUSR1] = None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("mark", ["builtins.__IPYTHON__", "sys.ps1"])
def test_notebooks_and_sessions_are_recognised(monkeypatch, mark):
    assert not embedded()
    monkeypatch.setattr(mark, True, raising=False)
    assert embedded() and sys


def test_a_process_stops_when_its_torchrun_is_killed(monkeypatch):
    """Also one that waits for the others to connect, here in a sleep."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    ended, orphans_end = os.pipe()
    torchrun = os.fork()
    if torchrun == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            stop_with_parent()
            os.write(orphans_end, b"started")
        else:
            os.close(orphans_end)
        time.sleep(30)
        os._exit(0)
    os.close(orphans_end)
    assert os.read(ended, 7) == b"started"
    os.kill(torchrun, signal.SIGKILL)
    os.waitpid(torchrun, 0)
    # The end of the pipe, which only the orphan still holds open.
    assert select.select([ended], [], [], 20)[0] and os.read(ended, 1) == b""
