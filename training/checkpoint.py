"""Checkpoints: written whole or not at all, found by looking, pruned. safetensors and JSON, never pickle.

    RUN/checkpoints/step_00000300/
        model.safetensors      the weights, by their plain names
        optimizer.safetensors  the optimizers' state
        state.json             step, seconds trained, losses, settings, shape of the model, versions
        tokenizer.json         what turns the ids back into text

Knows tensors by name and nothing of what they mean.
"""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import atomic
from training.optim import Optimizers

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run. `state` is what `state.json` holds; tensors are read when asked for."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def model_tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors", device=device)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "optimizer.safetensors")


def save(checkpoints: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor],
         tokenizer: dict[str, Any], state: dict[str, Any]) -> Checkpoint:
    """Write `checkpoints/step_XXXXXXXX`; `state` needs a "step". Raises OSError if the disk is full, leaving nothing."""
    folder = checkpoints / f"step_{state['step']:08d}"
    state = {"format": FORMAT} | state | {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    with atomic.new_folder(folder) as partial:
        try:
            save_file(contiguous(model), partial / "model.safetensors")
            save_file(contiguous(optimizer), partial / "optimizer.safetensors")
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written ({error}): earlier checkpoints are as they were.") from None
        (partial / "tokenizer.json").write_text(json.dumps(tokenizer))
        (partial / "state.json").write_text(json.dumps(state, indent=2))
    return Checkpoint(folder, state)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def find(checkpoints: Path) -> list[Checkpoint]:
    """All checkpoints, oldest first."""
    folders = sorted(checkpoints.glob("step_*"))
    return [Checkpoint(folder, json.loads((folder / "state.json").read_text())) for folder in folders]


def find_run(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`: below `runs_dir`, or a path; without a name, the run that was saved last.

    Raises ValueError naming the runs there are.
    """
    runs = sorted(folder.parent for folder in runs_dir.rglob("checkpoints") if any(folder.glob("step_*")))
    if not name and runs:
        return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)
    for run in (runs_dir / name, Path(name)):
        if name and any(run.glob("checkpoints/step_*")):
            return run
    there = f"There are: {', '.join(str(run.relative_to(runs_dir)) for run in runs)}." if runs else (
        f"{runs_dir} holds no run with a checkpoint: train one with python train.py.")
    raise ValueError(f"run={name} is not there. {there}" if name else there)


def best(found: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss; the newest where none was evaluated."""
    evaluated = [one for one in found if one.state.get("val_loss") is not None]
    return min(evaluated, key=lambda one: one.state["val_loss"]) if evaluated else (found[-1] if found else None)


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the best, and what a kill left half-written."""
    found = find(checkpoints)
    kept = {one.folder for one in found[-keep_last:]} | ({best(found).folder} if found else set())
    doomed = [one.folder for one in found if one.folder not in kept] + list(checkpoints.glob(f"{atomic.PARTIAL}*"))
    for folder in doomed:
        shutil.rmtree(folder, ignore_errors=True)


def check_disk(run: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Raise ValueError unless the disk under `run` holds two checkpoints of this size."""
    needed = 2 * (sum(weights.nbytes for weights in model.state_dict().values()) + optimizers.nbytes())
    folder = run
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(f"{folder} has {free / 2**20:,.0f} MB free, two checkpoints need {needed / 2**20:,.0f} MB: "
                         f"free some, or choose another runs_dir.")
