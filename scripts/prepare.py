"""Prepare tokens without training. Training does the same when they are missing.

  python -m scripts.prepare data=shakespeare
  python -m scripts.prepare data=text data.path=book.txt data.tokenizer=bpe data.vocab_size=4096
  python -m scripts.prepare data=text data.path=book.txt inspect=true
  python -m scripts.prepare clean=true

They are written to data/prepared, or to $NANOHYDRA_DATA. Takes all settings of train.py, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conf.launch import launch
from report.figures import picture_problems
from setting import FilePath, setting


@dataclass(frozen=True)
class PrepareSettings:
    """The script's own settings; all others are those of train.py."""

    inspect: bool = setting(
        False,
        "print statistics, the most frequent tokens and three documents; and draw token "
        "frequencies and document lengths (needs matplotlib)")
    clean: bool = setting(
        False,
        "list all prepared tokens, and delete those that no run in runs_dir uses and unfinished "
        "ones, after a question")
    yes: bool = setting(False, "with clean=true: delete without asking")
    out: FilePath = setting(
        "", "the picture of inspect=true; empty: inspect.png in the folder of the tokens")
    # Overrides of train.py's settings.
    train: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if self.inspect and self.clean:
            yield "inspect=true and clean=true exclude each other: choose one."
        if self.yes and not self.clean:
            yield "yes=true confirms clean=true: give both, or neither."
        if self.out and not self.inspect:
            yield f"out={self.out} is the picture of inspect=true: add it, or leave out= out."
        yield from picture_problems(self.out)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.prepare:main", PrepareSettings, __doc__)

import os
import re
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

import atomic
import locks
from checkpointing import store
from checkpointing.run_folder import LOCK
from conf.schema import compose
from conf.settings import Settings
from data.config import TOKENIZERS, DataConfig
from data.contents import Contents
from data.find import walk
from data.prepare import PROGRESS, describe, load_tokenizer, prepare
from data.shards import SPLITS, read_meta
from data.store import BUILDING, data_root, in_use
from data.tokenizer import Tokenizer
from report.figures import as_image, log_ticks, new_figure
from terminal import counted, readable_size, say

# The names of folders of prepared tokens, complete and unfinished, and of the files in them.
SOURCES = "|".join(get_args(get_type_hints(DataConfig)["source"]))
COMPLETE = rf"({SOURCES}|mix)-({'|'.join(TOKENIZERS)}|file)-[0-9a-f]{{12}}"
PARTIAL, BEING_BUILT = re.escape(atomic.PARTIAL), re.escape(BUILDING)
UNFINISHED = rf"{BEING_BUILT}{COMPLETE}|{PARTIAL}({BEING_BUILT})?{COMPLETE}-[0-9a-f]{{8}}"
FILES = (rf"(train|val)_\d{{5}}\.npy|meta\.json|tokenizer\.json|inspect\.png|{re.escape(PROGRESS)}|"
         rf"{PARTIAL}.*")
FREQUENT = 20  # tokens that are listed
SHOWN = 600  # characters of a document


def main(own: PrepareSettings) -> int:
    settings = compose("config", list(own.train))
    if own.clean:
        return clean(Path(os.path.expanduser(settings.runs_dir)), own.yes)
    folder = prepare(settings.data)
    say(describe(folder))
    if own.inspect:
        inspect(folder, settings, Path(own.out) if own.out else folder / "inspect.png")
    return 0


