"""Where a run stands: all that training changes, to and from a checkpoint. What is not in here is a function of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from checkpointing.checkpoint import MODEL, OPTIMIZER, STATE, Checkpoint, DamagedCheckpoint, Snapshot
from training.optim import Optimizers


@dataclass
class State:
    """The weights, what the optimizers and the loss scaler remember, and how far things are."""

    model: nn.Module
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    step: int = 0  # steps taken
    seconds: float = 0.0  # of training
    batches_skipped: int = 0  # those that a rollback stepped over
    nonfinite: int = 0  # how often a loss or gradient was not finite
    replanned: bool = False  # whether learning rates so far were those of another max_steps
    best_val_loss: float | None = None  # the lowest of the evaluations that were due
    stale_evaluations: int = 0  # evaluations since then

    @property
    def batch(self) -> int:
        """Which of the loader's steps comes next."""
        return self.step + self.batches_skipped

    def snapshot(self, val_loss: float | None, scheduled: bool, tokenizer: dict[str, Any],
                 facts: dict[str, Any]) -> Snapshot:
        """This moment. `facts` are what training does not change: the settings, the model's shape, the environment."""
        state = {"step": self.step, "seconds": self.seconds, "batches_skipped": self.batches_skipped,
                 "nonfinite": self.nonfinite, "replanned": self.replanned, "scheduled": scheduled,
                 "best_val_loss": self.best_val_loss, "stale_evaluations": self.stale_evaluations,
                 "scaler": self.scaler.state_dict(),
                 "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None} | facts
        return Snapshot(self.model.state_dict(), self.optimizers.tensors(), tokenizer, state)

    def nbytes(self) -> int:
        """The size of a checkpoint."""
        return sum(tensor.nbytes for tensor in (*self.model.state_dict().values(), *self.optimizers.tensors().values()))

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a moment. Raises DamagedCheckpoint, changing nothing, if it does not fit this model."""
        scaler = saved.state["scaler"]
        if not fits(scaler, self.scaler.state_dict()):
            raise DamagedCheckpoint(f"{saved.folder / STATE} holds no state of this run's loss scaler")
        weights = saved.load_tensors(MODEL, self.model.state_dict())
        remembered = saved.load_tensors(OPTIMIZER, self.optimizers.tensors())
        self.model.load_state_dict(weights)
        self.optimizers.load_tensors(remembered)
        self.scaler.load_state_dict(scaler)
        self.step, self.seconds = saved.step, saved.state["seconds"]
        self.batches_skipped, self.nonfinite = saved.state["batches_skipped"], saved.state["nonfinite"]
        self.replanned = saved.state["replanned"]
        self.best_val_loss, self.stale_evaluations = saved.state["best_val_loss"], saved.state["stale_evaluations"]

    def note_evaluation(self, val_loss: float) -> None:
        """Count the evaluations since the lowest loss. One that is not finite is never the lowest."""
        if math.isfinite(val_loss) and (self.best_val_loss is None or val_loss < self.best_val_loss):
            self.best_val_loss, self.stale_evaluations = val_loss, 0
        else:
            self.stale_evaluations += 1

    def roll_back(self, saved: Checkpoint) -> None:
        """Go back to a moment with what is known now: step over all batches since then, the present one included."""
        reached, nonfinite, replanned = self.batch + 1, self.nonfinite, self.replanned
        self.restore(saved)
        self.batches_skipped, self.nonfinite, self.replanned = reached - self.step, nonfinite, replanned


def fits(scaler: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a loss scaler that is `own` now can have been in the state `scaler`: only its scale and its count change."""
    if not own:
        return not scaler
    scale, count = scaler.get("scale"), scaler.get("_growth_tracker")
    changing = {"scale": scale, "_growth_tracker": count}
    return (scaler | changing == own | changing and isinstance(scale, float) and 0 < scale < 2.0**64
            and type(count) is int and 0 <= count < 2**31)
