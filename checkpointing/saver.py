"""Saving beside the training: the state is copied, and a thread writes the copy while the next steps run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from checkpointing import checkpoint, store
from checkpointing.checkpoint import Snapshot
from training.device import available_memory
from training.interrupt import embedded


class Saver:
    """Writes one checkpoint at a time and prunes the older ones. Use as a context manager, which makes the folder.

    `saved` is the last step that is on the disk. `before_write` is called before a checkpoint is written and before it gets
    its name: it raises where neither must happen. A write error is one warning each time, or with `stop_on_error` an
    OSError of the next call; the caller saves again.
    """

    def __init__(self, checkpoints: Path, keep_last: int, saved: int, before_write: Callable[[], None],
                 warn: Callable[[str], None], stop_on_error: bool) -> None:
        self.checkpoints, self.keep_last = checkpoints, keep_last
        self.saved = saved
        self.before_write, self.warn, self.stop_on_error = before_write, warn, stop_on_error
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.waiting_seconds = 0.0  # how long training waited for saving

    def save(self, snapshot: Snapshot) -> None:
        """Begin to save, once the save before is done; where memory is short for a copy, save at once."""
        self.finish()
        start = time.perf_counter()
        if available_memory() > 1.5 * snapshot.nbytes():
            self.thread = threading.Thread(target=self._write, args=[snapshot.copy()], daemon=True)
            self.thread.start()
        else:
            self._write(snapshot)
        self.waiting_seconds += time.perf_counter() - start

    def check(self) -> None:
        """Say or raise what went wrong, if writing has come to an end."""
        if self.thread is None or not self.thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written; say or raise what went wrong with it."""
        if self.thread:
            start = time.perf_counter()
            self.thread.join()
            self.thread = None
            self.waiting_seconds += time.perf_counter() - start
        error, self.error = self.error, None
        if isinstance(error, OSError) and not self.stop_on_error:
            self.warn(f"Warning: {error}")
        elif error:
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            checkpoint.save(self.checkpoints, snapshot, self.before_write)
            self.saved = snapshot.state["step"]
            store.prune(self.checkpoints, self.keep_last)
        except Exception as error:  # it belongs to the thread that trains
            self.error = error

    def __enter__(self) -> Saver:
        self.checkpoints.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        # After a second Ctrl-C the process ends without waiting, unless it is a notebook's and goes on.
        if self.thread and (kind is not KeyboardInterrupt or embedded()):
            self.thread.join()
