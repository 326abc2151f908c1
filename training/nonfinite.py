"""What is written down when a loss or a gradient is NaN or infinite."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import atomic


def report(run: Path, number: int, step: int, batch: dict[str, Any], loss: float, model: nn.Module,
           last_losses: Iterable[float], action: str) -> Path:
    """Write `RUN/nonfinite/NUMBER-step_XXXXXXXX.json`, the `number`-th of the run; return its path.

    `step` counts the steps before it; the gradients must still be in the model, unscaled and unclipped.
    """
    content = {"step": step, "action": action, "loss": in_words(loss), "batch": batch,
               "gradient_norms": {block: in_words(norm) for block, norm in gradient_norms(model).items()},
               "last_losses": list(last_losses)}
    path = run / "nonfinite" / f"{number:02d}-step_{step:08d}.json"
    atomic.write_bytes(path, json.dumps(content, indent=2).encode())
    return path


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each block's gradients. A block is a module of the model's, or of a list of the model's, as in "h.0"."""
    blocks: dict[str, list[Tensor]] = {}
    for name, weights in model.named_parameters():
        if weights.grad is not None:
            blocks.setdefault(re.match(r"\w+(\.\d+)?", name)[0], []).append(weights.grad)
    return {block: torch.nn.utils.get_total_norm(gradients).item() for block, gradients in blocks.items()}


def in_words(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
