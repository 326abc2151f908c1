"""Try to lose a run in every way there is: half an hour, or less with other numbers.

  python -m scripts.torture
  python -m scripts.torture kills=10 every=25

Programs are killed at random moments. A small training, from its text to its last checkpoint, dies at each call that
writes, or finds the disk full there, once or for good. Checkpoints are damaged byte class by byte class. A file system
fills up, where this user may mount one. Each time the same command goes on, and the result must be, bit by bit, the
training that nothing happened to. Prints a table; exits with 1 if anything was lost.

  kills=200        how many programs to kill
  every=1          fail at each call that writes, or at one in so many
"""

from __future__ import annotations

from conf.launch import launch
from progress import ProgressBar

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.torture:torture", "scripts.torture:TortureSettings", __doc__)

import contextlib
import errno
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import atomic
from checkpointing import checkpoint, store
from conf.schema import compose
from scripts.verify_resume import ROOT, compare, finish, start, steps, train_under_kills
from train import train

TINY = ("model=nano", "data=text", f"data.path={ROOT / 'README.md'}", "data.tokenizer=char", "training=smoke",
        "training.max_steps=40", "training.checkpoint_every=5", "training.sample_tokens=0", "training.eval_tokens=512",
        "training.device=cpu")
KILLED = {
    "AdamW, fp32": ("optim=adamw", "training.precision=fp32"),
    "Muon, bf16, dropout": ("optim=muon", "model=modern-nano", "training.precision=bf16", "model.dropout=0.2"),
    "AdamW, fp32, 4 micro-steps, dropout": ("optim=adamw", "training.precision=fp32", "training.tokens_per_step=512",
                                            "model.dropout=0.1"),
    "Muon, fp16 with its loss scaler": ("optim=muon", "training.precision=fp16"),
}
BROKEN = 70  # the exit code where something was raised that should not be
WRITING = ("open", "write", "pwrite", "fsync", "ftruncate", "truncate", "rename", "replace")  # what atomic.py asks for


@dataclass(frozen=True)
class TortureSettings:
    """How much of the campaign against runs is fought."""

    kills: int = 200  # of whole programs, at random moments
    every: int = 1  # fail at each call that writes, or at one in so many

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.kills < 0:
            yield f"kills={self.kills} must be at least 0."
        if self.every < 1:
            yield f"every={self.every} must be at least 1."


