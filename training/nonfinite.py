"""The report of a loss or gradient that is NaN or infinite."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import atomic


def report(run: Path, number: int, step: int, batch: dict[str, Any], loss: float, model: nn.Module,
           last_losses: Iterable[float], action: str) -> Path:
    """Write `RUN/nonfinite/NUMBER-step_XXXXXXXX.json`, and return its path.

    `number` counts the reports of the run, and `step` the steps before this one. The model must
    still have its gradients, unscaled and unclipped.
    """
    norms = {block: to_json(norm) for block, norm in gradient_norms(model).items()}
    content = {"step": step, "action": action, "loss": to_json(loss), "batch": batch,
               "gradient_norms": norms, "last_losses": list(last_losses)}
    path = run / "nonfinite" / f"{number:02d}-step_{step:08d}.json"
    atomic.write_bytes(path, json.dumps(content, indent=2).encode())
    return path


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of the gradients of each block, such as "wte" or "h.0"."""
    blocks: dict[str, list[Tensor]] = {}
    for name, weights in model.named_parameters():
        if weights.grad is not None:
            block = re.match(r"\w+(\.\d+)?", name)[0]
            blocks.setdefault(block, []).append(weights.grad)
    norms = {block: nn.utils.get_total_norm(gradients) for block, gradients in blocks.items()}
    return {block: norm.item() for block, norm in norms.items()}


def to_json(value: float) -> float | str:
    """JSON has no NaN and no infinity: these become strings."""
    return value if math.isfinite(value) else str(value)
