"""Decides whether a command starts a run, resumes it, finds it finished, or is refused.

docs/runs.md has the rules.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from checkpointing import store
from checkpointing.changes import (
    changes_since,
    different_settings,
    is_unfinished_restart,
    limit_reached,
)
from checkpointing.checkpoint import MAX_BYTES, Checkpoint
from checkpointing.environment import resolve_auto
from checkpointing.initial import InitialWeights
from checkpointing.run_folder import Run, check_file_types
from checkpointing.spec import TOKENIZER
from checkpointing.tokens import prepared_tokens, with_vocab_size
from conf.identity import Changes, in_short, listed
from conf.schema import folder_name
from conf.settings import Settings
from model import GPT, GPTConfig
from terminal import say
from training.distributed import World


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


def max_file_bytes(config: GPTConfig) -> int:
    """The bound on any file of a checkpoint: the two moments of AdamW, and the tokenizer."""
    parameters = sum(weights.numel() for weights in GPT.empty(config).parameters())
    return 8 * parameters + MAX_BYTES[TOKENIZER]


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
        settings = InitialWeights().choose_settings(in_place)
        prepared = prepared_tokens(settings, warn=lambda text: None)
    except (ValueError, OSError):
        # The run itself reports this error.
        return False
    changes = changes_since(saved[-1], with_vocab_size(settings, prepared), prepared)
    if changes:
        raise different_settings(folder, changes)
    return limit_reached(settings.training, saved[-1]) != ""