class Faulty:
    """Stands in for `os` inside atomic.py; its call number `at` goes wrong in the way `how` says."""

    def __init__(self, at: float, how: str) -> None:
        self.at, self.how, self.calls = at, how, 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        there = getattr(os, name)
        return self._watched(there) if name in WRITING else there

    def _watched(self, there: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.calls += 1
            if self.calls == self.at and self.how == "killed before":
                os._exit(9)
            if self.calls == self.at and self.how == "killed within":
                if there is os.write:
                    os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                else:
                    there(*arguments)
                os._exit(9)
            if self.calls == self.at or (self.calls > self.at and self.how == "disk full for good"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return there(*arguments)

        return call


def torture(settings: TortureSettings) -> int:
    """All attempts; 0 if none lost anything."""
    torch.set_num_threads(1)  # no threads, so that a fork is a whole process
    rows: list[tuple[str, int, int]] = []
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        folder = Path(scratch)
        os.environ["NANOHYDRA_DATA"] = str(folder / "data")
        for attempt in (faults, damages, full_disks, kills):
            for name, tries, lost in attempt(folder, settings):
                rows.append((name, tries, lost))
                print(f"  {name:<60} {tries:>5} tries, {lost} lost", flush=True)
    print("Nothing was lost." if not any(lost for _, _, lost in rows) else "Runs were LOST.")
    return 1 if any(lost for _, _, lost in rows) else 0


def survived(straight: Path, run: Path) -> bool:
    """Whether `run` is what `straight` is; says what is not."""
    found = {what: difference for what, difference in compare(straight, run).items() if difference}
    if found:
        print(f"{run}: {found}", file=sys.stderr)
    return not found


def in_a_fork(overrides: list[str], fault: Faulty | None = None) -> int:
    """Train in silence, in a process of its own; return its exit code: 1 for an OSError, as the command line has it."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = BROKEN
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if fault:
            atomic.os = fault
        code = train(compose("config", overrides))
    except OSError:
        code = 1
    finally:
        os._exit(code)


def faults(folder: Path, settings: TortureSettings) -> list[tuple[str, int, int]]:
    """A training that begins with nothing but its text, in which call after call goes wrong."""
    tiny = [*TINY, "training.max_steps=6", "training.checkpoint_every=2", "training.keep_last=1", f"runs_dir={folder}"]
    for name in ("warm", "straight"):  # the first one loads what torch loads late, once for all forks
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(compose("config", [*tiny, f"name={name}"]))
    results, calls = [], math.inf
    for how in ("killed before", "killed within", "disk full once", "disk full for good"):
        tries, lost = 0, 0
        for at in ProgressBar(itertools.count(1, settings.every), how, unit="calls", leave=False):
            if at >= calls:
                break
            shutil.rmtree(folder / "data")
            code = in_a_fork([*tiny, "name=run"], Faulty(at, how))
            if how == "killed before" and code == 0:
                calls = at  # it has not so many
                break
            again = in_a_fork([*tiny, "name=run"])
            fine = code in (0, 1, 9) and again == 0 and survived(folder / "straight", folder / "run")
            tries, lost = tries + 1, lost + (not fine)
            shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.rmtree(folder / "run", ignore_errors=True)
        results.append((f"a call that writes: {how}", tries, lost))
    return results


def damages(folder: Path, settings: TortureSettings) -> list[tuple[str, int, int]]:
    """The last checkpoint, damaged in one place; the one before it must give the same run."""
    tiny = [*TINY, f"runs_dir={folder}"]
    in_a_fork([*tiny, "name=long"])
    results = []
    for name in (*checkpoint.FILES, checkpoint.MANIFEST):
        tries, lost = 0, 0
        for damage in DAMAGES.values():
            shutil.copytree(folder / "long", folder / "run")
            path = max((folder / "run/checkpoints").glob("step_*")) / name
            path.write_bytes(damage(path.read_bytes()))
            lost += bool(in_a_fork([*tiny, "name=run"])) or not survived(folder / "long", folder / "run")
            tries += 1
            shutil.rmtree(folder / "run")
        results.append((f"damaged: {name}", tries, lost))
    return results


def flipped(place: float) -> Callable[[bytes], bytes]:
    """One bit is another at this part of a file's length."""
    def flip(content: bytes) -> bytes:
        index = int(place * (len(content) - 1))
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1:]
    return flip


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": flipped(0), "header": flipped(0.05), "early": flipped(0.3), "middle": flipped(0.5), "late": flipped(0.9),
    "last byte": flipped(1), "cut by one": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2], "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)), "longer": lambda content: content + b"\0",
    "a page of zeros": lambda content: bytes(min(4096, len(content))) + content[4096:],
}


def full_disks(folder: Path, settings: TortureSettings) -> list[tuple[str, int, int]]:
    """A file system that is full, in space and in number of files, while a program trains on it."""
    tiny = [*TINY, "training.max_steps=400"]
    finish(tiny, folder / "straight_400")
    results = []
    for kind, options in (("space", "size=6m"), ("number of files", "size=64m,nr_inodes=40")):
        mount = folder / "mount"
        mount.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", mount], capture_output=True).returncode:
            mount.rmdir()
            print(f"  a file system without {kind}: not tried, this user may not mount one")
            continue
        try:
            with start(tiny, mount / "run") as program:
                while program.poll() is None and steps(mount / "run") < 20:
                    time.sleep(0.01)
                fill(mount / "ballast")
                said = program.communicate()[0]
            kept = store.list_checkpoints(mount / "run/checkpoints")
            lost = not (program.returncode == 1 and "steps are saved" in said and "of free disk" in said and kept)
            for one in kept:
                one.verify()
            shutil.rmtree(mount / "ballast")
            finish(tiny, mount / "run")
            lost = lost or not survived(folder / "straight_400", mount / "run")
        finally:
            subprocess.run(["umount", mount], check=True)
            mount.rmdir()
        results.append((f"a file system without {kind}", 1, int(lost)))
    return results


def fill(folder: Path) -> None:
    """Use up a file system's space, then its files."""
    folder.mkdir()
    for size in (2**16, 1, 0):
        with contextlib.suppress(OSError):
            for number in range(10**6):
                (folder / f"{size}-{number}").write_bytes(b"x" * size)


def kills(folder: Path, settings: TortureSettings) -> list[tuple[str, int, int]]:
    """Whole programs, killed at random moments and inside saves."""
    results = []
    for number, (name, overrides) in enumerate(KILLED.items()):
        straight, killed = folder / f"straight_{number}", folder / f"killed_{number}"
        finish([*TINY, *overrides], straight)
        count = settings.kills // len(KILLED) + (number < settings.kills % len(KILLED))
        inside, _ = train_under_kills([*TINY, *overrides], killed, count, max_steps=40)
        results.append((f"kill -9, {inside} inside a save: {name}", count, int(not survived(straight, killed))))
    return results
