"""The device, precision and threads that a run was started with, which it keeps when it resumes."""

from dataclasses import asdict, replace
from pathlib import Path

from checkpointing.checkpoint import Checkpoint
from checkpointing.provenance import compiled_at_last_start
from checkpointing.run_folder import Run
from checkpointing.spec import STATE
from conf.convert import rebuild
from conf.identity import differences, listed
from conf.settings import Settings
from terminal import counted, say
from training.device import Device, Environment, available


def resolve_auto(settings: Settings, folder: Path, last: Checkpoint | None) -> Settings:
    """Replace `auto` by the value that was chosen when the run was started."""
    # From the checkpoint; before the first one, from the record of the last start.
    known = {}
    if last:
        saved = saved_environment(last)
        compiled = saved.compiled
        known["precision"] = saved.precision
        if available()[saved.device]:
            known["device"] = saved.device
    else:
        compiled = compiled_at_last_start(folder)
    if compiled is not None:
        known["compile"] = str(compiled).lower()
    # A setting that the user gave is not replaced.
    values = {name: value for name, value in known.items()
              if getattr(settings.training, name) == "auto"}
    return replace(settings, training=replace(settings.training, **values))


def open_device(run: Run, settings: Settings, last: Checkpoint | None) -> Device:
    """The device, with the number of threads in the settings, or that the run was started with.

    Raises ValueError if the result would not be bit-identical, unless `allow_drift` is set.
    """
    training = settings.training
    saved = None if settings.allow_drift or not last else saved_environment(last)
    # The number of threads decides the order of sums, so a resumed run keeps it.
    threads = training.threads
    if saved and not threads:
        threads = saved.threads
    chosen_by = "as when the run began" if last else "as set"
    device = Device(training.device, training.precision, training.deterministic, chosen_by, threads)
    if not saved:
        return device
    if threads != saved.threads:
        say(f"Resuming with {counted(threads, 'thread')} instead of {saved.threads}: the result is "
            f"not bit-identical from here on.")

    # All else that decides the last bits must be as it was.
    here = device.environment(training.compile == "true")
    # The numbers of threads and processes may change.
    expected = replace(saved, threads=threads, world_size=here.world_size)
    drift = differences(asdict(expected), asdict(here))
    if drift:
        raise ValueError(
            f"{run.folder} would not be bit-identical on this machine: {listed(drift)}. Resume it "
            f"where it was started, or pass allow_drift=true to accept different last bits.")
    return device


def saved_environment(saved: Checkpoint) -> Environment:
    """The device environment of a checkpoint. Raises ValueError if it is invalid."""
    return rebuild(Environment, saved.state["environment"], f"{saved.folder / STATE}, environment")
