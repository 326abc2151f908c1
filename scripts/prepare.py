"""Prepare tokens and do nothing else. Training does the same when they are missing.

  python -m scripts.prepare data=shakespeare
  python -m scripts.prepare data=text data.path=book.txt data.tokenizer=bpe data.vocab_size=4096
  python -m scripts.prepare data=text data.path=book.txt inspect=true
  python -m scripts.prepare clean=true

They go to data/prepared, or where NANOHYDRA_DATA says, in a folder named by what they were made from. Each setting of
train.py can be given; these are the script's own:
  inspect=true     say what is in them: how much, the most frequent tokens, three documents; and draw it (needs matplotlib)
  out=FILE         the picture; without it, inspect.png in the folder
  clean=true       list all prepared tokens, and delete those that no run in runs_dir uses, and unfinished ones, after
                   a question, or without one by yes=true; only folders that this program made
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.prepare:main", "scripts.prepare:PrepareSettings", __doc__)

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

import atomic
from checkpointing import store
from checkpointing.run_folder import LOCK
from conf.schema import compose
from conf.settings import Settings
from data.contents import Contents
from data.files import refuse
from data.prepare import PROGRESS, describe, load_tokenizer, prepare
from data.shards import SPLITS, read_meta
from data.sources import DataConfig
from data.store import BUILDING, data_root, in_use, is_locked
from data.tokenizer import Tokenizer
from report.curves import as_image, log_ticks, new_figure, picture_problems
from setting import FilePath
from terminal import readable_size, say

# What is in folders of prepared tokens, and the names that they have.
FILES = re.compile(rf"(train|val)_\d{{5}}\.npy|meta\.json|tokenizer\.json|{re.escape(PROGRESS)}|inspect\.png|"
                   rf"{re.escape(atomic.PARTIAL)}.*")
SOURCES, TOKENIZERS = ("|".join(get_args(get_type_hints(DataConfig)[name])) for name in ("source", "tokenizer"))
WHOLE = re.compile(rf"({SOURCES}|mix)-({TOKENIZERS})-[0-9a-f]{{12}}")
UNFINISHED = re.compile(rf"{re.escape(BUILDING)}{WHOLE.pattern}|"
                        rf"{re.escape(atomic.PARTIAL)}({re.escape(BUILDING)})?{WHOLE.pattern}-[0-9a-f]{{8}}")
FREQUENT = 20  # tokens that are listed
SHOWN = 600  # characters of a document


@dataclass(frozen=True)
class PrepareSettings:
    """What to do beside preparing; all other settings are those of train.py."""

    inspect: bool = False
    clean: bool = False
    yes: bool = False  # with clean: remove without a question
    out: FilePath = ""  # empty: inspect.png in the folder of the tokens
    train: tuple[str, ...] = ()  # what the command line says about the data

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.inspect and self.clean:
            yield "inspect and clean exclude each other: choose one."
        if self.yes and not self.clean:
            yield "yes=true belongs to clean=true: there is nothing else to confirm."
        yield from picture_problems(self.out)


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
    """Print and draw what is in prepared tokens."""
    splits, tokenizer = read_meta(folder)["splits"], load_tokenizer(folder)
    say(f"\n{'split':<6}{'documents':>14}{'bytes':>18}{'tokens':>18}{'bytes a token':>15}")
    for split in SPLITS:
        held = splits[split]
        say(f"{split:<6}{held['documents']:>14,}{held['bytes']:>18,}{held['tokens']:>18,}{held['bytes_per_token']:>15.2f}")

    contents = Contents(folder, tokenizer)
    total = contents.counts.sum()
    say(f"\n{(contents.counts > 0).sum():,} of {tokenizer.vocab_size:,} tokens occur; the most frequent are\n"
        f"{'id':>8}{'times':>16}{'share':>9}  token")
    for one in np.argsort(-contents.counts, kind="stable")[: min(FREQUENT, (contents.counts > 0).sum())].tolist():
        say(f"{one:>8}{contents.counts[one]:>16,}{contents.counts[one] / total:>9.2%}  {shown(tokenizer, [one])!r}")
    for index, length, ids in contents.some_documents(3, settings.seed):
        text = shown(tokenizer, ids)
        say(f"\n--- Document {index + 1:,} of {contents.n_documents:,}: {length:,} tokens\n"
            + text[:SHOWN] + ("..." if len(text) > SHOWN else ""))
    atomic.write_bytes(out, draw(contents, folder.name, out.suffix.lstrip(".")))
    say(f"\nDrew {out}")


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def draw(contents: Contents, title: str, kind: str) -> bytes:
    """Token frequencies by rank, and the lengths of documents, as a picture of the file type `kind`."""
    figure, style = new_figure(10, 4, "contents")
    with style:
        left, right = figure.subplots(1, 2)
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
    """List prepared tokens; after a confirmation, delete what no run uses and what was left unfinished."""
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
        say("Nothing was removed; yes=true removes them without a question.")
        return 0
    removed = [folder for folder in survey(runs_dir)[1] if folder in sizes]  # a run may have begun meanwhile
    for folder in removed:
        atomic.remove(folder)
        say(f"Removed {folder}")
    say(f"{readable_size(sum(sizes[folder] for folder in removed))} removed. What is needed again is prepared again.")
    return 0


def confirmed() -> bool:
    """Whether somebody at a terminal says yes."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    try:
        return input("Remove them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def survey(runs_dir: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """The folders of prepared tokens to keep and those to remove, with the reasons. Others are not looked at.

    Raises ValueError where a run does not tell which tokens it uses.
    """
    users = runs_by_tokens(runs_dir)
    kept: dict[Path, str] = {}
    unused: dict[Path, str] = {}
    for folder in sorted(data_root().iterdir()) if data_root().is_dir() else ():
        unfinished = UNFINISHED.fullmatch(folder.name)
        if folder.is_symlink() or not folder.is_dir() or not (unfinished or WHOLE.fullmatch(folder.name)):
            continue
        tokens = fingerprint_of(folder)
        if foreign := [path.name for path in sorted(folder.iterdir()) if not FILES.fullmatch(path.name)]:
            kept[folder] = f"which holds {foreign[0]}: that is not a file of prepared tokens"
        elif unfinished and in_use(folder):
            kept[folder] = "which is being prepared"
        elif unfinished:
            unused[folder] = "left unfinished"
        elif not tokens:
            kept[folder] = "whose meta.json cannot be read: delete it yourself if you do not need it"
        elif tokens in users:
            kept[folder] = f"used by {', '.join(users[tokens])}"
        else:
            unused[folder] = f"not used by a run in {runs_dir}"
    return kept, unused


def fingerprint_of(folder: Path) -> str:
    """Of the tokens in a folder, as runs name it; empty where it holds none that can be used."""
    try:
        return read_meta(folder)["fingerprint"][:12]
    except ValueError:
        return ""


def n_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in [folder, *folder.rglob("*")])


def runs_by_tokens(runs_dir: Path) -> dict[str, list[str]]:
    """The runs that each fingerprint of tokens is used by, those that links lead to included.

    Raises ValueError for a run that does not tell, and OSError for a folder that cannot be read.
    """
    if not runs_dir.is_dir():
        raise ValueError(f"runs_dir={runs_dir} is no folder, so nobody knows which tokens are used. Nothing was removed.")
    users: dict[str, list[str]] = {}
    for folder in run_folders(runs_dir):
        try:
            found, damage = store.scan(folder / "checkpoints")
            if damage and not found:
                raise ValueError(next(iter(damage.values())))
            tokens = {tokens_of(one.state["settings"]) for one in found}
        except ValueError as error:
            raise ValueError(f"It cannot be told which tokens {folder} uses: {error}. Nothing was removed.") from None
        if not tokens and is_locked(folder / LOCK):
            raise ValueError(f"{folder} is being trained and has no checkpoint that says which tokens it uses: wait "
                             f"for the first one. Nothing was removed.")
        for one in sorted(tokens):
            users.setdefault(one, []).append(str(folder))
    return users


def run_folders(runs_dir: Path) -> Iterator[Path]:
    """The folders below `runs_dir` with checkpoints or a lock, each once, in the order of their names.

    Links are followed. Raises ValueError for one that leads nowhere, as to a disk that is not mounted.
    """
    seen = set()
    for place, inner, names in os.walk(runs_dir, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if "checkpoints" in inner or LOCK in names:
            yield Path(place)
        else:
            refuse_lost_links(Path(place, name) for name in names)
        inner[:] = sorted(set(inner) - {"checkpoints"})


def refuse_lost_links(paths: Iterator[Path]) -> None:
    """Raises ValueError for a link that leads nowhere."""
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link that leads nowhere: it may be a run that uses prepared tokens. Delete the "
                             f"link, or mount the disk that it leads to. Nothing was removed.")


def tokens_of(settings: dict[str, Any]) -> str:
    """The fingerprint of the tokens that a checkpoint was trained on. Raises ValueError where its settings lack it."""
    match settings:
        case {"data": {"prepared": str(fingerprint)}}:
            return fingerprint
    raise ValueError("the settings in its checkpoint do not name any")
