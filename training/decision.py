"""The decision after each step: evaluate, save, skip, roll back or stop.

Clocks and signals differ between processes. What the processes have agreed on is an argument here,
so all of them make the same decision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from training.config import TrainingConfig


@dataclass(frozen=True)
class Decision:
    """The actions after a step."""

    # "skip" and "rollback" answer a loss or gradient that is not finite; "stop" ends the run.
    action: Literal["continue", "skip", "rollback", "stop"] = "continue"
    interrupted: bool = False
    limit: str = ""  # the setting that ends the run here, if one does
    evaluate: bool = False
    save: bool = False

    @property
    def ends_run(self) -> bool:
        return self.interrupted or self.limit != ""

    def after_evaluation(self, training: TrainingConfig, stale_evaluations: int) -> Decision:
        """The decision once the validation loss is known: patience may end the run.

        With patience, a new lowest loss is saved, so that the best checkpoint exists.
        """
        if not training.patience:
            return self
        improved = stale_evaluations == 0
        limit = self.limit
        if not limit and stale_evaluations >= training.patience:
            limit = "patience"
        return replace(self, limit=limit, save=self.save or improved or limit != "")


def decide(training: TrainingConfig, step: int, seconds: float, finite: bool, nonfinite: int,
           interrupted: bool) -> Decision:
    """The decision after a step that brings the run to `step` steps and `seconds` of training.

    `finite` tells whether its loss and gradient were, `nonfinite` how many before it were not.
    """
    action = "continue"
    if not finite:
        action = training.on_nonfinite if nonfinite < training.nonfinite_limit else "stop"
        if action != "skip":
            return Decision(action)
    limit = training.reached(step, seconds)
    return Decision(action, interrupted, limit,
                    evaluate=limit != "" or training.evaluates(step),
                    save=limit != "" or training.saves(step))
