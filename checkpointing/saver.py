"""Saves checkpoints in a background thread while training continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpointing import store
from checkpointing.snapshot import Peers, Snapshot, join_save, save_checkpoint
from hardware import available_memory
from training.interrupt import embedded


@dataclass
class Saver:
    """Writes one checkpoint at a time, then deletes old ones. A context manager.

    `before_write` is called before a checkpoint is written and before it gets its name, and raises
    an error to prevent that. A write error is a warning, or with `stop_on_error` an OSError of the
    next call; the caller saves again. Of several processes, each has a saver, all save at the same
    steps, and the first one's arguments count.
    """

    checkpoints: Path
    keep_last: int
    saved: int  # the last step on the disk
    before_write: Callable[[], None]
    warn: Callable[[str], None]
    stop_on_error: bool
    peers: Peers = field(default_factory=Peers)
    waiting_seconds: float = 0.0  # of training, for saving
    thread: threading.Thread | None = None
    error: Exception | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Wait for the previous save, then start this one."""
        self.finish()
        # Training changes the tensors while the thread writes, so the thread gets a copy.
        start = time.perf_counter()
        if available_memory() > 1.5 * snapshot.own_nbytes():
            thread = threading.Thread(target=self._write, args=[snapshot.copy()], daemon=True)
            # The system may allow no more threads.
            with suppress(RuntimeError):
                thread.start()
                self.thread = thread
        if not self.thread:
            # There is no memory for a copy, or no thread, so training waits.
            self._write(snapshot)
        self.waiting_seconds += time.perf_counter() - start

    def check(self) -> None:
        """Report the error of a save that has ended; do not wait for one in progress."""
        if self.thread is None or not self.thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in progress, and report its error."""
        if self.thread:
            start = time.perf_counter()
            self.thread.join()
            self.thread = None
            self.waiting_seconds += time.perf_counter() - start
        # An error is reported once.
        error, self.error = self.error, None
        if isinstance(error, OSError) and not self.stop_on_error:
            self.warn(f"Warning: {error}")
        elif error:
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            if not self.peers.is_first:
                join_save(snapshot, self.peers)
                return
            save_checkpoint(self.checkpoints, snapshot, self.before_write, self.peers)
            self.saved = snapshot.state["step"]
            store.prune(self.checkpoints, self.keep_last)
        except Exception as error:
            # `finish` reports it in the thread that trains.
            self.error = error

    def __enter__(self) -> Saver:
        if self.peers.is_first:
            self.checkpoints.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        # A second Ctrl-C ends the process without waiting, except in a notebook, which continues.
        if self.thread and (kind is not KeyboardInterrupt or embedded()):
            self.thread.join()
