"""Optuna's study of a search: where it is stored, its lock, and its errors in one sentence."""

import os
import re
import time
from pathlib import Path
from typing import Any

import atomic
import locks
from checkpointing.run_folder import describe_process
from conf.identity import differences, listed
from optional import import_optional
from sweep.space import Space

JOURNAL = "study.log"


def import_optuna() -> Any:
    optuna = import_optional("optuna", "Searching needs optuna", "optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(folder: Path, space: Space, metric: str, storage: str, pruner: str) -> Any:
    """The new or existing study. Raises ValueError if it is unusable, or of another space.

    `storage` is a URL for Optuna, or empty for the journal in the folder.
    """
    # Create the study with a description of its space, or open it with the earlier one.
    optuna, description = import_optuna(), space.description()
    try:
        study = optuna.create_study(
            storage=storage or journal_storage(folder), study_name=folder.name,
            load_if_exists=True, pruner=new_pruner(pruner, space))
        searched = study.user_attrs.get("space")
        if searched is None:
            study.set_user_attr("space", description)
            study.set_user_attr("metric", metric)
    except Exception as error:
        # Each kind of storage has its own exceptions.
        damage = "" if storage or isinstance(error, OSError) else damage_of(folder / JOURNAL)
        raise ValueError(storage_error(storage, error) + damage) from error

    # Trials of different spaces cannot be compared.
    changes = differences(searched or description, description)
    if changes:
        raise ValueError(f"{folder} is the search of another space: {listed(changes)}. "
                         f"Use another name=, or restore the old space.")
    return study


def journal_storage(folder: Path) -> Any:
    """Optuna's storage in a file, to which each event of the study is appended."""
    storages = import_optuna().storages
    # Optuna would wait for the writer of a FIFO, perhaps forever.
    os.close(atomic.open_regular(folder / JOURNAL, os.O_RDWR | os.O_CREAT))
    lock = FileLock(folder / "journal.lock", folder / JOURNAL)
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(folder / JOURNAL), lock))


def new_pruner(name: str, space: Space) -> Any:
    """Optuna's pruner of this name."""
    pruners, training = import_optuna().pruners, space.example.training
    if name == "hyperband":
        return pruners.HyperbandPruner(max(1, training.eval_every), training.max_steps)
    return pruners.MedianPruner() if name == "median" else pruners.NopPruner()


class FileLock:
    """A lock that waits, and ends with the process that holds it, unlike Optuna's own.

    It has the methods of Optuna's journal locks. Whoever acquires it finds only complete lines in
    `journal`.
    """

    def __init__(self, path: Path, journal: Path | None = None) -> None:
        self.path, self.journal = path, journal

    def acquire(self) -> bool:
        while True:
            try:
                self.lock = locks.Lock(self.path, describe_process())
                break
            except BlockingIOError:
                time.sleep(0.01)
        if self.journal:
            # Opening the file removes a line that was cut off by a kill.
            atomic.LineFile(self.journal).close()
        return True

    def release(self, *failure: object) -> None:
        self.lock.release()

    __enter__, __exit__ = acquire, release


def storage_name(storage: str, folder: Path = Path()) -> str:
    return hide_password(storage) or str(folder / JOURNAL)


def storage_error(storage: str, error: Exception) -> str:
    """The message for a storage that cannot be used."""
    reason = hide_password(" ".join(str(error).split()))[:200]
    return (f"storage={storage_name(storage)} cannot be reached or used "
            f"({type(error).__name__}: {reason}).")


def damage_of(journal: Path) -> str:
    """A message about a damaged journal, with the first line that is not JSON, if there is one."""
    place = f" {journal}"
    for number, line in enumerate(journal.read_bytes().split(b"\n")[:-1], 1):
        try:
            atomic.parse_json(line)
        except ValueError:
            place = f" Line {number} of {journal}"
            break
    return f"{place} is damaged: restore a copy, or use another name= (the runs stay as they are)."


def hide_password(text: str) -> str:
    """Text with the credentials and the query string of URLs removed."""
    return re.sub(r"\?\S*", "?...", re.sub(r"://.*@", "://...@", text))
