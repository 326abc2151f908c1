"""The checkpoints of a run: list them, load the best or the last one, delete old ones."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import atomic
from checkpointing.checkpoint import Checkpoint, DamagedCheckpoint
from checkpointing.spec import step_name
from hardware import free_space
from terminal import readable_size, say

Loaded = TypeVar("Loaded")


def list_folders(checkpoints: Path) -> dict[Path, int]:
    """The folders of checkpoints, oldest first, with their inodes; empty without such a folder.

    Raises ValueError for a link, and OSError if it cannot be listed.
    """
    if checkpoints.is_symlink():
        raise ValueError(f"{checkpoints} is a link, but a run must have a checkpoint folder of its "
                         f"own. Move the checkpoints there, or link the whole run folder.")
    try:
        with os.scandir(checkpoints) as entries:
            found = {checkpoints / entry.name: entry.inode() for entry in entries
                     if entry.name.startswith("step_")}
    except FileNotFoundError:
        return {}
    return dict(sorted(found.items()))


def scan(checkpoints: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints that can be opened, oldest first, and the problems of the damaged ones."""
    found, damaged = [], {}
    for folder in list_folders(checkpoints):
        try:
            found.append(Checkpoint.open(folder))
        except DamagedCheckpoint as error:
            # A folder that is gone was deleted by a running training.
            if folder.exists():
                damaged[folder] = str(error)
    return found, damaged


def list_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints that can be opened, oldest first."""
    return scan(checkpoints)[0]


def by_val_loss(one: Checkpoint) -> tuple[float, int]:
    """Sort key: the lowest validation loss first, then the newest of those without one."""
    val_loss = one.state["val_loss"]
    if val_loss is None:
        val_loss = math.inf
    return val_loss, -one.step


# Sort keys by the names of the orders. In "scheduled", those of interruptions come last.
ORDERS: dict[str, Callable[[Checkpoint], Any]] = {
    "best": by_val_loss, "last": lambda one: -one.step,
    "scheduled": lambda one: (not one.state["scheduled"], -one.step)}


def load_checkpoint(checkpoints: Path, which: str, load: Callable[[Checkpoint], Loaded],
                    warn: Callable[[str], None], rename_damaged: bool = False) -> Loaded | None:
    """Call `load` on the first checkpoint in the order `which`; None if there are no checkpoints.

    If `load` raises DamagedCheckpoint, the next one is tried. One warning names all damaged ones;
    `rename_damaged` also renames them. Raises ValueError if all are damaged, and OSError, renaming
    nothing, for errors of the system.
    """
    while True:
        before = list_folders(checkpoints)
        try:
            loaded, used, damaged = load_first(checkpoints, which, load)
        except (ValueError, OSError):
            # A running training saves and deletes checkpoints: if it did, try again.
            if list_folders(checkpoints) == before:
                raise
            continue
        if (used and not damaged) or list_folders(checkpoints) == before:
            break
    if damaged:
        warn(f"Warning: {'; '.join(damaged.values())}: using {used} instead.")
    # Under another name, it is not read again by the next command.
    if rename_damaged:
        for folder in damaged:
            folder.rename(atomic.unused_name(folder.with_name(f"damaged-{folder.name}")))
    return loaded


def load_first(checkpoints: Path, which: str, load: Callable[[Checkpoint], Loaded]
               ) -> tuple[Loaded | None, str, dict[Path, str]]:
    """The loaded checkpoint, its name, and the damaged ones; None and "" without checkpoints."""
    found, damaged = scan(checkpoints)
    for one in sorted(found, key=ORDERS[which]):
        try:
            return load(one), one.folder.name, damaged
        except DamagedCheckpoint as error:
            damaged[one.folder] = str(error)
    if damaged:
        raise ValueError(f"All checkpoints in {checkpoints} are damaged: "
                         f"{'; '.join(damaged.values())}. Restore a copy of one, or pass "
                         "restart=true to start over.")
    return None, "", {}


def load_of_run(run: Path, which: str, load: Callable[[Checkpoint], Loaded]) -> Loaded:
    """Call `load` on a checkpoint of a run: "best", "last", or the number of a step.

    Damaged ones are a warning on standard error. Raises ValueError if there is no such checkpoint,
    or if its content is invalid.
    """
    checkpoints = run / "checkpoints"
    if which.isdecimal():
        return load_step(checkpoints, int(which), load)
    loaded = load_checkpoint(checkpoints, which, load, lambda text: say(text, sys.stderr))
    if loaded is None:
        raise ValueError(f"{run} has no checkpoint.")
    return loaded


def load_step(checkpoints: Path, step: int, load: Callable[[Checkpoint], Loaded]) -> Loaded:
    """Call `load` on the checkpoint of one step. Raises ValueError if it is damaged or missing."""
    folder = checkpoints / step_name(step)
    if folder in list_folders(checkpoints):
        try:
            return load(Checkpoint.open(folder))
        except DamagedCheckpoint as error:
            # Otherwise a running training has just deleted it.
            if folder.exists():
                raise ValueError(f"{error}: choose another checkpoint.") from None
    steps = ", ".join(str(one.step) for one in list_checkpoints(checkpoints)) or "none"
    raise ValueError(f"checkpoint={step} is not in {checkpoints}. There are: {steps}.")


def verified(one: Checkpoint) -> Checkpoint:
    """The checkpoint itself, after all its files were verified: a `load` for `load_checkpoint`."""
    one.verify()
    return one


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete partial checkpoints, and all but the newest `keep_last` and the first of each order.

    Damaged checkpoints are kept.
    """
    # The newest ones, and the best, the last and the last scheduled one.
    found = list_checkpoints(checkpoints)
    kept = {one.folder for one in found[-keep_last:]}
    if found:
        kept |= {min(found, key=order).folder for order in ORDERS.values()}
    for one in found:
        if one.folder not in kept:
            atomic.remove(one.folder)
    atomic.remove_partial(checkpoints)


def delete_after(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which a rollback trains again."""
    for one in list_checkpoints(checkpoints):
        if one.step > step:
            atomic.remove(one.folder)


def check_free_space(checkpoints: Path, nbytes: int) -> None:
    """Raise ValueError unless there is space for two checkpoints of `nbytes`, or OSError."""
    needed = 2 * nbytes
    folder, free = free_space(checkpoints)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} is not writable: change its permissions, or set another "
                      "runs_dir=.")
    if free < needed:
        raise ValueError(f"{folder} has {readable_size(free)} free, two checkpoints need "
                         f"{readable_size(needed)}. Free some space, or set another runs_dir=.")
