"""Try to lose a run in every possible way. Takes half an hour, or less with other numbers.

  python -m scripts.torture
  python -m scripts.torture kills=10 every=25

- Kill programs at random moments.
- In a small training, from its text to its last checkpoint, let each call that writes to the disk
  be the last one before a kill, or find the disk full, once or for good.
- Damage each file of a checkpoint in twelve ways.
- Fill up a file system, if this user may mount one.

Each time the same command resumes the run, and the result must be bit-identical to an undisturbed
training. Prints a table, and exits with 1 if anything was lost.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.launch import launch
from progress import ProgressBar
from setting import SettingsBase, setting


@dataclass(frozen=True)
class TortureSettings(SettingsBase):
    """The size of the campaign."""

    kills: int = setting(200, "programs to kill at random moments", ge=0)
    every: int = setting(1, "try every N-th call that writes, and every N-th damage", ge=1)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.torture:torture", TortureSettings, __doc__)

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import atomic
import locks
from checkpointing import store
from checkpointing.spec import FILES, MANIFEST
from conf.schema import compose
from scripts import verify_resume
from scripts.verify_resume import ROOT, finish
from train import train

TINY = ("model=nano", "data=text", f"data.path={ROOT / 'README.md'}", "data.tokenizer=char",
        "training=smoke", "training.max_steps=40", "training.checkpoint_every=5",
        "training.sample_tokens=0", "training.eval_tokens=512", "training.device=cpu")
KILLED = {
    "AdamW, fp32": ("optim=adamw", "training.precision=fp32"),
    "Muon, bf16, dropout": ("optim=muon", "model=modern-nano", "training.precision=bf16",
                            "model.dropout=0.2"),
    "AdamW, fp32, 4 micro-steps, dropout": ("optim=adamw", "training.precision=fp32",
                                            "training.tokens_per_step=512", "model.dropout=0.1"),
    "Muon, fp16 with its loss scaler": ("optim=muon", "training.precision=fp16"),
}
FAULTS = ("killed before", "killed within", "disk full once", "disk full for good")
UNEXPECTED = 70  # exit code
# The functions of `os` by which atomic.py and locks.py write.
WRITING = ("open", "write", "pwrite", "fsync", "ftruncate", "truncate", "rename", "replace")

Result = tuple[str, int, int]  # name, number of tries, number of lost runs


class FaultyOs:
    """Replaces `os` in atomic.py and locks.py: the call number `at` that writes fails, from 1 on.

    `fault` is one of FAULTS. `calls` counts the calls.
    """

    def __init__(self, at: int = 0, fault: str = "") -> None:
        self.at, self.fault, self.calls = at, fault, 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        function = getattr(os, name)
        if name not in WRITING:
            return function

        def call(*arguments: object, **named: object) -> object:
            self.calls += 1
            if self.calls == self.at:
                self._fail(function, arguments, named)
            if self.calls > self.at and self.fault == "disk full for good":
                raise disk_full()
            return function(*arguments, **named)

        return call

    def _fail(self, function: Callable[..., object], arguments: tuple, named: dict) -> None:
        if self.fault == "killed within":
            if function is os.write:
                descriptor, content = arguments
                arguments = descriptor, content[: len(content) // 2]
            function(*arguments, **named)
        if "killed" in self.fault:
            os._exit(9)
        raise disk_full()


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torture(settings: TortureSettings) -> int:
    """Run the whole campaign; return 0 if nothing was lost."""
    # Without other threads, a fork is a complete process.
    torch.set_num_threads(1)
    any_lost = False
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        folder = Path(scratch)
        os.environ["NANOHYDRA_DATA"] = str(folder / "data")
        for campaign in (faults, damages, full_disks, kills):
            for name, tries, lost in campaign(folder, settings):
                print(f"  {name:<60} {tries:>5} tries, {lost} lost", flush=True)
                any_lost = any_lost or lost > 0
    print("Runs were LOST." if any_lost else "Nothing was lost.")
    return int(any_lost)


def is_identical(straight: Path, run: Path) -> bool:
    """Whether two runs are bit-identical; prints the differences."""
    differences = verify_resume.compare(straight, run)
    if any(differences.values()):
        print(f"{run}: {differences}", file=sys.stderr)
    return not any(differences.values())


def train_in_fork(overrides: list[str], fault: FaultyOs | None = None) -> int:
    """Train silently in a forked process; return its exit code, 1 for an OSError."""
    # The parent only waits.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # The child trains, and ends without the exit handlers that it has from its parent.
    code = UNEXPECTED
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if fault:
            atomic.os = locks.os = fault
        code = train(compose("config", overrides))
    except OSError:
        code = 1
    finally:
        os._exit(code)


def faults(folder: Path, settings: TortureSettings) -> Iterator[Result]:
    """Let each call that writes fail, in a training that starts from its text."""
    tiny = [*TINY, "training.max_steps=6", "training.checkpoint_every=2", "training.keep_last=1",
            f"runs_dir={folder}"]
    # Count the calls. The first training loads the modules that torch loads late, for all forks.
    for name in ("warm_up", "straight"):
        shutil.rmtree(folder / "data", ignore_errors=True)
        atomic.os = locks.os = counter = FaultyOs()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(compose("config", [*tiny, f"name={name}"]))
    atomic.os = locks.os = os

    for fault in FAULTS:
        lost = 0
        tried = range(1, counter.calls + 1, settings.every)
        for at in ProgressBar(tried, fault, unit="calls", leave=False):
            shutil.rmtree(folder / "data")
            shutil.rmtree(folder / "run", ignore_errors=True)
            code = train_in_fork([*tiny, "name=run"], FaultyOs(at, fault))
            # The same command without the fault must complete the run.
            survived = code in (0, 1, 9) and train_in_fork([*tiny, "name=run"]) == 0
            if not survived or not is_identical(folder / "straight", folder / "run"):
                lost += 1
        yield f"a call that writes: {fault}", len(tried), lost
    shutil.rmtree(folder / "run", ignore_errors=True)


def damaged(content: bytes) -> list[bytes]:
    """A file with a flipped bit, cut, empty, zeros, longer, or with another first page."""
    versions = []
    for place in (0, 0.05, 0.3, 0.5, 0.9, 1):
        flipped = bytearray(content)
        flipped[int(place * (len(content) - 1))] ^= 1
        versions.append(bytes(flipped))
    size = len(content)
    return [*versions, content[:-1], content[: size // 2], b"", bytes(size), content + b"\0",
            bytes(min(4096, size)) + content[4096:]]


def damages(folder: Path, settings: TortureSettings) -> Iterator[Result]:
    """Damage the last checkpoint; the one before it must give the same run."""
    long, run = folder / "long", folder / "run"
    train_in_fork([*TINY, f"runs_dir={folder}", "name=long"])
    last = max(long.glob("checkpoints/step_*")).relative_to(long)
    for name in (*FILES, MANIFEST):
        lost = 0
        tried = damaged((long / last / name).read_bytes())[:: settings.every]
        for content in tried:
            shutil.copytree(long, run)
            (run / last / name).write_bytes(content)
            code = train_in_fork([*TINY, f"runs_dir={folder}", "name=run"])
            if code != 0 or not is_identical(long, run):
                lost += 1
            shutil.rmtree(run)
        yield f"damaged: {name}", len(tried), lost


def full_disks(folder: Path, settings: TortureSettings) -> Iterator[Result]:
    """Train on a file system that has no more space, or no more files, from some step on."""
    tiny = [*TINY, "training.max_steps=400"]
    finish(tiny, folder / "straight_400")
    mount = folder / "mount"
    for resource, options in (("space", "size=6m"), ("files", "size=64m,nr_inodes=40")):
        # Without permission to mount, this is left out.
        mount.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", mount],
                                 capture_output=True)
        if mounted.returncode:
            mount.rmdir()
            print(f"  a file system without free {resource}: not tried, mounting is not permitted")
            continue
        try:
            lost = not survives_full_disk(tiny, mount, folder / "straight_400")
        finally:
            subprocess.run(["umount", mount], check=True)
            mount.rmdir()
        yield f"a file system without free {resource}", 1, int(lost)


def survives_full_disk(overrides: list[str], mount: Path, straight: Path) -> bool:
    """Fill the file system `mount` during a training, then free it and train to the end."""
    # Fill the disk after some steps; the training ends with an error.
    run = mount / "run"
    with verify_resume.start(overrides, run) as process:
        while process.poll() is None and verify_resume.last_recorded_step(run) < 20:
            time.sleep(0.01)
        fill(mount / "ballast")
        printed = process.communicate()[0]

    # The message and whole checkpoints must be there, and the run must resume.
    reported = "steps are saved" in printed and "of free disk space" in printed
    kept = store.list_checkpoints(run / "checkpoints")
    for one in kept:
        one.verify()
    shutil.rmtree(mount / "ballast")
    finish(overrides, run)
    return process.returncode == 1 and reported and bool(kept) and is_identical(straight, run)


def fill(folder: Path) -> None:
    """Use up the space of a file system, then its files."""
    folder.mkdir()
    for size in (2**16, 1, 0):
        with contextlib.suppress(OSError):
            for number in range(10**6):
                (folder / f"{size}-{number}").write_bytes(b"x" * size)


def kills(folder: Path, settings: TortureSettings) -> Iterator[Result]:
    """Kill whole programs at random moments and during saves."""
    share, rest = divmod(settings.kills, len(KILLED))
    for number, (name, overrides) in enumerate(KILLED.items()):
        count = share + (number < rest)
        if count:
            words = [*TINY, *overrides]
            straight, killed = folder / f"straight_{number}", folder / f"killed_{number}"
            finish(words, straight)
            in_saves, _ = verify_resume.train_under_kills(words, killed, count, max_steps=40)
            lost = not is_identical(straight, killed)
            yield f"kill -9, {in_saves} during a save: {name}", count, int(lost)
