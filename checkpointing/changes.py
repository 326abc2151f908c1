"""Compare the settings and the text of a command with those of a run's checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from checkpointing import store
from checkpointing.checkpoint import Checkpoint
from checkpointing.environment import resolve_auto
from checkpointing.run_folder import check_file_types
from conf.identity import OF_THE_TOKENS, Changes, flat, identity_differences, listed
from conf.settings import Settings
from data.config import DataConfig
from data.prepare import find_prepared, planned, prepare
from data.shards import read_meta
from terminal import say
from training.config import TrainingConfig


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


def limit_reached(training: TrainingConfig, last: Checkpoint) -> str:
    """The limit that ended the run at its last checkpoint; empty if it is unfinished."""
    return training.reached(last.step, last.state["seconds"], last.state["stale_evaluations"])


def changes_since(one: Checkpoint, settings: Settings, prepared: Path) -> Changes:
    """The settings that make this a different run from the one that saved the checkpoint."""
    # An `auto` stands for what was chosen when the run began.
    resumed = resolve_auto(settings, one.folder.parent.parent, one)
    now = settings_to_save(resumed, prepared, resumed.training.precision)
    return identity_differences(saved_settings(one), now)


def saved_settings(one: Checkpoint) -> dict[str, Any]:
    """The flat settings of a checkpoint; settings that were added later have their defaults."""
    return flat(asdict(Settings())) | flat(one.state["settings"])


def settings_to_save(settings: Settings, prepared: Path, precision: str) -> dict[str, Any]:
    """The settings for a checkpoint, with the fingerprints of the tokens and the precision used."""
    values = asdict(settings)
    meta = read_meta(prepared)
    # The text is identified by its tokens, wherever it is.
    values["data"]["prepared"] = meta["fingerprint"][:12]
    values["data"]["tokenizer_fingerprint"] = meta["tokenizer_fingerprint"][:12]
    values["training"]["precision"] = precision
    return values


def different_settings(folder: Path, changes: Changes) -> ValueError:
    """The error for a folder that holds a run with other settings, or of another text."""
    restore = "restore the old value" if len(changes) == 1 else "restore the old values"
    if changes.keys() <= set(OF_THE_TOKENS):
        restore = "restore the old text (the tokens that were prepared from it are gone)"
    return ValueError(
        f"{folder} was trained with different settings: {listed(changes)}. Use another name=, "
        f"{restore}, or pass restart=true to start over (the old run is kept as {folder}.old).")


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
    """The settings with the vocabulary of the prepared tokens."""
    vocab_size = read_meta(prepared)["vocab_size"]
    return replace(settings, model=replace(settings.model, vocab_size=vocab_size))
