"""Messages about a run: its description, changes when it resumes, how to train further."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from checkpointing.checkpoint import Checkpoint
from checkpointing.state import State
from conf.identity import flat
from conf.settings import Settings
from data.prepare import describe
from data.run_data import RunData
from terminal import counted
from training.device import Device
from training.schedule import extension, same_rates
from training.slow_cpu import slow_cpu_warnings


def describe_run(say: Callable[[str], None], folder: Path, device: Device, state: State,
                 data: RunData) -> None:
    """Describe the model, the data, the steps and the device."""
    model, loader = state.model, data.loader
    start = f", from step {state.step}" if state.step else ""
    say(f"Run: {folder}{start}")
    say(f"Data: {describe(data.prepared)}")

    # The parameters by role.
    counts = model.parameter_counts()
    parts = ", ".join(f"{role} {count:,}" for role, count in counts.items() if count)
    say(f"Model: {sum(counts.values()):,} parameters ({parts}), "
        f"{model.flops_per_token() / 1e6:,.1f} MFLOPs a token")

    # A step: its tokens, and the number of steps in an epoch of each part of the data.
    epochs = " and ".join(f"{steps:,.1f}" for steps in loader.steps_an_epoch())
    processes = f"{loader.world_size} processes x " if loader.world_size > 1 else ""
    say(f"Step: {loader.tokens_per_step:,} tokens ({processes}{loader.micro_steps} x "
        f"{loader.batch_size} sequences of {loader.block_size}), {epochs} steps an epoch")
    if loader.notes():
        say(f"Conversations: {loader.notes()}")

    # The device, and what makes training on it slower than necessary.
    say(f"Device: {device.describe()}")
    for warning in slow_cpu_warnings(device, state.optimizers.world.local_size):
        say(f"Warning: {warning}")
    unused = unused_gpus(device.type, loader.world_size)
    if unused:
        say(unused)


def unused_gpus(device_type: str, world_size: int) -> str:
    """How to use all GPUs of this machine; empty for a run of several processes, or on one GPU."""
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    if world_size > 1 or gpus < 2:
        return ""
    return (f"This run uses one of {gpus} GPUs. To use all: torchrun --standalone "
            f"--nproc-per-node={gpus} {shlex.join(sys.argv)}")


def describe_changes(say: Callable[[str], None], settings: Settings, state: State,
                     last: Checkpoint | None) -> None:
    """Say what has changed since the checkpoint `last`, and warn of settings without effect."""
    # Of every run.
    sharded, world_size = state.optimizers.sharded, state.optimizers.world.size
    for warning in settings.warnings():
        say(f"Warning: {warning}")
    if sharded:
        say(f"Weights: divided among {world_size} processes (training.shard="
            f"{settings.training.shard}); the model is not compiled")

    # Of a run that resumes.
    if last is None:
        return
    # Another length of the run changes the learning rates that depend on it.
    planned, max_steps = last.state["max_steps"], settings.training.max_steps
    if planned != max_steps:
        if not same_rates(state.step, settings.optim, planned, max_steps):
            state.replanned = True
        say(extension(state.step, settings.optim, planned, max_steps, state.replanned))
    for change in (changed_batch_size(settings, last),
                   changed_world_size(last, world_size, sharded)):
        if change:
            say(change)


def how_to_continue(limit: str, settings: Settings, last: Checkpoint) -> str:
    """How to train a finished run further, and how its learning rates then change."""
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
    dropout = " and dropout draws different numbers" if settings.model.dropout > 0 else ""
    return (f"Resuming with micro-batches of {now} sequences instead of {before}: sums are rounded "
            f"in another order{dropout}, so the result is not bit-identical.")


def changed_world_size(last: Checkpoint, now: int, sharded: bool = False) -> str:
    """The effect of resuming with another number of processes; empty if it is the same."""
    before = last.state["environment"].get("world_size", 1)
    if before == now:
        return ""
    effect = "sums are rounded as before"
    are_powers_of_two = before.bit_count() == now.bit_count() == 1
    if sharded or not are_powers_of_two:
        effect = "sums are rounded in another order, so the result is not bit-identical"
    return f"Resuming with world_size={now} instead of {before}: {effect}."
