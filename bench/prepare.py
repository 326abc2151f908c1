"""Time preparing against bare encoding of the same text, threads against processes, and measure the memory it takes.

  python -m bench.prepare

The text is the standard library's source code, repeated with a number before each line of it that stands on its own.

Settings, each with its default:
  megabytes=64     of text, for the rates; each round times every way once, in turn, and medians are printed
  rounds=5
  gigabytes=4      of text, for the memory; 0 leaves that out
  tokenizer=gpt2   or byte, bpe
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("bench.prepare:main", "bench.prepare:BenchPrepareSettings", __doc__)

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import atomic
from bench.attention import medians
from data import encode
from data.files import cut_up
from data.prepare import load_tokenizer, prepare
from data.sources import DataConfig, StdLib
from data.tokenizer import Tokenizer, from_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class BenchPrepareSettings:
    """How much is prepared, and how often."""

    megabytes: int = 64
    rounds: int = 5
    gigabytes: float = 4.0  # 0: no measurement of memory
    tokenizer: Literal["gpt2", "bpe", "byte"] = "gpt2"

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        for name in ("megabytes", "rounds"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        if not 0 <= self.gigabytes < 1e6:
            yield f"gigabytes={self.gigabytes} must be at least 0."


def main(settings: BenchPrepareSettings) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as scratch:
        os.environ["NANOHYDRA_DATA"] = f"{scratch}/prepared"
        rates(settings, Path(scratch))
        if settings.gigabytes:
            memory(settings, Path(scratch))
    return 0


def make_text(path: Path, n_bytes: int) -> None:
    source = [document.text.encode() for document in StdLib().documents()]
    with atomic.NewFile(path) as file:
        number = 0
        while n_bytes > 0:
            piece = b"# %d\n" % number + source[number % len(source)][:n_bytes]
            file.write(piece)
            n_bytes -= len(piece)
            number += 1


def rates(settings: BenchPrepareSettings, scratch: Path) -> None:
    """Print the rate of each way, and its ratio to bare encoding."""
    path = scratch / "rates.txt"
    make_text(path, settings.megabytes * 10**6)
    config = DataConfig("text", str(path), settings.tokenizer)
    folder = prepare(config)  # and the tokenizer is trained, the file in memory
    tokenizer = load_tokenizer(folder)
    pieces = list(cut_up(path.read_text()))
    n_threads = encode.threads()

    def prepare_again() -> None:
        for made in folder.iterdir():
            if made.name != "tokenizer.json":
                made.unlink()
        folder.rename(folder.with_name(f".building-{folder.name}"))
        prepare(config)

    with ProcessPoolExecutor(n_threads, initializer=begin, initargs=(tokenizer.to_json(),)) as pool:
        ways: dict[str, Callable[[], object]] = {
            "bare, threads": lambda: bare(tokenizer, pieces, n_threads),
            "bare, processes": lambda: list(pool.map(encode_there, pieces)),
            "prepared, from file to file": prepare_again}
        seconds = medians(ways, settings.rounds)
    print(f"{settings.megabytes} MB, {settings.tokenizer}, {n_threads} threads or processes, medians of {settings.rounds} "
          f"alternating rounds\n\n| way | MB/s | x |\n|---|---|---|")
    for way in ways:
        print(f"| {way} | {settings.megabytes / seconds[way]:.1f} | {seconds['bare, threads'] / seconds[way]:.2f} |")


def bare(tokenizer: Tokenizer, pieces: list[str], n_threads: int) -> object:
    """tiktoken's own way for many texts, where the tokenizer is one of tiktoken's."""
    if hasattr(tokenizer, "encoding"):
        return tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=n_threads)
    return list(map(tokenizer.encode, pieces))


def begin(saved: dict[str, object]) -> None:
    global there
    there = from_json(saved, "the parent process")


def encode_there(text: str) -> object:
    return there.encode_array(text)


def memory(settings: BenchPrepareSettings, scratch: Path) -> None:
    """Print the resident memory of a process that prepares a large text, along its way."""
    path = scratch / "memory.txt"
    make_text(path, int(settings.gigabytes * 10**9))
    words = ["data=text", f"data.path={path}", f"data.tokenizer={settings.tokenizer}"]
    process = subprocess.Popen([sys.executable, "-m", "scripts.prepare", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    start, curve = time.monotonic(), []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        curve += [(time.monotonic() - start, int(resident[1]) / 1000)] if resident else []
        time.sleep(0.25)
    print(f"\n{settings.gigabytes:g} GB, {settings.tokenizer}: {curve[-1][0]:.0f} s, "
          f"at most {max(size for _, size in curve):.0f} MB\n\n| of the time | resident, MB |\n|---|---|")
    for eighth in range(9):
        print(f"| {eighth}/8 | {curve[(len(curve) - 1) * eighth // 8][1]:.0f} |")
    shutil.rmtree(os.environ["NANOHYDRA_DATA"])
