"""From settings to the run they mean: its folder, held; where it stands; the device and the ways it began with.

The same run goes on. Another one is told apart, and named or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from conf.identity import differences, flat, identity_differences, in_short, listed
from conf.schema import Settings, folder_name, rebuild
from data.prepare import prepare
from data.shards import read_meta
from model import GPT, GPTConfig, Undrawn
from terminal import say
from training import checkpoint, shelf
from training.checkpoint import Checkpoint
from training.config import TrainingConfig
from training.device import Device, Environment, available
from training.run import Run, check_contents


@contextmanager
def open_run(settings: Settings, prepared: Path) -> Iterator[tuple[Run, Settings, Checkpoint | None]]:
    """Hold the run's folder; give it, the settings as they hold in it, and its last checkpoint if it has one.

    A folder that holds another run is refused with a ValueError that lists the differences, or, where no name was
    given, left alone for a folder that is named by them. With `restart` the run that is there is moved aside.
    """
    name, restart = settings.name or settings.auto_name, settings.restart
    while True:
        folder = Path(settings.runs_dir) / name
        with Run(folder) as run:
            run.sweep()
            last, changes = look_into(run, settings, prepared)
            if restart and run.has_content() and (settings.name or not changes):
                run.move_aside()
                say(f"{folder} is now {run.folder}.")
                restart = False
                continue
            if not changes:
                yield run, as_it_began(replace(settings, name=name), last), last
                return
        if settings.name:
            raise another_run(folder, name, changes)
        name = folder_name("-".join([name, *in_short(changes)]))
        say(f"{folder} holds a run with other settings ({listed(changes)}): this one goes to {folder.with_name(name)}.")


def look_into(run: Run, settings: Settings, prepared: Path) -> tuple[Checkpoint | None, dict[str, tuple[Any, Any]]]:
    """The run's last checkpoint, and how its identity differs from that of `settings`.

    Raises ValueError if checkpoints are there and none is whole, unless the run is to begin anew.
    """
    def load(one: Checkpoint) -> Checkpoint:
        if not changes_since(one, settings, prepared):  # of another run, the large files are not read
            one.verify(most_bytes=largest_file(settings.model))
        return one

    try:
        last = shelf.choose(run.checkpoints, "last", load, warn=say, set_aside=True)
        return last, changes_since(last, settings, prepared) if last else {}
    except ValueError:
        if settings.restart:
            return None, {}
        raise


def changes_since(one: Checkpoint, settings: Settings, prepared: Path) -> dict[str, tuple[Any, Any]]:
    """How the identity of a run with these settings differs from that of the run that saved `one`."""
    held = as_it_began(settings, one)
    began = flat(asdict(Settings())) | flat(one.state["settings"])  # what is newer than the run was at its default
    return identity_differences(began, identity(held, prepared, held.training.precision))


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether `folder` holds the run of these settings and it has nothing left to do. Changes nothing there.

    Raises ValueError with the differences if it holds another run.
    """
    check_contents(folder)
    saved = shelf.find(folder / "checkpoints")
    if not saved or settings.restart:
        return False
    try:
        prepared = prepare(settings.data)
    except (ValueError, OSError):  # for the run itself to say
        return False
    learned = replace(settings, model=replace(settings.model, vocab_size=read_meta(prepared)["vocab_size"]))
    if changes := changes_since(saved[-1], learned, prepared):
        raise another_run(folder, folder.name, changes)
    return bool(limit_reached(settings.training, saved[-1]))


def limit_reached(limits: TrainingConfig, last: Checkpoint) -> str:
    """The limit that ended the run at its last checkpoint, if one did."""
    return limits.reached(last.step, last.state["seconds"], last.state["stale_evaluations"])


def another_run(folder: Path, name: str, changes: dict[str, tuple[Any, Any]]) -> ValueError:
    return ValueError(f"{folder} holds a run with other settings: {listed(changes)}. Choose another name=, or begin anew "
                      f"with restart=true (what is there stays, as {name}.old), or keep the old settings.")


def largest_file(config: GPTConfig) -> int:
    """The bytes that no file of a checkpoint can pass: AdamW's two moments, or the largest tokenizer."""
    with Undrawn("meta"):
        parameters = sum(weights.numel() for weights in GPT(config).parameters())
    return 8 * parameters + 2**24


def identity(settings: Settings, prepared: Path, precision: str) -> dict[str, Any]:
    """The settings as a checkpoint keeps them, with the tokens and the precision that they came to."""
    values = asdict(settings)
    meta = read_meta(prepared)
    values["data"] |= {"prepared": meta["fingerprint"][:12], "tokenizer_fingerprint": meta["tokenizer_fingerprint"][:12]}
    values["training"]["precision"] = precision
    return values


def as_it_began(settings: Settings, last: Checkpoint | None) -> Settings:
    """In a run that goes on, 'auto' is what it was when the run began."""
    if not last:
        return settings
    began = environment_of(last)
    was = {"precision": began.precision, "compile": str(began.compiled).lower(),
           "device": began.device if available()[began.device] else "auto"}
    auto = {name: value for name, value in was.items() if getattr(settings.training, name) == "auto"}
    return replace(settings, training=replace(settings.training, **auto))


def environment_of(saved: Checkpoint) -> Environment:
    return rebuild(Environment, saved.state["environment"], f"{saved.folder / checkpoint.STATE}, environment")


def open_device(run: Run, settings: Settings, last: Checkpoint | None) -> Device:
    """The device, with the threads that the run began with.

    Raises ValueError where anything else would change the last bits of its results, unless `allow_drift` is set.
    """
    limits = settings.training
    set_by = "as when the run began" if last else "as set"
    device = Device(limits.device, limits.precision, limits.deterministic, set_by)
    if last and not settings.allow_drift:
        began = environment_of(last)
        torch.set_num_threads(began.threads)
        if drift := differences(asdict(began), asdict(device.environment(limits.compile == "true"))):
            raise ValueError(f"{run.folder} would not go on with the same bits here: {listed(drift)}. Go on where it began, "
                             f"or here with allow_drift=true, which lets the last bits differ from now on.")
    return device
