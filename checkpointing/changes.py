"""Compare the settings of a command with those of a run's checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpointing import store
from checkpointing.checkpoint import Checkpoint
from checkpointing.environment import resolve_auto
from checkpointing.run_folder import check_file_types
from conf.identity import OF_THE_TOKENS, Changes, flat, identity_differences, listed
from conf.settings import Settings
from data.shards import read_meta
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
