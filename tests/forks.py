"""What tests share that train in several processes.

The processes are forks of the test's, started as torchrun would: imports take longer than training.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60  # after which processes that wait for each other have failed


def start_forks(size: int, call: Callable[[int], object], folder: Path) -> list[int]:
    """Call `call(rank)` in each of `size` forks, whose output goes to `folder`; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            run_rank(rank, size, port, call, folder / f"output-{rank}")
        children.append(child)
    return children


def run_rank(rank, size, port, call, output):
    """In a fork: never return."""
    code = 70
    try:
        os.environ.update(TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank),
                          WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
        sys.argv = ["train.py"]
        call(rank)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def wait_for_forks(children: list[int], folder: Path) -> tuple[list[int], list[str]]:
    """The exit code and the output of each."""
    codes = [exit_code(child) for child in children]
    return codes, [(folder / f"output-{rank}").read_text() for rank in range(len(children))]


def exit_code(child):
    until = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, 9)
        time.sleep(0.01)
