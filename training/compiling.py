"""Compile a model where that pays, and do without where it fails."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import torch

from terminal import first_line
from training.configure import be_deterministic
from training.step import Batch, BatchLoss

# Compiling takes minutes on a CPU and about one on a GPU, and saves 25% to 50% of later steps.
COMPILE_PAYS_AFTER_SECONDS = {"cuda": 300, "cpu": 900}


def maybe_compile(loss_fn: BatchLoss, batch: Batch, choice: str, flops: float,
                  say: Callable[[str], None]) -> BatchLoss:
    """The loss by a compiled model, if `choice` is "true", or "auto" and the run is long enough.

    `flops` are those of the whole run. A forward and backward pass of `batch` finds failures. They
    raise ValueError with "true", and with "auto" are a warning and give the uncompiled model.
    """
    # Whether to compile: as it was asked, or if the run is long enough.
    device = loss_fn.device
    if choice == "false":
        return loss_fn
    if choice == "auto":
        pays_after = COMPILE_PAYS_AFTER_SECONDS.get(device.type)
        if pays_after is None or flops / device.nominal_flops() < pays_after:
            return loss_fn

    # Compile, and run the result once.
    say("Compiling the model: the first step takes a minute or more.")
    try:
        if device.type == "cpu":
            if not any(map(shutil.which, ("c++", "g++", "clang++"))):
                raise RuntimeError("no C++ compiler found")
            # Otherwise a compiled embedding adds its gradients in a random order.
            be_deterministic()
        # All batches of training have one shape.
        compiled = replace(loss_fn, model=torch.compile(loss_fn.model, dynamic=False))
        compiled.try_backward(batch)
        return compiled
    except torch.OutOfMemoryError:
        # Uncompiled, it would need more.
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        if choice == "true":
            raise ValueError(f"training.compile=true failed ({cause}): "
                             f"set training.compile=false.") from error
        say(f"Warning: the model could not be compiled and runs uncompiled ({cause}).")
        return loss_fn


def check_fused_loss(loss_fn: BatchLoss, batch: Batch, say: Callable[[str], None]) -> None:
    """Try the compiled loss of an uncompiled model; where that fails, warn and do without it."""
    model = loss_fn.model
    if model.loss_options is None or not model.loss_options.fused:
        return
    try:
        loss_fn.try_backward(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        model.loss_options = replace(model.loss_options, fused=False)
        say(f"Warning: the loss could not be compiled and runs uncompiled "
            f"({type(error).__name__}: {first_line(error)}).")
