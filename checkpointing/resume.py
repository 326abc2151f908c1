"""Decides whether a command starts a run, resumes it, finds it finished, or is refused.

Also chooses the tokens and the device that the run was started with. docs/runs.md has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from checkpointing import checkpoint, store
from checkpointing.checkpoint import Checkpoint
from checkpointing.initial import with_shape_of_weights
from checkpointing.provenance import compiled_at_last_start
from checkpointing.run_folder import Run, check_file_types
from conf.convert import rebuild
from conf.identity import (
    OF_THE_TOKENS,
    Changes,
    differences,
    flat,
    identity_differences,
    in_short,
    listed,
)
from conf.schema import folder_name
from conf.settings import Settings
from data.config import DataConfig
from data.prepare import find_prepared, planned, prepare
from data.shards import read_meta
from model import GPT, GPTConfig, SkipInit
from terminal import counted, say
from training.config import TrainingConfig
from training.device import Device, Environment, available
from training.distributed import World


def with_initial_weights(settings: Settings) -> tuple[Settings, list[str]]:
    """The settings with the shape of the weights to start from, and messages about the weights.

    A run that resumes does not need the weights. Raises ValueError for weights that are invalid or
    contradict the settings.
    """
    return with_shape_of_weights(settings, last_checkpoint(settings.folder, settings))


def prepared_tokens(settings: Settings, warn: Callable[[str], None] = say) -> Path:
    """The folder of the prepared tokens to train on; prepares them if necessary.

    Raises ValueError and OSError as `prepare` does.
    """
    return tokens_of_changed_text(settings, warn) or prepare(settings.data)


def tokens_of_changed_text(settings: Settings, warn: Callable[[str], None]) -> Path | None:
    """The tokens in the run's checkpoint if its text has changed since, or cannot be read.

    Passes a message to `warn`. None if the run is to use its text as it is now: it has no
    checkpoint, other settings or no tokens left, or it has no name and is finished.
    """
    # Only a run that resumes, with the same source, has tokens to keep.
    folder = settings.folder
    last = last_checkpoint(folder, settings)
    if last is None or not has_same_source(settings, last):
        return None

    # Has the text changed since the run began?
    fingerprint = str(flat(last.state["settings"]).get("data.prepared"))
    current = ""
    try:
        found = already_prepared(settings.data)
        if found:
            current = read_meta(found)["fingerprint"]
        problem = f"The text of {folder}, or how it is prepared, has changed"
    except (ValueError, OSError) as error:
        problem = f"The text of {folder} cannot be read ({str(error).rstrip('.')})"
    if current.startswith(fingerprint):
        return None

    # The old tokens are used if they still exist and nothing else has changed.
    kept = find_prepared(fingerprint)
    if kept is None or changes_since(last, with_vocab_size(settings, kept), kept):
        return None

    # Without a name, the changed text can be another run.
    if not settings.name:
        # The new text gets a run of its own, unless the old run is unfinished and comes first.
        new = folder.with_name(f"{folder.name}-prepared={current[:12]}")
        if limit_reached(settings.training, last):
            return None
        if current and store.list_checkpoints(new / "checkpoints"):
            return None
    warn(f"{problem}. The run resumes with the tokens it was trained on ({kept}). To train on the "
         f"text as it is now, use another name=, or pass restart=true.")
    return kept


def last_checkpoint(folder: Path, settings: Settings) -> Checkpoint | None:
    """The newest checkpoint in a folder; None if there is none, or the run is to start over."""
    check_file_types(folder)
    try:
        found = store.list_checkpoints(folder / "checkpoints")
    except ValueError:
        if settings.restart:
            return None
        raise
    if not found:
        return None
    if settings.restart and not is_unfinished_restart(found[-1], settings.training):
        return None
    return found[-1]


def is_unfinished_restart(last: Checkpoint, training: TrainingConfig) -> bool:
    """Whether restart=true started the run and it is unfinished: then the same command resumes."""
    if limit_reached(training, last) or last.step >= last.state["max_steps"]:
        return False
    return last.state["settings"].get("restart") is True


def has_same_source(settings: Settings, last: Checkpoint) -> bool:
    """Whether all data settings, including the path, are those of the checkpoint."""
    before = saved_settings(last)
    now = flat(asdict(settings))
    return all(before[key] == now[key] for key in now if key.startswith("data."))


def already_prepared(config: DataConfig) -> Path | None:
    """The folder of the tokens of the text as it is now; None if they are not prepared yet."""
    if config.source == "bin" and not config.mix:
        return prepare(config)
    folder = planned(config).folder
    return folder if folder.is_dir() else None


def with_vocab_size(settings: Settings, prepared: Path) -> Settings:
    vocab_size = read_meta(prepared)["vocab_size"]
    return replace(settings, model=replace(settings.model, vocab_size=vocab_size))


@contextmanager
def start_or_resume(settings: Settings,
                    prepared: Path) -> Iterator[tuple[Run, Settings, Checkpoint | None]]:
    """Lock the run folder; yield it, the settings with every `auto` resolved, the last checkpoint.

    If the folder holds a different run, raises ValueError with the differences, or without `name=`
    uses a folder that is named by them. `restart` renames the existing run, once: a run that it
    started is resumed until it is finished.
    """
    name, restart = settings.name or settings.auto_name, settings.restart
    while True:
        folder = Path(settings.runs_dir) / name
        with Run(folder) as run:
            run.remove_partial()
            last, changes = load_last(run, settings, prepared)

            # Start over: rename the folder, and begin again with an empty one.
            starts_over = restart and run.has_checkpoints() and (settings.name or not changes)
            has_started_over = (last is not None and not changes
                                and is_unfinished_restart(last, settings.training))
            if starts_over and not has_started_over:
                run.rename_to_old()
                say(f"{folder} was renamed to {run.folder}.")
                restart = False
                continue
            if starts_over:
                say(f"{folder} was started over by restart=true and is not finished: it resumes. "
                    f"To start over again, rename or delete that folder.")

            # Start the run, or resume it.
            if not changes:
                yield run, resolve_auto(replace(settings, name=name), folder, last), last
                return

        # The folder holds a different run: refuse it, or add the differences to the name.
        if settings.name:
            raise different_settings(folder, changes)
        name = folder_name("-".join([name, *in_short(changes)]))
        say(f"{folder} was trained with different settings: {listed(changes)}. "
            f"This run uses {folder.with_name(name)}.")


def open_run(settings: Settings, prepared: Path, world: World,
             stack: ExitStack) -> tuple[Run, Settings, Checkpoint | None]:
    """Lock the run's folder in the first process; return its settings and checkpoint in all."""
    runs = []

    def lock() -> tuple[Settings, Checkpoint | None]:
        run, resolved, last = stack.enter_context(start_or_resume(settings, prepared))
        runs.append(run)
        return resolved, last

    resolved, last = world.first(lock)
    return world.only_first(runs.pop), resolved, last