def inspect(folder: Path, settings: Settings, out: Path) -> None:
    """Print and draw the contents of prepared tokens."""
    # The size of each split.
    splits, tokenizer = read_meta(folder)["splits"], load_tokenizer(folder)
    say(f"\n{'split':<6}{'documents':>14}{'bytes':>18}{'tokens':>18}{'bytes a token':>15}")
    for split in SPLITS:
        totals = splits[split]
        say(f"{split:<6}{totals['documents']:>14,}{totals['bytes']:>18,}{totals['tokens']:>18,}"
            f"{totals['bytes_per_token']:>15.2f}")

    # The most frequent tokens, and three documents.
    contents = Contents(folder, tokenizer)
    counts, total = contents.counts, contents.counts.sum()
    n_used = int((counts > 0).sum())
    say(f"\n{n_used:,} of {tokenizer.vocab_size:,} tokens occur; the most frequent are\n"
        f"{'id':>8}{'times':>16}{'share':>9}  token")
    for token in np.argsort(-counts, kind="stable")[: min(FREQUENT, n_used)].tolist():
        say(f"{token:>8}{counts[token]:>16,}{counts[token] / total:>9.2%}  "
            f"{decode(tokenizer, [token])!r}")
    for index, length, ids in contents.some_documents(3, settings.seed):
        text = decode(tokenizer, ids)
        say(f"\n--- Document {index + 1:,} of {contents.n_documents:,}: "
            f"{counted(length, 'token')}\n"
            f"{text[:SHOWN]}{'...' if len(text) > SHOWN else ''}")

    if not find_spec("matplotlib"):
        say("\nWithout a picture, which needs matplotlib (pip install matplotlib).")
        return
    atomic.write_bytes(out, draw(contents, folder.name, out.suffix.lstrip(".")))
    say(f"\nDrew {out}")


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def draw(contents: Contents, title: str, kind: str) -> bytes:
    """A picture of token frequencies by rank and of document lengths, in the file type `kind`."""
    figure, style = new_figure(10, 4, "contents")
    with style:
        left, right = figure.subplots(1, 2)
        # Zipf's law is a straight line here.
        frequencies = np.sort(contents.counts[contents.counts > 0])[::-1]
        left.loglog(np.arange(1, len(frequencies) + 1), frequencies, color="#d94801")
        left.set(xlabel="rank of the token", ylabel="times it occurs")
        left.set_title(f"{len(frequencies):,} different tokens")

        edges, amounts = contents.lengths()
        right.stairs(amounts, edges, fill=True, color="#9ecae1")
        right.set(xscale="log", xlabel="length (tokens)", ylabel="documents")
        right.set_title(f"{contents.n_documents:,} documents")

        for axis in (left.xaxis, left.yaxis, right.xaxis):
            log_ticks(axis)
        figure.suptitle(title)
        return as_image(figure, kind, dpi=120)


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

    if not (yes or confirmed()):
        say("Nothing was removed. Pass yes=true to remove them without a question.")
        return 0
    # A run may have started to use one of them meanwhile.
    still_unused = survey(runs_dir)[1]
    removed = [folder for folder in sizes if folder in still_unused]
    for folder in removed:
        atomic.remove(folder)
        say(f"Removed {folder}")
    freed = sum(sizes[folder] for folder in removed)
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
    kept: dict[Path, str] = {}
    unused: dict[Path, str] = {}
    for folder in sorted(data_root().glob("*-*-*")):
        unfinished = bool(re.fullmatch(UNFINISHED, folder.name))
        # Never touch what has another name, or lies elsewhere.
        ours = unfinished or re.fullmatch(COMPLETE, folder.name)
        if not ours or folder.is_symlink() or not folder.is_dir():
            continue
        needed = why_kept(folder, unfinished, users)
        if needed:
            kept[folder] = needed
        elif unfinished:
            unused[folder] = "left unfinished"
        else:
            unused[folder] = f"not used by a run in {runs_dir}"
    return kept, unused


def why_kept(folder: Path, unfinished: bool, users: dict[str, list[str]]) -> str:
    """Why a folder of tokens must not be deleted, after its name; empty if it can be deleted."""
    foreign = sorted(name for name in os.listdir(folder) if not re.fullmatch(FILES, name))
    if foreign:
        return f"which has a file that prepared tokens do not have: {foreign[0]}"
    if unfinished:
        return "which is being prepared" if in_use(folder) else ""
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
