"""Stop a process once its parent has ended: a sweep, or torchrun."""

import os
import signal
import threading
import time

# The environment variable of a child process that should stop when its standard input ends.
CHILD = "NANOHYDRA_CHILD"


def stop_with_parent() -> None:
    """In a child of a sweep or of torchrun: stop as after SIGTERM once the parent has ended.

    A sweep holds the other end of the pipe that is our standard input, so its end, by `kill -9`
    too, closes the pipe. An orphan of torchrun gets another parent.
    """
    parent = os.getppid()

    def wait_for_end_of_input() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def wait_for_another_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(CHILD, None):
        threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=wait_for_another_parent, daemon=True).start()
