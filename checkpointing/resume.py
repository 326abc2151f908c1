"""From settings to a run: its tokens, its locked folder, its last checkpoint, and the device it began on.

The same settings resume their run. A run with other settings is named differently or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from checkpointing import checkpoint, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.provenance import compiled_at_last_start
from checkpointing.run_folder import Run, check_file_types
from conf.convert import rebuild
from conf.identity import OF_THE_TOKENS, differences, flat, identity_differences, in_short, listed
from conf.schema import folder_name
from conf.settings import Settings
from data.prepare import find_prepared, planned, prepare
from data.shards import read_meta
from data.sources import DataConfig
from model import GPT, GPTConfig, Undrawn
from terminal import counted, say
from training.config import TrainingConfig
from training.device import Device, Environment, available


def prepared_tokens(settings: Settings, warn: Callable[[str], None] = say) -> Path:
    """The folder of prepared tokens to train on; made now if it is not there.

    A run resumes with the tokens that its checkpoint names, also when its text has changed since, or cannot be read:
    then `warn` gets a sentence. Without a name, only an unfinished run does. Raises ValueError and OSError as `prepare`.
    """
    folder = Path(settings.runs_dir) / (settings.name or settings.auto_name)
    last = last_saved(folder, settings)
    if last is None or not same_source(settings, last):
        return prepare(settings.data)
    fingerprint = str(flat(last.state["settings"]).get("data.prepared"))
    try:
        now = prepared_already(settings.data)
        reason = "was changed"
    except (ValueError, OSError) as error:
        now, reason = None, f"cannot be read ({str(error).rstrip('.')})"
    if now and read_meta(now)["fingerprint"].startswith(fingerprint):
        return prepare(settings.data)
    kept = find_prepared(fingerprint)
    if kept is None or changes_since(last, with_vocabulary(settings, kept), kept):
        return prepare(settings.data)
    if not settings.name:
        # Another text is another run, whose name says so. An unfinished run comes first, unless that one exists.
        changed = now and folder.with_name(f"{folder.name}-prepared={read_meta(now)['fingerprint'][:12]}")
        if limit_reached(settings.training, last) or (changed and store.list_checkpoints(changed / "checkpoints")):
            return prepare(settings.data)
    warn(f"The text of {folder}, or how it is prepared, {reason} since the run began. The run uses the tokens it was "
         f"trained on ({kept}). To train on the text as it is now, choose another name=, or pass restart=true.")
    return kept


def last_saved(folder: Path, settings: Settings) -> Checkpoint | None:
    """The newest checkpoint of a run that these settings would not start over; None if there is none."""
    check_file_types(folder)
    try:
        found = store.list_checkpoints(folder / "checkpoints")
    except ValueError:
        if settings.restart:
            return None
        raise
    if not found or (settings.restart and not began_by_restart(found[-1], settings.training)):
        return None
    return found[-1]


def began_by_restart(last: Checkpoint, limits: TrainingConfig) -> bool:
    """Whether a run that restart=true started over is unfinished, so that the same command resumes it."""
    finished = limit_reached(limits, last) or last.step >= last.state["max_steps"]
    return last.state["settings"].get("restart") is True and not finished


def same_source(settings: Settings, last: Checkpoint) -> bool:
    """Whether the settings name the same data as those of a checkpoint, its path included."""
    began = flat(asdict(Settings())) | flat(last.state["settings"])
    return all(began[key] == value for key, value in flat(asdict(settings)).items() if key.startswith("data."))


def prepared_already(config: DataConfig) -> Path | None:
    """Where the tokens of the source lie, as it is now; None if they are not prepared yet."""
    if config.source == "bin" and not config.mix:
        return prepare(config)  # which takes them as they are
    folder = planned(config).folder
    return folder if folder.is_dir() else None


def with_vocabulary(settings: Settings, prepared: Path) -> Settings:
    return replace(settings, model=replace(settings.model, vocab_size=read_meta(prepared)["vocab_size"]))


@contextmanager
def open_run(settings: Settings, prepared: Path) -> Iterator[tuple[Run, Settings, Checkpoint | None]]:
    """Hold the run's folder; give it, the settings as they hold in it, and its last checkpoint if it has one.

    A folder that holds another run is refused with a ValueError that lists the differences, or, where no name was
    given, left alone for a folder that is named by them. With `restart` the run that is there is moved aside, once: an
    unfinished run that was begun so is resumed.
    """
    name, restart = settings.name or settings.auto_name, settings.restart
    while True:
        folder = Path(settings.runs_dir) / name
        with Run(folder) as run:
            run.remove_partial()
            last, changes = look_into(run, settings, prepared)
            if restart and run.has_checkpoints() and (settings.name or not changes):
                if last and not changes and began_by_restart(last, settings.training):
                    say(f"{folder} was started over by restart=true and is not finished: it resumes. To start over once "
                        f"more, rename or delete that folder first.")
                else:
                    run.rename_to_old()
                    say(f"{folder} is now {run.folder}.")
                    restart = False
                    continue
            if not changes:
                settings = replace(settings, name=name)
                yield run, as_it_began(settings, last) if last else as_it_started(settings, folder), last
                return
        if settings.name:
            raise another_run(folder, name, changes)
        name = folder_name("-".join([name, *in_short(changes)]))
        say(f"{folder} was trained with other settings ({listed(changes)}): this run goes to {folder.with_name(name)}.")


def look_into(run: Run, settings: Settings, prepared: Path) -> tuple[Checkpoint | None, dict[str, tuple[Any, Any]]]:
    """The run's last checkpoint, and how its identity differs from that of `settings`.

    Raises ValueError if checkpoints are there and none is whole, unless the run is to start over.
    """
    def load(one: Checkpoint) -> Checkpoint:
        if not changes_since(one, settings, prepared):  # of another run, the large files are not read
            one.verify(most_bytes=max_file_bytes(settings.model))
        return one

    try:
        last = store.load_checkpoint(run.checkpoints, "last", load, warn=say, rename_damaged=True)
        return last, changes_since(last, settings, prepared) if last else {}
    except ValueError:
        if settings.restart:
            return None, {}
        raise


def changes_since(one: Checkpoint, settings: Settings, prepared: Path) -> dict[str, tuple[Any, Any]]:
    """How the identity of a run with these settings differs from that of the run that saved `one`."""
    held = as_it_began(settings, one)
    began = flat(asdict(Settings())) | flat(one.state["settings"])  # what is newer than the run was at its default
    return identity_differences(began, settings_to_save(held, prepared, held.training.precision))


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether `folder` holds the run of these settings and it has nothing left to do. Changes nothing there.

    Raises ValueError with the differences if it holds another run.
    """
    check_file_types(folder)
    saved = store.list_checkpoints(folder / "checkpoints")
    if not saved or settings.restart:
        return False
    in_place = replace(settings, name=folder.name, runs_dir=str(folder.parent))
    try:
        prepared = prepared_tokens(in_place, warn=lambda text: None)
    except (ValueError, OSError):  # for the run itself to say
        return False
    if changes := changes_since(saved[-1], with_vocabulary(settings, prepared), prepared):
        raise another_run(folder, folder.name, changes)
    return bool(limit_reached(settings.training, saved[-1]))


