"""Compile a model where that pays, and do without where it fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from terminal import first_line
from training.configure import be_deterministic
from training.device import Device

# Compiling takes minutes on a CPU and about one on a GPU, and saves 25% to 50% of later steps.
COMPILE_PAYS_AFTER_SECONDS = {"cuda": 300, "cpu": 900}


def maybe_compile(model: nn.Module, choice: str, device: Device, flops: float,
                  trial: Callable[[nn.Module], None], say: Callable[[str], None]) -> nn.Module:
    """The model, compiled if `choice` is "true", or if it is "auto" and the run is long enough.

    `flops` are those of the whole run. `trial` runs the model once to find failures, which raise
    ValueError with "true", and with "auto" are a warning and give the plain model.
    """
    # Whether to compile: as it was asked, or if the run is long enough.
    if choice == "false":
        return model
    if choice == "auto":
        pays_after = COMPILE_PAYS_AFTER_SECONDS.get(device.type)
        if pays_after is None or flops / device.nominal_flops() < pays_after:
            return model

    # Compile, and run the result once.
    say("Compiling the model: the first step takes a minute or more.")
    try:
        if device.type == "cpu":
            if not any(map(shutil.which, ("c++", "g++", "clang++"))):
                raise RuntimeError("no C++ compiler found")
            # Otherwise a compiled embedding adds its gradients in a random order.
            be_deterministic()
        # All batches of training have one shape.
        compiled = torch.compile(model, dynamic=False)
        trial(compiled)
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
        return model


def check_fused_loss(model: nn.Module, trial: Callable[[nn.Module], None],
                     say: Callable[[str], None]) -> None:
    """Try the compiled loss of an uncompiled model; where that fails, warn and do without it.

    `model` is a GPT, and `trial` runs it once.
    """
    if model.loss_options is None or not model.loss_options.fused:
        return
    try:
        trial(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        model.loss_options = replace(model.loss_options, fused=False)
        say(f"Warning: the loss could not be compiled and runs uncompiled "
            f"({type(error).__name__}: {first_line(error)}).")
