"""The disk that the nodes of a run share: wait until it shows a folder on this node, too."""

import platform
import time
from pathlib import Path

# Network file systems keep what they know of a folder for up to a minute.
SHARED_SECONDS = 60.0


def wait_until_shared(folder: Path) -> None:
    """Wait until this node sees a folder that the first process has opened.

    A network file system may show it late. Raises ValueError if this node has another disk.
    """
    until = time.monotonic() + SHARED_SECONDS
    while not folder.exists():
        if time.monotonic() > until:
            raise ValueError(f"{folder} is not on {platform.node()}, but on the first node: all "
                             f"nodes need the same disk for runs_dir and NANOHYDRA_DATA.")
        time.sleep(0.5)
