"""Simulate the time of a training step on many GPUs, from bytes and FLOPs.

  python -m scripts.scale experiment=gpt2_124m optim=muon
  python -m scripts.scale model=gpt2-xl training.batch_size=8 training.tokens_per_step=1048576

Takes the settings of train.py, too. Nothing is measured: the assumptions are printed, and explained
in docs/scale.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.launch import launch
from setting import ScriptSettings, setting
from training.gpus import PEAK_FLOPS, gpu_named, gpu_problems


@dataclass(frozen=True)
class ScaleSettings(ScriptSettings):
    """The GPUs and what connects them; all other settings are those of train.py."""

    device: str = setting("h100", "a GPU with a data sheet, as in scripts.plan")
    mfu: float = setting(0.4, "part of its peak FLOP/s that matrix products reach", gt=0, le=1)
    memory: float = setting(2700.0, "GB/s that it reads and writes its memory with", gt=0)
    node: int = setting(8, "GPUs of a node", ge=1)
    nvlink: float = setting(360.0, "GB/s that a GPU sends to others of its node", gt=0)
    network: float = setting(40.0, "GB/s that a GPU sends to other nodes", gt=0)
    latency: float = setting(20.0, "microseconds before a collective sends anything", ge=0)
    message: float = setting(2.0, "microseconds for each process that it sends to", ge=0)
    two_levels: bool = setting(
        False, "as if gradients were added within a node, then between nodes: not implemented")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from gpu_problems(self.device)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.scale:main", ScaleSettings, __doc__)

import math
from typing import NamedTuple

import numpy as np

from conf.settings import Settings
from model import GPT
from scripts.plan import settings_without_data
from terminal import readable_size, say
from training.buckets import BUCKET_NUMBERS
from training.distributed import World
from training.muon import NEWTON_SCHULZ_STEPS, Muon
from training.optim import AdamW, Optimizers

GPU_COUNTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
BYTES = 4  # of a weight, a gradient, a number of the optimizer state: all are fp32
# What an update reads and writes for each number: weight, gradient, and the state.
UPDATE_BYTES = {AdamW.STATE: 7 * BYTES, Muon.STATE: 5 * BYTES}
STATE_BYTES = {AdamW.STATE: 2 * BYTES, Muon.STATE: BYTES}
# A part of a step that takes less than this is not what limits it.
LEAST_SHARE = 0.1


class Step(NamedTuple):
    """The seconds of the parts of a step on a number of GPUs."""

    compute: float
    exchange: float  # of gradients, all of it
    exposed: float  # what of it the backward pass does not hide
    gather: float  # of weights
    newton_schulz: float
    update: float  # all else in the update
    state_bytes: float  # of the optimizer, on the GPU that has most


class Share(NamedTuple):
    """What one rank updates."""

    numbers: float
    matrix_flops: float  # of Newton-Schulz
    update_bytes: float  # read and written for all else
    state_bytes: float


def main(scale: ScaleSettings) -> int:
    # The model, without memory for its weights.
    settings, _ = settings_without_data(list(scale.train))
    model = GPT.empty(settings.model)
    training, block_size = settings.training, settings.model.block_size
    tokens = training.step_tokens(block_size)
    peak = PEAK_FLOPS[gpu_named(scale.device)]
    n_parameters = sum(model.parameter_counts().values())

    # Print what is simulated and what is assumed.
    say(f"Simulated: {n_parameters:,} parameters, {settings.optim.optimizer}, {tokens:,} tokens a "
        f"step, at most {training.batch_size} sequences of {block_size} in a micro-step")
    say(f"Assumed: {scale.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s, memory {scale.memory:,.0f} GB/s, "
        f"{scale.nvlink:,.0f} GB/s within a node of {scale.node}, {scale.network:,.0f} GB/s "
        f"between nodes, {scale.latency:g} + {scale.message:g} a process microseconds a collective")
    say("")

    # Print a row of a Markdown table for each number of GPUs.
    names = ("GPUs", "sequences each", "forward, backward", "gradients", "not hidden", "weights",
             "Newton-Schulz", "update", "step, ms", "efficiency", "state each", "limit")
    say(f"| {' | '.join(names)} |")
    say("|---" * len(names) + "|")
    for size in GPU_COUNTS:
        cells = [f"{size:,}", f"{tokens / block_size / size:g}"]
        if tokens // block_size % size:
            # The sequences of a step cannot be divided equally.
            cells += [*("" for _ in names[3:]), "batch"]
        else:
            cells += cells_of(simulate(model, settings, scale, size))
        say(f"| {' | '.join(cells)} |")
    return 0


def cells_of(step: Step) -> list[str]:
    """The seconds of the parts of a step, its efficiency and what limits it."""
    network, optimizer = step.exposed + step.gather, step.newton_schulz + step.update
    seconds = step.compute + network + optimizer
    limit = "network" if network > optimizer else "optimizer"
    if max(network, optimizer) < LEAST_SHARE * seconds:
        limit = "compute"
    # Efficiency compares it with a step that only computes forward and backward.
    parts = (step.compute, step.exchange, step.exposed, step.gather, step.newton_schulz,
             step.update, seconds)
    return [*(f"{1000 * part:,.1f}" for part in parts), f"{step.compute / seconds:.0%}",
            readable_size(step.state_bytes), limit]


def simulate(model: GPT, settings: Settings, scale: ScaleSettings, size: int) -> Step:
    """A step on `size` GPUs."""
    # Forward and backward of the sequences of one GPU.
    training, block_size = settings.training, settings.model.block_size
    flops = scale.mfu * PEAK_FLOPS[gpu_named(scale.device)]
    tokens = training.step_tokens(block_size) / size
    micro_steps = math.ceil(tokens / block_size / training.batch_size)
    compute = model.flops_per_token() * tokens / flops

    # The exchange of gradients, in buckets.
    share = largest_share(model, settings, size)
    # All processes send and receive as much as the one with the largest share.
    nbytes = BYTES * share.numbers * size
    buckets = math.ceil(nbytes / BYTES / BUCKET_NUMBERS)
    exchange = exchange_seconds(nbytes, buckets, scale, size)
    # The backward pass is two thirds of a micro-step, and the last one hides the exchange.
    hidden = compute / micro_steps * 2 / 3

    return Step(compute, exchange, exposed=max(0.0, exchange - hidden),
                gather=gather_seconds(nbytes, scale, size),
                newton_schulz=share.matrix_flops / flops,
                update=share.update_bytes / scale.memory / 1e9, state_bytes=share.state_bytes)


def exchange_seconds(nbytes: int, buckets: int, scale: ScaleSettings, size: int) -> float:
    """Each GPU sends each other one its part of the gradients, of which it has `nbytes`."""
    if size == 1:
        return 0.0
    # The parts of the gradients that go to GPUs of this node, and to other nodes.
    node = min(size, scale.node)
    near, far = (node - 1) / size, (size - node) / size
    messages = size - 1
    if scale.two_levels:
        # To the GPU of the node with the same place as the owner; from there one sum a node.
        near, far = (node - 1) / node, far / node
        messages = node - 1 + size // node - 1
    # Links of both kinds work at the same time.
    sending = max(near / scale.nvlink, far / scale.network) * nbytes / 1e9
    return sending + buckets * (scale.latency + scale.message * messages) / 1e6


def gather_seconds(nbytes: int, scale: ScaleSettings, size: int) -> float:
    """Each GPU gets the weights of all others; they enter each node only once."""
    if size == 1:
        return 0.0
    node = min(size, scale.node)
    near = (size - 1) / size / scale.nvlink
    far = (size - node) / size / node / scale.network
    seconds = (scale.latency + scale.message * (size - 1)) / 1e6
    return max(near, far) * nbytes / 1e9 + seconds


def largest_share(model: GPT, settings: Settings, size: int) -> Share:
    """The most that one of `size` ranks has to do, send and keep."""
    world = World({})
    world.size = size
    optimizers = Optimizers(model.parameters_by_role(), settings.optim, world)
    shares = np.zeros((size, len(Share._fields)))
    for share, parts in zip(shares, optimizers.parts, strict=True):
        # The parts of the weights that this rank updates.
        for part in parts:
            keys, numbers = optimizers.keys[part.weights], part.tensor.numel()
            flops = newton_schulz_flops(part.weights.shape) if keys == Muon.STATE else 0.0
            share += numbers, flops, UPDATE_BYTES[keys] * numbers, STATE_BYTES[keys] * numbers
    return Share(*shares.max(axis=0).tolist())


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """Three products in each step: X X', its square, and their sum times X."""
    rows, columns = sorted(shape)
    return NEWTON_SCHULZ_STEPS * (4 * rows * rows * columns + 2 * rows**3)
