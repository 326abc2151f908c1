"""Prepare tokens and do nothing else. Training does the same when they are missing.

  python -m scripts.prepare data=shakespeare
  python -m scripts.prepare data=text data.path=book.txt data.tokenizer=bpe data.vocab_size=4096
  python -m scripts.prepare data=text data.path=book.txt inspect=true
  python -m scripts.prepare clean=true

They go to data/prepared, or where NANOHYDRA_DATA says, in a folder named by what they were made from. Each setting of
train.py can be given; these are the script's own:
  inspect=true     say what is in them: how much, the most frequent tokens, three documents; and draw it (needs matplotlib)
  out=FILE         the picture; without it, inspect.png in the folder
  clean=true       list all prepared tokens, and delete those that no run in runs_dir uses, and what was left unfinished
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: torch takes a second or more, which --help and a mistake need not wait for.
    launch("scripts.prepare:main", "scripts.prepare:PrepareSettings", __doc__)

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import atomic
from conf.schema import Settings, compose
from data.contents import Contents
from data.prepare import describe, load_tokenizer, prepare
from data.shards import SPLITS, read_meta
from data.store import BUILDING, data_root, in_use, is_held
from data.tokenizer import Tokenizer
from scripts.plot import picture_problems, pyplot, save
from training import shelf
from training.checkpoint import megabytes
from training.run import LOCK

FREQUENT = 20  # tokens that are listed
SHOWN = 600  # characters of a document


@dataclass(frozen=True)
class PrepareSettings:
    """What to do beside preparing; all other settings are those of train.py."""

    inspect: bool = False
    clean: bool = False
    out: str = ""  # empty: inspect.png in the folder of the tokens
    train: tuple[str, ...] = ()  # what the command line says about the data

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.inspect and self.clean:
            yield "inspect and clean exclude each other: choose one."
        yield from picture_problems(self.out)


def main(own: PrepareSettings) -> int:
    settings = compose("config", list(own.train))
    if own.clean:
        return clean(Path(settings.runs_dir))
    folder = prepare(settings.data)
    print(describe(folder))
    if own.inspect:
        inspect(folder, settings, Path(own.out) if own.out else folder / "inspect.png")
    return 0


def inspect(folder: Path, settings: Settings, out: Path) -> None:
    """Print and draw what is in prepared tokens."""
    splits, tokenizer = read_meta(folder)["splits"], load_tokenizer(folder)
    print(f"\n{'split':<6}{'documents':>14}{'bytes':>18}{'tokens':>18}{'bytes a token':>15}")
    for split in SPLITS:
        held = splits[split]
        print(f"{split:<6}{held['documents']:>14,}{held['bytes']:>18,}{held['tokens']:>18,}{held['bytes_per_token']:>15.2f}")

    contents = Contents(folder, tokenizer)
    total = contents.counts.sum()
    print(f"\n{(contents.counts > 0).sum():,} of {tokenizer.vocab_size:,} tokens occur; the most frequent are\n"
          f"{'id':>8}{'times':>16}{'share':>9}  token")
    for one in np.argsort(-contents.counts, kind="stable")[: min(FREQUENT, (contents.counts > 0).sum())].tolist():
        print(f"{one:>8}{contents.counts[one]:>16,}{contents.counts[one] / total:>9.2%}  {shown(tokenizer, [one])!r}")
    for index, length, ids in contents.some_documents(3, settings.seed):
        text = shown(tokenizer, ids)
        print(f"\n--- Document {index + 1:,} of {contents.n_documents:,}: {length:,} tokens\n"
              + text[:SHOWN] + ("..." if len(text) > SHOWN else ""))
    atomic.write_bytes(out, draw(contents, folder.name, out.suffix.lstrip(".")))
    print(f"\nDrew {out}")


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def draw(contents: Contents, title: str, kind: str) -> bytes:
    """Token frequencies by rank, and the lengths of documents, as a picture of the file type `kind`."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    frequencies = np.sort(contents.counts[contents.counts > 0])[::-1]
    left.loglog(np.arange(1, len(frequencies) + 1), frequencies, color="#d94801")
    left.set(xlabel="rank of the token", ylabel="times it occurs", title=f"{len(frequencies):,} different tokens")
    edges, amounts = contents.lengths()
    right.stairs(amounts, edges, fill=True, color="#9ecae1")
    right.set(xscale="log", xlabel="length (tokens)", ylabel="documents", title=f"{contents.n_documents:,} documents")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return save(figure, kind)


def clean(runs_dir: Path) -> int:
    """Delete what no run uses and what was left unfinished, and say what stays and why."""
    users = runs_by_tokens(runs_dir)
    doomed: dict[Path, str] = {}
    for folder in sorted(path for path in data_root().glob("*-*-*") if path.is_dir()):
        mine = users.get(fingerprint_of(folder))
        if folder.name.startswith(BUILDING) and in_use(folder):
            print(f"Kept {folder}, which is being prepared")
        elif folder.name.startswith("."):
            doomed[folder] = "it was left unfinished"
        elif mine:
            print(f"Kept {folder} ({megabytes(n_bytes(folder))}), used by {', '.join(mine)}")
        else:
            doomed[folder] = f"no run in {runs_dir} uses it"
    sizes = [n_bytes(folder) for folder in doomed]
    for (folder, why), size in zip(doomed.items(), sizes, strict=True):
        atomic.remove(folder)
        print(f"Removed {folder} ({megabytes(size)}): {why}")
    print(f"{megabytes(sum(sizes))} removed. What is needed again is prepared again.")
    return 0


def fingerprint_of(folder: Path) -> str:
    """Of the tokens in a folder, as runs name it; empty where it holds none that can be used."""
    try:
        return read_meta(folder)["fingerprint"][:12]
    except ValueError:
        return ""


def n_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in [folder, *folder.rglob("*")])


def runs_by_tokens(runs_dir: Path) -> dict[str, list[str]]:
    """The runs that each fingerprint of tokens is used by. Raises ValueError for a run that does not tell."""
    if not runs_dir.is_dir():
        raise ValueError(f"runs_dir={runs_dir} is no folder, so nobody knows which tokens are used. Nothing was removed.")
    users: dict[str, list[str]] = {}
    for lock in runs_dir.rglob(LOCK):
        if not any((lock.parent / "checkpoints").glob("step_*")) and is_held(lock):
            raise ValueError(f"{lock.parent} is being trained and has no checkpoint that says which tokens it uses: wait "
                             f"for the first one. Nothing was removed.")
    for folder in sorted(runs_dir.rglob("checkpoints")):
        found, damage = shelf.look(folder)
        if damage and not found:
            raise ValueError(f"It cannot be told which tokens {folder.parent} uses: {next(iter(damage.values()))}. "
                             f"Nothing was removed.")
        for one in found[-1:]:
            users.setdefault(one.state["settings"]["data"]["prepared"], []).append(str(folder.parent))
    return users
