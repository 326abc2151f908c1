"""The prepared tokens of a run: of its text as it is now, or those that it was started with."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from checkpointing import store
from checkpointing.changes import changes_since, last_checkpoint, limit_reached, saved_settings
from checkpointing.checkpoint import Checkpoint
from conf.identity import flat
from conf.settings import Settings
from data.config import DataConfig
from data.prepare import find_prepared, planned, prepare
from data.shards import read_meta
from terminal import say


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
