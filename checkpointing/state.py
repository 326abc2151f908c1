"""The mutable training state, to and from a checkpoint. All else is a function of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpointing.checkpoint import Checkpoint, DamagedCheckpoint
from checkpointing.snapshot import Snapshot
from checkpointing.spec import MODEL, OPTIMIZER, STATE
from conf.settings import Settings
from model import GPT
from model.loss import loss_options
from training.device import Device
from training.distributed import World
from training.fsdp import shard
from training.optim import Optimizers, load_state, state_shapes, state_tensors
from training.sharding import Divided

# The counters, which a checkpoint holds under the names that they have in `State`.
COUNTERS = ("step", "seconds", "batches_skipped", "nonfinite", "replanned", "best_val_loss",
            "stale_evaluations")


@dataclass
class State:
    """The weights, the state of the optimizers and the loss scaler, and the counters."""

    model: GPT
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    step: int = 0  # steps taken
    seconds: float = 0.0  # of training
    batches_skipped: int = 0  # by rollbacks
    nonfinite: int = 0  # losses or gradients that were NaN or infinite
    replanned: bool = False  # whether earlier learning rates were those of another max_steps
    best_val_loss: float | None = None  # of the scheduled evaluations
    stale_evaluations: int = 0  # scheduled evaluations since the best one

    @property
    def batch(self) -> int:
        """The index of the loader's next batch."""
        return self.step + self.batches_skipped

    def snapshot(self, val_loss: float | None, scheduled: bool, tokenizer: dict[str, Any],
                 constants: dict[str, Any]) -> Snapshot:
        """The content of a checkpoint; it shares memory with the model and the optimizers.

        `constants` are the fields of state.json that training does not change: the settings, the
        model's shape, the environment.
        """
        if val_loss is not None and not math.isfinite(val_loss):
            val_loss = None
        # The fields of state.json that training changes.
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"scheduled": scheduled, "val_loss": val_loss, "scaler": self.scaler.state_dict()}
        tensors = state_tensors(self.optimizers)
        return Snapshot(self.shared_weights(), tensors, tokenizer, state | constants)

    def weights(self) -> dict[str, Tensor | Divided]:
        """The weights by name."""
        weights = self.model.state_dict()
        if not self.optimizers.sharded:
            return weights
        size = self.optimizers.world.size
        return {name: Divided.by_rows(tensor, size) for name, tensor in weights.items()}

    def shared_weights(self) -> dict[str, Tensor | Divided]:
        """The weights to save: where all processes have all, each saves some of the tensors."""
        world = self.optimizers.world
        weights = self.weights()
        if world.size == 1 or self.optimizers.sharded:
            return weights
        return {name: Divided.of_one(tensor, number % world.size, world.rank)
                for number, (name, tensor) in enumerate(weights.items())}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if not self.optimizers.sharded:
            self.model.load_state_dict(weights)
            return
        for name, divided in self.weights().items():
            divided.load(weights[name], self.optimizers.world.rank)

    def whole_model(self) -> GPT | None:
        """The model; of one that is divided, a copy on the CPU in the first process."""
        if not self.optimizers.sharded:
            return self.model
        rank = self.optimizers.world.rank
        weights = {name: divided.collect(0, rank) for name, divided in self.weights().items()}
        if rank > 0:
            return None
        model = GPT.empty(self.model.config, "cpu")
        model.load_state_dict(weights)
        return model

    def nbytes(self) -> int:
        """The size of a checkpoint."""
        tensors = [*self.weights().values(), *state_shapes(self.optimizers).values()]
        return sum(tensor.nbytes for tensor in tensors)

    def restore(self, saved: Checkpoint) -> None:
        """Load a checkpoint.

        Raises DamagedCheckpoint, changing nothing, if it is not one of this model and optimizers.
        """
        scaler = saved.state["scaler"]
        if not is_scaler_state(scaler, self.scaler.state_dict()):
            raise DamagedCheckpoint(f"{saved.folder / STATE} is not the state of this loss scaler")
        # Both files are checked before anything is copied.
        weights = saved.open_tensors(MODEL, self.weights())
        optimizer_state = saved.open_tensors(OPTIMIZER, state_shapes(self.optimizers))
        self.load_weights(weights)
        load_state(self.optimizers, optimizer_state)
        self.scaler.load_state_dict(scaler)
        for name in COUNTERS:
            setattr(self, name, saved.state[name])

    def note_evaluation(self, val_loss: float) -> None:
        """Record the loss of a scheduled evaluation; NaN or infinity is never the best one."""
        is_best = self.best_val_loss is None or val_loss < self.best_val_loss
        if is_best and math.isfinite(val_loss):
            self.best_val_loss, self.stale_evaluations = val_loss, 0
        else:
            self.stale_evaluations += 1

    def roll_back(self, saved: Checkpoint) -> None:
        """Load a checkpoint, and skip all batches since then, including the present one."""
        # What the checkpoint does not know: how far the data was read, and what has happened since.
        next_batch, nonfinite, replanned = self.batch + 1, self.nonfinite, self.replanned
        self.restore(saved)
        self.batches_skipped = next_batch - self.step
        self.nonfinite, self.replanned = nonfinite, replanned


def new_state(settings: Settings, world: World, device: Device, sharded: bool,
              skip_init: bool = False) -> State:
    """The state before the first step, with random weights, or without values to load others.

    With `sharded`, the weights are divided among the processes by FSDP2.
    """
    # All processes have the same initial weights.
    torch.manual_seed(settings.seed)
    model = GPT.empty(settings.model, "cpu") if skip_init else GPT(settings.model)
    model.recompute = settings.training.recompute
    model.loss_options = loss_options(device.torch, fused=settings.training.compile != "false")
    if sharded:
        shard(model, world, device)
    else:
        model.to(device.torch)
    # After the model has moved: the optimizers' state is created on its device.
    optimizers = Optimizers(model.parameters_by_role(), settings.optim, world, sharded,
                            model.rate_scales(settings.optim.optimizer))
    scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")
    return State(model, optimizers, scaler)


def is_scaler_state(state: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether `state` can be a later one of the loss scaler whose state is `own`."""
    if not own:
        return not state
    scale, growth = state.get("scale"), state.get("_growth_tracker")
    # All else are constants of the scaler.
    is_known = state == own | {"scale": scale, "_growth_tracker": growth}
    has_types = isinstance(scale, float) and type(growth) is int
    return is_known and has_types and 0 < scale < 2.0**64 and 0 <= growth < 2**31
