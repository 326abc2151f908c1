"""Preparing tokens beside bare encoding, with threads and with processes; and the memory it takes.

  python -m bench prepare

The text is the standard library's source code, repeated, each copy of a document with its number
before it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import atomic
from bench.timing import alternating_medians, measure_command, print_header, print_row
from data.config import DataConfig
from data.document import cut_into_pieces
from data.prepare import load_tokenizer, prepare
from data.sources import StdLib
from data.tokenizer import Tokenizer
from data.tokenizer_json import from_json
from hardware import usable_cpus
from setting import SettingsBase, setting


@dataclass(frozen=True)
class PrepareSettings(SettingsBase):
    """Settings of the benchmark of preparing."""

    megabytes: int = setting(64, "of text for the rates", ge=1)
    rounds: int = setting(5, "each round times every way once; medians are printed", ge=1)
    gigabytes: float = setting(4.0, "of text for the memory; 0 skips that", ge=0, lt=1e6)
    tokenizer: Literal["gpt2", "bpe", "byte"] = setting("gpt2", "of the tokens")


def main(settings: PrepareSettings) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as scratch:
        os.environ["NANOHYDRA_DATA"] = f"{scratch}/prepared"
        measure_rates(settings, Path(scratch))
        if settings.gigabytes:
            measure_memory(settings, Path(scratch))
    return 0


def make_text(path: Path, n_bytes: int) -> None:
    """Write a text of `n_bytes`, in which no document occurs twice."""
    source = ["".join(document.pieces()).encode() for document in StdLib().documents()]
    number = 0
    with atomic.NewFile(path) as file:
        while n_bytes > 0:
            piece = b"# %d\n" % number + source[number % len(source)][:n_bytes]
            file.write(piece)
            n_bytes -= len(piece)
            number += 1


def measure_rates(settings: PrepareSettings, scratch: Path) -> None:
    """Print the rate of each way, and its ratio to bare encoding with threads."""
    path = scratch / "rates.txt"
    make_text(path, settings.megabytes * 10**6)
    config = DataConfig("text", str(path), settings.tokenizer)
    # The first preparation trains the tokenizer, and brings the file into memory.
    folder = prepare(config)
    tokenizer = load_tokenizer(folder)
    pieces = list(cut_into_pieces([path.read_text()]))
    n_threads = usable_cpus()

    def prepare_again() -> None:
        # Only the tokenizer stays.
        for file in folder.iterdir():
            if file.name != "tokenizer.json":
                file.unlink()
        folder.rename(folder.with_name(f".building-{folder.name}"))
        prepare(config)

    with ProcessPoolExecutor(n_threads, None, load_in_worker, (tokenizer.to_json(),)) as pool:
        ways = {
            "bare, threads": lambda: encode_bare(tokenizer, pieces, n_threads),
            "bare, processes": lambda: list(pool.map(encode_in_worker, pieces)),
            "prepared, from file to file": prepare_again,
        }
        medians = alternating_medians(ways, settings.rounds)
    print(f"{settings.megabytes} MB, {settings.tokenizer}, {n_threads} threads or processes, "
          f"medians of {settings.rounds} alternating rounds\n")
    print_header("way", "MB/s", "x")
    for way, seconds in medians.items():
        ratio = medians["bare, threads"] / seconds
        print_row(way, f"{settings.megabytes / seconds:.1f}", f"{ratio:.2f}")


def encode_bare(tokenizer: Tokenizer, pieces: list[str], n_threads: int) -> object:
    """Encode with tiktoken's own threads, if the tokenizer is one of tiktoken's."""
    if hasattr(tokenizer, "encoding"):
        return tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=n_threads)
    return list(map(tokenizer.encode, pieces))


def load_in_worker(saved: dict[str, object]) -> None:
    """Load the tokenizer once in each process of the pool."""
    global worker_tokenizer
    worker_tokenizer = from_json(saved, "the parent process")


def encode_in_worker(text: str) -> object:
    return worker_tokenizer.encode_array(text)


def measure_memory(settings: PrepareSettings, scratch: Path) -> None:
    """Print the most memory of a process that prepares a large text."""
    path = scratch / "memory.txt"
    make_text(path, int(settings.gigabytes * 10**9))
    found = measure_command([sys.executable, "-m", "scripts.prepare", "data=text",
                             f"data.path={path}", f"data.tokenizer={settings.tokenizer}"])
    print(f"\n{settings.gigabytes:g} GB, {settings.tokenizer}: {found['seconds']:.0f} s, at most "
          f"{found['peak_bytes'] / 1e6:.0f} MB")
