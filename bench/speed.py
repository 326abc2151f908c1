"""Training steps beside nanoGPT's: tokens a second, peak memory, share of the machine's limit.

  python -m bench speed peer=../nanoGPT

`peer` is a folder with a nanoGPT checkout; without it, only our side is measured. Each side runs in
processes of its own, in turn, and medians are printed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench import peer as nanogpt
from bench import timing
from data.loader import Loader, Prefetch
from data.shards import Tokens
from model import GPT, GPTConfig
from model.loss import loss_options
from setting import setting
from training.configure import configure
from training.device import Device
from training.optim import OptimConfig, Optimizers
from training.step import BatchLoss

# nanoGPT's architecture.
GPT2_LIKE = GPTConfig(dropout=0.0, bias=False, activation="gelu_erf")
CHARACTERS = replace(GPT2_LIKE, vocab_size=65, n_layer=4, n_head=4)
# The model, and the number of sequences in a batch.
SHAPES = {
    "wide": (replace(CHARACTERS, n_embd=256, block_size=128), 64),
    "narrow": (replace(CHARACTERS, n_embd=128, block_size=64), 12),
    "gpt2": (replace(GPT2_LIKE, vocab_size=50304), 4),
}
# Rows and columns of the square matrices whose product is taken as the machine's limit.
PRODUCT_SIZES = (512, 1024, 2048)


@dataclass(frozen=True)
class SpeedSettings(nanogpt.PeerSettings):
    """Settings of the benchmark of training steps."""

    shape: Literal["all", "wide", "narrow", "gpt2"] = setting("all", "gpt2 is GPT-2 124M")
    seconds: float = setting(5.0, "of timed steps in each process", gt=0, lt=3600)


def main(settings: SpeedSettings) -> int:
    device = Device()
    configure(device)
    limit = product_rate(device)
    print(f"torch {torch.__version__}, {device.describe()}; fastest matrix product in "
          f"{device.precision}: {limit / 1e9:,.0f} GFLOP/s\n")
    timing.print_header("shape", "side", "tokens/s", "x", "of product rate", "memory", "x")
    measured: dict[str, Any] = {"precision": device.precision, "product_flops": limit}
    for shape in SHAPES if settings.shape == "all" else [settings.shape]:
        measured[shape] = measure_shape(shape, limit, settings)
    timing.write_json(settings.out, measured)
    return 0


def measure_shape(shape: str, limit: float, settings: SpeedSettings) -> dict[str, Any]:
    """Measure the sides in turn, and print a row for each."""
    def measure_side(side: str) -> dict[str, Any]:
        return timing.measure_in_process("bench.speed", side, shape, settings.seconds,
                                         settings.peer)

    sides = ["nanogpt", "ours"] if settings.peer else ["ours"]
    runs = timing.in_turn(sides, settings.rounds, measure_side)
    first = runs[sides[0]]
    flops_per_token = GPT(SHAPES[shape][0]).flops_per_token()
    for side, of_side in runs.items():
        rate = statistics.median(run["rate"] for run in of_side)
        memory = statistics.median(run["peak_bytes"] for run in of_side)
        timing.print_row(shape, side, f"{rate:,.0f}",
                         f"{timing.median_ratio(of_side, first, 'rate'):.2f}",
                         f"{rate * flops_per_token / limit:.0%}", f"{memory / 2**20:,.0f} MB",
                         f"{timing.median_ratio(of_side, first, 'peak_bytes'):.2f}")
    return {"runs": runs}


def product_rate(device: Device) -> float:
    """The highest FLOP/s of a product of square matrices, in the precision of training."""
    dtype = torch.float32 if device.precision == "fp32" else device.low_dtype

    def multiply(a: Tensor, b: Tensor) -> None:
        a @ b
        device.synchronize()

    best = 0.0
    for size in PRODUCT_SIZES:
        a, b = (torch.randn(size, size, device=device.torch, dtype=dtype) for _ in range(2))
        best = max(best, timing.best_rate(2 * size**3, multiply, a, b))
    return best


def measure(side: str, shape: str, least_seconds: float, peer: str) -> dict[str, Any]:
    """The tokens a second of one side by its median step, and the peak memory in bytes."""
    config, batch_size = SHAPES[shape]
    loader = random_loader(config, batch_size)
    if side == "ours":
        device = Device()
        configure(device)
        step = TrainingStep(GPT(config).to(device.torch), OptimConfig(), device, loader)
    else:
        step = nanogpt_step(Path(peer), config, loader)
    seconds = timing.step_seconds(step, least_seconds, warm_up=2)[2:]
    rate = batch_size * config.block_size / statistics.median(seconds)
    return {"seconds": seconds, "rate": rate, "peak_bytes": timing.peak_bytes()}


def random_loader(config: GPTConfig, batch_size: int, micro_steps: int = 1,
                  world_size: int = 1) -> Loader:
    """Batches of random tokens; each of `world_size` processes has so many micro-steps a step."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 2_000_000, dtype=np.uint16)
    return Loader([Tokens([ids])], config.block_size, batch_size, micro_steps,
                  world_size=world_size)


class TrainingStep:
    """A step of one micro-step, as train.py takes it; called with its number."""

    def __init__(self, model: GPT, optim: OptimConfig, device: Device, loader: Loader,
                 compiled: bool = False) -> None:
        model.loss_options = loss_options(device.torch, fused=True)
        self.device = device
        self.grad_clip = optim.grad_clip
        self.batches = Prefetch(loader, device.torch)
        self.loss_fn = BatchLoss(torch.compile(model, dynamic=False) if compiled else model, device)
        self.optimizers = Optimizers(model.parameters_by_role(), optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

    def forward(self, number: int) -> Tensor:
        return self.loss_fn(self.batches.batch(number))

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        norm = self.optimizers.gradient_norm(self.scaler)
        # As in train.py, the only value that is read.
        overflowed = not math.isfinite(norm.item())
        self.optimizers.step(self.scaler, norm, self.grad_clip, overflowed)

    def __call__(self, number: int) -> None:
        self.backward(self.forward(number))
        self.update()
        self.device.synchronize()


def nanogpt_step(peer: Path, config: GPTConfig, loader: Loader) -> Callable[[int], None]:
    """One step of nanoGPT's model and optimizer, as in its training loop: in fp32 on CPUs."""
    model = nanogpt.build_model(peer, config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(number: int) -> None:
        inputs, targets = loader.batch(number)
        _, loss = model(inputs.contiguous(), targets.contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step
