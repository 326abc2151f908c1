"""List prepared tokens, and delete those that no run uses: python -m scripts.prepare clean=true."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

import atomic
import locks
from checkpointing import store
from checkpointing.run_folder import LOCK
from data.config import TOKENIZERS, DataConfig
from data.files import walk
from data.prepare import PROGRESS
from data.shards import read_meta
from data.store import BUILDING, data_root, lock_of
from terminal import readable_size, say

# The names of folders of prepared tokens, complete and unfinished, and of the files in them.
SOURCES = "|".join(get_args(get_type_hints(DataConfig)["source"]))
COMPLETE = rf"({SOURCES}|mix)-({'|'.join(TOKENIZERS)}|file)-[0-9a-f]{{12}}"
PARTIAL, BEING_BUILT = re.escape(atomic.PARTIAL), re.escape(BUILDING)
UNFINISHED = rf"{BEING_BUILT}{COMPLETE}|{PARTIAL}({BEING_BUILT})?{COMPLETE}-[0-9a-f]{{8}}"
FILES = (rf"(train|val)_\d{{5}}\.npy|meta\.json|tokenizer\.json|inspect\.png|{re.escape(PROGRESS)}|"
         rf"{PARTIAL}.*")


def clean(runs_dir: Path, yes: bool) -> int:
    """List prepared tokens, and delete unused and unfinished ones after a confirmation."""
    # List all of them.
    kept, unused = survey(runs_dir)
    for folder, why in kept.items():
        say(f"Kept {folder} ({readable_size(n_bytes(folder))}), {why}")
    if not unused:
        say("There is nothing to remove.")
        return 0
    sizes = {folder: n_bytes(folder) for folder in unused}
    for folder, why in unused.items():
        say(f"To be removed: {folder} ({readable_size(sizes[folder])}), {why}")

    # Ask before anything is deleted.
    if not (yes or confirmed()):
        say("Nothing was removed. Pass yes=true to remove them without a question.")
        return 0
    # A run may have started to use one of them meanwhile.
    still_unused, freed = survey(runs_dir)[1], 0
    for folder in sorted(sizes.keys() & still_unused):
        atomic.remove(folder)
        say(f"Removed {folder}")
        freed += sizes[folder]
    say(f"{readable_size(freed)} removed. Training prepares missing tokens again.")
    return 0


def confirmed() -> bool:
    """Ask for a confirmation, if there is a terminal."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    try:
        return input("Remove them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def survey(runs_dir: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """The folders of prepared tokens to keep and to remove, with the reasons.

    Raises ValueError if it is unknown which tokens a run uses.
    """
    try:
        users = runs_by_tokens(runs_dir)
    except ValueError as error:
        raise ValueError(f"{error} Nothing was removed.") from None

    # Decide for each folder whether a run needs it.
    kept, unused = {}, {}
    for folder in sorted(data_root().glob("*-*-*")):
        unfinished = bool(re.fullmatch(UNFINISHED, folder.name))
        # Never touch what has another name, or lies elsewhere.
        ours = unfinished or re.fullmatch(COMPLETE, folder.name)
        if not ours or folder.is_symlink() or not folder.is_dir():
            continue
        needed = why_kept(folder, unfinished, users)
        if needed:
            kept[folder] = needed
        else:
            unused[folder] = "unfinished" if unfinished else f"not used by a run in {runs_dir}"
    return kept, unused


def why_kept(folder: Path, unfinished: bool, users: dict[str, list[str]]) -> str:
    """Why a folder of tokens must not be deleted, after its name; empty if it can be deleted."""
    foreign = sorted(name for name in os.listdir(folder) if not re.fullmatch(FILES, name))
    if foreign:
        return f"which has a file that prepared tokens do not have: {foreign[0]}"
    if unfinished:
        return "which is being prepared" if locks.is_locked(lock_of(folder)) else ""
    try:
        tokens = read_meta(folder)["fingerprint"][:12]
    except ValueError:
        return "whose meta.json cannot be read: delete it if you do not need it"
    return f"used by {', '.join(users[tokens])}" if tokens in users else ""


def n_bytes(folder: Path) -> int:
    size = 0
    for path in [folder, *folder.rglob("*")]:
        # Another process that prepares tokens may have renamed a temporary file.
        with suppress(FileNotFoundError):
            size += path.lstat().st_size
    return size


def runs_by_tokens(runs_dir: Path) -> dict[str, list[str]]:
    """The runs that use each fingerprint of tokens; ValueError for a run with unknown tokens."""
    if not runs_dir.is_dir():
        raise ValueError(f"runs_dir={runs_dir} is not a folder, so it is unknown which tokens are "
                         f"used: set runs_dir= to the folder of your runs.")
    users: dict[str, list[str]] = {}
    for folder in run_folders(runs_dir):
        try:
            # Its checkpoints may be from different tokens. Damaged ones count if no other is left.
            found, damage = store.scan(folder / "checkpoints")
            tokens = {tokens_of(checkpoint.state["settings"]) for checkpoint in found}
            if damage and not found:
                raise ValueError(next(iter(damage.values())))
        except ValueError as error:
            raise ValueError(f"It is unknown which tokens {folder} uses: {error}.") from None
        if not tokens and locks.is_locked(folder / LOCK):
            raise ValueError(f"{folder} is being trained and has no checkpoint yet that says which "
                             f"tokens it uses: wait for the first one.")
        for fingerprint in sorted(tokens):
            users.setdefault(fingerprint, []).append(str(folder))
    return users


def run_folders(runs_dir: Path) -> Iterator[Path]:
    """The folders in `runs_dir` with checkpoints or a lock, at any depth, each once, by name.

    Links are followed. Raises ValueError for a broken link, as to a disk that is not mounted.
    """
    for place, subfolders, names in walk(runs_dir):
        # The links inside a run do not lead to runs.
        if "checkpoints" in subfolders or LOCK in names:
            yield place
            names = []
        for name in names:
            path = place / name
            if path.is_symlink() and not path.exists():
                raise ValueError(f"{path} is a broken link, maybe to a run that uses prepared "
                                 f"tokens: delete the link, or mount the disk that it leads to.")
        subfolders[:] = sorted(set(subfolders) - {"checkpoints"})


def tokens_of(settings: dict[str, Any]) -> str:
    """The fingerprint of a checkpoint's tokens. Raises ValueError if its settings lack it."""
    match settings:
        case {"data": {"prepared": str(fingerprint)}}:
            return fingerprint
    raise ValueError("the settings in its checkpoint do not name any")