def limit_reached(limits: TrainingConfig, last: Checkpoint) -> str:
    """The limit that ended the run at its last checkpoint, if one did."""
    return limits.reached(last.step, last.state["seconds"], last.state["stale_evaluations"])


def another_run(folder: Path, name: str, changes: dict[str, tuple[Any, Any]]) -> ValueError:
    """The refusal of a run whose identity differs. A text of which the old tokens are gone needs other advice."""
    only_text = changes.keys() <= set(OF_THE_TOKENS)
    back = "put the old text back: the tokens prepared from it are gone" if only_text else "restore the old settings"
    return ValueError(f"{folder} was trained with other settings: {listed(changes)}. Use another name=, or {back}, or pass "
                      f"restart=true to start over (the run is kept as {name}.old).")


def max_file_bytes(config: GPTConfig) -> int:
    """The bytes that no file of a checkpoint can pass: AdamW's two moments, or the largest tokenizer."""
    with Undrawn("meta"):
        parameters = sum(weights.numel() for weights in GPT(config).parameters())
    return 8 * parameters + 2**24


def settings_to_save(settings: Settings, prepared: Path, precision: str) -> dict[str, Any]:
    """The settings as a checkpoint keeps them, with the tokens and the precision that they came to."""
    values = asdict(settings)
    meta = read_meta(prepared)
    values["data"] |= {"prepared": meta["fingerprint"][:12], "tokenizer_fingerprint": meta["tokenizer_fingerprint"][:12]}
    values["training"]["precision"] = precision
    return values


def as_it_began(settings: Settings, last: Checkpoint | None) -> Settings:
    """The settings as a resumed run has them: 'auto' is what it was when the run began."""
    if not last:
        return settings
    began = environment_of(last)
    was = {"precision": began.precision, "compile": str(began.compiled).lower(),
           "device": began.device if available()[began.device] else "auto"}
    auto = {name: value for name, value in was.items() if getattr(settings.training, name) == "auto"}
    return replace(settings, training=replace(settings.training, **auto))


def as_it_started(settings: Settings, folder: Path) -> Settings:
    """The settings of a run without a checkpoint: compile=auto is what an earlier start of it decided."""
    compiled = compiled_at_last_start(folder)
    if compiled is None or settings.training.compile != "auto":
        return settings
    return replace(settings, training=replace(settings.training, compile=str(compiled).lower()))


def environment_of(saved: Checkpoint) -> Environment:
    return rebuild(Environment, saved.state["environment"], f"{saved.folder / checkpoint.STATE}, environment")


def open_device(run: Run, settings: Settings, last: Checkpoint | None) -> Device:
    """The device, with the threads that are set, or else those that the run began with.

    Raises ValueError where anything else would change the last bits of its results, unless `allow_drift` is set.
    """
    limits = settings.training
    set_by = "as when the run began" if last else "as set"
    began = environment_of(last) if last and not settings.allow_drift else None
    threads = limits.threads or (began.threads if began else 0)
    device = Device(limits.device, limits.precision, limits.deterministic, set_by, threads)
    if began:
        if limits.threads and limits.threads != began.threads:
            say(f"Resuming with {counted(limits.threads, 'thread')} instead of {began.threads}: the last bits of the "
                f"results may differ from here on.")
            began = replace(began, threads=limits.threads)
        here = device.environment(limits.compile == "true")
        if began.native_bf16 is None:
            began = replace(began, native_bf16=here.native_bf16)
        if drift := differences(asdict(began), asdict(here)):
            raise ValueError(f"{run.folder} would not go on with the same bits here: {listed(drift)}. Go on where it began, "
                             f"or here with allow_drift=true, which lets the last bits differ from now on.")
    return device
