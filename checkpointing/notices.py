"""Messages about a run that resumes or has ended: what changes, and how to train further."""

from __future__ import annotations

from checkpointing.checkpoint import Checkpoint
from checkpointing.state import State
from conf.identity import flat
from conf.schema import Settings
from terminal import counted
from training.schedule import extension


def how_to_continue(limit: str, settings: Settings, last: Checkpoint) -> str:
    """How to train a finished run further, and what that means for its learning rates."""
    if limit == "max_seconds":
        return "To train further, raise training.max_seconds."
    if limit == "patience":
        more = last.state["stale_evaluations"] + settings.training.patience
        return (f"It stopped early. To train further, raise training.patience, as in "
                f"training.patience={more}.")
    more = 2 * last.step
    planned, replanned = last.state["max_steps"], last.state["replanned"]
    return (f"To train further, raise training.max_steps, as in training.max_steps={more}. "
            + extension(last.step, settings.optim, planned, more, replanned))


def early_stop(state: State) -> str:
    """Why the run ended before `max_steps`, and which checkpoint is kept."""
    evaluations = counted(state.stale_evaluations, "evaluation")
    if state.best_val_loss is None:
        return f"Stopped early: the validation loss of the last {evaluations} was not finite."
    return (f"Stopped early: the validation loss was lowest, {state.best_val_loss:.4f}, "
            f"{evaluations} ago. The checkpoint from then is kept (checkpoint=best), and the last.")


def changed_batch_size(settings: Settings, last: Checkpoint) -> str:
    """The effect of resuming with another micro-batch size; empty if it is the same."""
    now = settings.training.batch_size
    before = flat(last.state["settings"]).get("training.batch_size")
    if before in (None, now):
        return ""
    dropout = ""
    if settings.model.dropout > 0:
        dropout = " and dropout draws different numbers"
    return (f"Resuming with micro-batches of {now} sequences instead of {before}: each step trains "
            f"on the same sequences as before, but sums are rounded in another order{dropout}, so "
            f"the result is not bit-identical.")
