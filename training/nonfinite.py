"""The report of a loss or gradient that is NaN or infinite."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atomic
from training.optim import Optimizers


def report(run: Path, number: int, optimizers: Optimizers, content: dict[str, Any]) -> str:
    """Write `RUN/nonfinite/NUMBER-step_XXXXXXXX.json`; return the end of a sentence about it.

    `number` counts the reports of the run. The norms of `optimizers.gradient_norm` are added to
    `content`, which has the "loss", and the number of the steps before this one as "step".
    """
    norms = {block: to_json(norm) for block, norm in gradient_norms(optimizers).items()}
    content = content | {"loss": to_json(content["loss"]), "gradient_norms": norms}
    path = run / "nonfinite" / f"{number:02d}-step_{content['step']:08d}.json"
    try:
        atomic.write_json(path, content, indent=2)
    except OSError as error:
        return f"; the report of it could not be written ({error.strerror})."
    return f": see {path}."


def gradient_norms(optimizers: Optimizers) -> dict[str, float]:
    """The norm of the gradients of each block, such as "wte" or "h.0"."""
    blocks: dict[str, list[Tensor]] = {}
    for weights, name in optimizers.names.items():
        blocks.setdefault(re.match(r"\w+(\.\d+)?", name)[0], []).append(weights)
    norms = [optimizers.norm.of(parameters) for parameters in blocks.values()]
    # All are read from the device at once.
    return dict(zip(blocks, torch.stack(norms).tolist(), strict=True))


def to_json(value: float) -> float | str:
    """JSON has no NaN and no infinity: these become strings."""
    return value if math.isfinite(value) else str(value)
