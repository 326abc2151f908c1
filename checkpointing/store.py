"""The checkpoints of a run, side by side in one folder: found by looking, chosen, pruned."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import atomic
from checkpointing.checkpoint import Checkpoint, DamagedCheckpoint, step_name
from terminal import readable_size

Loaded = TypeVar("Loaded")


def list_folders(checkpoints: Path) -> dict[Path, int]:
    """The folders of checkpoints, oldest first, each with its inode. Empty if there is no such folder yet.

    Raises OSError where it cannot be listed, for then nobody knows whether it is empty, and ValueError for a link.
    """
    if checkpoints.is_symlink():
        raise ValueError(f"{checkpoints} is a link: a run keeps its checkpoints in its own folder. Move them there, or "
                         f"link the run's whole folder.")
    try:
        with os.scandir(checkpoints) as entries:
            found = {checkpoints / entry.name: entry.inode() for entry in entries if entry.name.startswith("step_")}
    except FileNotFoundError:
        return {}
    return dict(sorted(found.items()))


def scan(checkpoints: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints that can be opened, oldest first, and what is wrong with the others."""
    found, damage = [], {}
    for folder in list_folders(checkpoints):
        try:
            found.append(Checkpoint.open(folder))
        except DamagedCheckpoint as error:
            if folder.exists():  # else it was pruned just now
                damage[folder] = str(error)
    return found, damage


def list_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints that can be opened, oldest first."""
    return scan(checkpoints)[0]


def load_checkpoint(checkpoints: Path, which: str, load: Callable[[Checkpoint], Loaded], warn: Callable[[str], None],
           rename_damaged: bool = False) -> Loaded | None:
    """What `load` makes of the first checkpoint by ORDERS[which] that it can load; None where there is none at all.

    `load` raises DamagedCheckpoint to have the next one tried. Damaged ones are named in one warning, and renamed with
    `rename_damaged`. Raises ValueError if all are damaged, and OSError, renaming nothing, where the system cannot read.
    """
    while True:
        before = list_folders(checkpoints)
        try:
            loaded, damage, used = first_loadable(checkpoints, ORDERS[which], load)
        except (ValueError, OSError):
            # A training that goes on deletes and saves checkpoints: the one that failed may be gone by now.
            if list_folders(checkpoints) == before:
                raise
            continue
        if (used and not damage) or list_folders(checkpoints) == before:
            break
    if damage:
        warn(f"Warning: {'; '.join(damage.values())}: using {used} instead.")
    for folder in damage if rename_damaged else ():
        folder.rename(atomic.unused_name(folder.with_name(f"damaged-{folder.name}")))
    return loaded


def first_loadable(checkpoints: Path, order: Callable[[Checkpoint], Any],
                   load: Callable[[Checkpoint], Loaded]) -> tuple[Loaded | None, dict[Path, str], str]:
    """The first checkpoint by `order` that `load` can load, the damage on the way, and its name, empty without one.

    Raises ValueError if there are checkpoints and all are damaged.
    """
    found, damage = scan(checkpoints)
    for one in sorted(found, key=order):
        try:
            return load(one), damage, one.folder.name
        except DamagedCheckpoint as error:
            damage[one.folder] = str(error)
    if damage:
        raise ValueError(f"No checkpoint in {checkpoints} is whole: {'; '.join(damage.values())}. "
                         f"Put a copy back, or start over with restart=true.")
    return None, {}, ""


def load_step(checkpoints: Path, step: int, load: Callable[[Checkpoint], Loaded]) -> Loaded:
    """What `load` makes of the checkpoint of one step.

    Raises ValueError if it is damaged, or, naming those there are, if it is missing.
    """
    folder = checkpoints / step_name(step)
    if folder in list_folders(checkpoints):
        try:
            return load(Checkpoint.open(folder))
        except DamagedCheckpoint as error:
            if folder.exists():  # else a training that goes on has deleted it
                raise ValueError(f"{error}: choose another checkpoint.") from None
    steps = ", ".join(str(one.step) for one in list_checkpoints(checkpoints)) or "none"
    raise ValueError(f"checkpoint={step} is not in {checkpoints}. There are: {steps}.")


def verified(one: Checkpoint) -> Checkpoint:
    """The checkpoint itself, all of it verified: a `load` for `choose`."""
    one.verify()
    return one


def by_val_loss(one: Checkpoint) -> tuple[float, int]:
    """Sorts by validation loss; what was not evaluated comes last, the newest first."""
    val_loss = one.state["val_loss"]
    return (math.inf if val_loss is None else val_loss), -one.step


def newest_first(one: Checkpoint) -> int:
    """Sorts the newest first."""
    return -one.step


def scheduled_first(one: Checkpoint) -> tuple[bool, int]:
    """Sorts the newest first that any run with these settings has; what an interruption left comes last."""
    return not one.state["scheduled"], -one.step


ORDERS = {"best": by_val_loss, "last": newest_first, "scheduled": scheduled_first}


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the first of each order, and what a kill left half-written.

    What is damaged stays.
    """
    found = list_checkpoints(checkpoints)
    kept = {one.folder for one in found[-keep_last:]}
    kept |= {min(found, key=order).folder for order in ORDERS.values() if found}
    doomed = [one.folder for one in found if one.folder not in kept] + list(checkpoints.glob(f"{atomic.PARTIAL}*"))
    for folder in doomed:
        atomic.remove(folder)


def delete_after(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which will come to be in another way."""
    for one in list_checkpoints(checkpoints):
        if one.step > step:
            atomic.remove(one.folder)


def check_free_space(checkpoints: Path, nbytes: int) -> None:
    """Raise ValueError unless the disk under `checkpoints` holds two checkpoints of this size."""
    needed = 2 * nbytes
    folder = checkpoints
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(f"{folder} has {readable_size(free)} free, two checkpoints need {readable_size(needed)}: "
                         f"free some, or choose another runs_dir.")
