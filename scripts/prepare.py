"""Prepare tokens without training. Training does the same when they are missing.

  python -m scripts.prepare data=shakespeare
  python -m scripts.prepare data=text data.path=book.txt data.tokenizer=bpe data.vocab_size=4096
  python -m scripts.prepare data=text data.path=book.txt inspect=true
  python -m scripts.prepare clean=true

They are written to data/prepared, or to $NANOHYDRA_DATA. Takes all settings of train.py, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.launch import launch
from report.figures import picture_problems
from setting import FilePath, ScriptSettings, setting


@dataclass(frozen=True)
class PrepareSettings(ScriptSettings):
    """The script's own settings; all others are those of train.py."""

    inspect: bool = setting(
        False, "print statistics, frequent tokens and three documents; and draw token frequencies "
               "and document lengths (needs matplotlib)")
    clean: bool = setting(
        False, "list all prepared tokens, and delete those that no run in runs_dir uses and "
               "unfinished ones, after a question")
    yes: bool = setting(False, "with clean=true: delete without asking")
    out: FilePath = setting("", "the picture of inspect=true; empty: inspect.png at the tokens")

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

from importlib.util import find_spec
from pathlib import Path

import numpy as np

import atomic
from conf.schema import compose
from conf.settings import Settings
from data.prepare import describe, load_tokenizer, prepare
from data.shards import SPLITS, open_parts, read_meta
from data.tokenizer import Tokenizer
from progress import ProgressBar
from report.figures import as_image, new_figure
from report.labels import log_ticks
from scripts.unused_tokens import clean
from terminal import counted, say

FREQUENT = 20  # tokens that are listed
BEGINNING, SHOWN = 2000, 600  # of a document: the tokens that are read, and the characters shown


def main(own: PrepareSettings) -> int:
    settings = compose("config", list(own.train))
    if own.clean:
        return clean(Path(settings.runs_dir), own.yes)
    folder = prepare(settings.data)
    say(describe(folder))
    if own.inspect:
        inspect(folder, settings, Path(own.out) if own.out else folder / "inspect.png")
    return 0


class Contents:
    """The `counts` of both splits by token id, and the documents of the training split."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        # Count each token, in both splits.
        self.train = open_parts(folder, "train")
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        parts = [*self.train, *open_parts(folder, "val")]
        with ProgressBar(desc="Counting", total=sum(map(len, parts)), unit="tokens",
                         unit_scale=True, leave=False) as bar:
            for tokens in parts:
                for _, chunk in tokens.chunks():
                    self.counts += np.bincount(chunk, minlength=len(self.counts))
                    bar.update(len(chunk))

        # Find the start and the end of each document, without the end-of-text token between two.
        part, starts, ends = [], [], []
        for number, tokens in enumerate(self.train):
            end = np.zeros(0, dtype=np.int64)
            if tokenizer.end_of_text is not None:
                end = tokens.positions_of(tokenizer.end_of_text)
            start, end = np.append(0, end + 1), np.append(end, len(tokens))
            # The last end of text may end the split, too.
            is_text = start < len(tokens)
            starts.append(start[is_text])
            ends.append(end[is_text])
            part.append(np.full(len(starts[-1]), number))
        self.part, self.starts, self.ends = map(np.concatenate, (part, starts, ends))

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The edges, in tokens, and the heights of a histogram of document lengths."""
        # Thirds of octaves, each from half a third below to half a third above.
        lengths = np.maximum(1, self.ends - self.starts)
        thirds = np.rint(3 * np.log2(lengths))
        edges = 2 ** ((np.arange(thirds.min(), thirds.max() + 2) - 0.5) / 3)
        return edges, np.histogram(lengths, edges)[0]

    def some_documents(self, number: int, seed: int) -> Iterator[tuple[int, int, list[int]]]:
        """Random documents without replacement: index, length, and the first ids of each."""
        count = len(self.starts)
        chosen = np.random.default_rng(seed).choice(count, min(number, count), replace=False)
        for index in sorted(chosen.tolist()):
            start, end = int(self.starts[index]), int(self.ends[index])
            ids = self.train[self.part[index]].read(np.arange(start, min(end, start + BEGINNING)))
            yield index, end - start, ids.tolist()


def inspect(folder: Path, settings: Settings, out: Path) -> None:
    """Print and draw the contents of prepared tokens."""
    # The size of each split.
    splits, tokenizer = read_meta(folder)["splits"], load_tokenizer(folder)
    say(f"\n{'split':<6}{'documents':>14}{'bytes':>18}{'tokens':>18}{'bytes a token':>15}")
    for split in SPLITS:
        totals = splits[split]
        say(f"{split:<6}{totals['documents']:>14,}{totals['bytes']:>18,}{totals['tokens']:>18,}"
            f"{totals['bytes_per_token']:>15.2f}")

    # The most frequent tokens.
    contents = Contents(folder, tokenizer)
    counts, total = contents.counts, contents.counts.sum()
    n_used = int((counts > 0).sum())
    say(f"\n{n_used:,} of {tokenizer.vocab_size:,} tokens occur; the most frequent are\n"
        f"{'id':>8}{'times':>16}{'share':>9}  token")
    for token in np.argsort(-counts, kind="stable")[: min(FREQUENT, n_used)].tolist():
        say(f"{token:>8}{counts[token]:>16,}{counts[token] / total:>9.2%}  "
            f"{decode(tokenizer, [token])!r}")
    # Three documents.
    for index, length, ids in contents.some_documents(3, settings.seed):
        text = decode(tokenizer, ids)
        say(f"\n--- Document {index + 1:,} of {len(contents.starts):,}: "
            f"{counted(length, 'token')}\n{text[:SHOWN]}{'...' if len(text) > SHOWN else ''}")

    if not find_spec("matplotlib"):
        say("\nWithout a picture, which needs matplotlib (pip install matplotlib).")
        return
    atomic.write_bytes(out, draw(contents, folder.name, out.suffix.lstrip(".")))
    say(f"\nDrew {out}")


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def draw(contents: Contents, title: str, kind: str) -> bytes:
    """A picture of token frequencies by rank and of document lengths, in the file type `kind`."""
    with new_figure(10, 4, "contents") as figure:
        left, right = figure.subplots(1, 2)
        # Zipf's law is a straight line here.
        frequencies = np.sort(contents.counts[contents.counts > 0])[::-1]
        left.loglog(np.arange(1, len(frequencies) + 1), frequencies, color="#d94801")
        left.set(xlabel="rank of the token", ylabel="times it occurs")
        left.set_title(f"{len(frequencies):,} different tokens")

        # A histogram of the lengths, with a logarithmic scale.
        edges, amounts = contents.lengths()
        right.stairs(amounts, edges, fill=True, color="#9ecae1")
        right.set(xscale="log", xlabel="length (tokens)", ylabel="documents")
        right.set_title(f"{len(contents.starts):,} documents")

        for axis in (left.xaxis, left.yaxis, right.xaxis):
            log_ticks(axis)
        figure.suptitle(title)
        return as_image(figure, kind, dpi=120)