def load_last(run: Run, settings: Settings, prepared: Path) -> tuple[Checkpoint | None, Changes]:
    """The last checkpoint, verified, and how the settings differ from its settings.

    Raises ValueError if all checkpoints are damaged, unless the run is to start over.
    """
    def load(one: Checkpoint) -> Checkpoint:
        # The large files of a different run are not read.
        if not changes_since(one, settings, prepared):
            one.verify(max_bytes=max_file_bytes(settings.model))
        return one

    try:
        last = store.load_checkpoint(run.checkpoints, "last", load, warn=say, rename_damaged=True)
    except ValueError:
        if settings.restart:
            return None, {}
        raise
    if last is None:
        return None, {}
    return last, changes_since(last, settings, prepared)


def changes_since(one: Checkpoint, settings: Settings, prepared: Path) -> Changes:
    """The settings that make this a different run from the one that saved the checkpoint."""
    resumed = resolve_auto(settings, one.folder.parent.parent, one)
    now = settings_to_save(resumed, prepared, resumed.training.precision)
    return identity_differences(saved_settings(one), now)


def saved_settings(one: Checkpoint) -> dict[str, Any]:
    """The flat settings of a checkpoint; settings that were added later have their defaults."""
    return flat(asdict(Settings())) | flat(one.state["settings"])


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether the run with these settings is in `folder` and finished. Changes nothing.

    Raises ValueError with the differences if the folder holds a different run.
    """
    check_file_types(folder)
    saved = store.list_checkpoints(folder / "checkpoints")
    if not saved or settings.restart:
        return False
    # The shape of the model and the tokens, as the run itself would choose them.
    in_place = replace(settings, name=folder.name, runs_dir=str(folder.parent))
    try:
        settings, _ = with_initial_weights(in_place)
        prepared = prepared_tokens(settings, warn=lambda text: None)
    except (ValueError, OSError):
        # The run itself reports this error.
        return False
    changes = changes_since(saved[-1], with_vocab_size(settings, prepared), prepared)
    if changes:
        raise different_settings(folder, changes)
    return limit_reached(settings.training, saved[-1]) != ""


def limit_reached(training: TrainingConfig, last: Checkpoint) -> str:
    """The limit that ended the run at its last checkpoint; empty if it is unfinished."""
    return training.reached(last.step, last.state["seconds"], last.state["stale_evaluations"])


def different_settings(folder: Path, changes: Changes) -> ValueError:
    """The error for a folder that holds a run with other settings, or of another text."""
    restore = "restore the old value" if len(changes) == 1 else "restore the old values"
    if changes.keys() <= set(OF_THE_TOKENS):
        restore = "restore the old text (the tokens that were prepared from it are gone)"
    return ValueError(
        f"{folder} was trained with different settings: {listed(changes)}. Use another name=, "
        f"{restore}, or pass restart=true to start over (the old run is kept as {folder}.old).")


def max_file_bytes(config: GPTConfig) -> int:
    """The bound on any file of a checkpoint: the two moments of AdamW, and the tokenizer."""
    with SkipInit("meta"):
        parameters = sum(weights.numel() for weights in GPT(config).parameters())
    return 8 * parameters + checkpoint.MAX_BYTES[checkpoint.TOKENIZER]


def settings_to_save(settings: Settings, prepared: Path, precision: str) -> dict[str, Any]:
    """The settings for a checkpoint, with the fingerprints of the tokens and the precision used."""
    values = asdict(settings)
    meta = read_meta(prepared)
    values["data"]["prepared"] = meta["fingerprint"][:12]
    values["data"]["tokenizer_fingerprint"] = meta["tokenizer_fingerprint"][:12]
    values["training"]["precision"] = precision
    return values


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


def saved_environment(saved: Checkpoint) -> Environment:
    place = f"{saved.folder / checkpoint.STATE}, environment"
    return rebuild(Environment, saved.state["environment"], place)


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
    # The numbers of threads and processes may change. Older checkpoints do not record native_bf16.
    expected = replace(saved, threads=threads, world_size=here.world_size)
    if saved.native_bf16 is None:
        expected = replace(expected, native_bf16=here.native_bf16)
    drift = differences(asdict(expected), asdict(here))
    if drift:
        raise ValueError(
            f"{run.folder} would not be bit-identical on this machine: {listed(drift)}. Resume it "
            f"where it was started, or pass allow_drift=true to accept different last bits.")
    return device
