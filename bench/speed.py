"""Training steps beside nanoGPT's: tokens a second, peak memory, share of the machine's limit.

  python -m bench speed peer=../nanoGPT

`peer` is a folder with a nanoGPT checkout; without it, only our side is measured. Each side runs in
processes of its own, in turn, and medians are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench import peer as nanogpt
from bench.timing import (
    measure_in_process,
    peak_bytes,
    print_header,
    print_row,
    write_json,
)
from data.loader import Loader
from data.shards import Tokens
from model import GPT, GPTConfig
from model.loss import loss_options
from setting import FilePath, SettingsBase, setting
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
class SpeedSettings(SettingsBase):
    """Settings of the benchmark of training steps."""

    peer: FilePath = setting("", "a nanoGPT checkout")
    shape: Literal["all", "wide", "narrow", "gpt2"] = setting("all", "gpt2 is GPT-2 124M")
    rounds: int = setting(3, "processes of each side", ge=1)
    seconds: float = setting(5.0, "of timed steps in each process", gt=0, lt=3600)
    out: FilePath = setting("", "write the measurements as JSON")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from nanogpt.checkout_problems(self.peer)
        yield from super().problems()


def main(settings: SpeedSettings) -> int:
    device = Device()
    configure(device)
    limit = product_rate(device)
    print(f"torch {torch.__version__}, {device.describe()}; fastest matrix product in "
          f"{device.precision}: {limit / 1e9:,.0f} GFLOP/s\n")
    print_header("shape", "side", "tokens/s", "x", "of product rate", "memory", "x")
    measured: dict[str, Any] = {"precision": device.precision, "product_flops": limit}
    shapes = list(SHAPES) if settings.shape == "all" else [settings.shape]
    for shape in shapes:
        measured[shape] = measure_shape(shape, limit, settings)
    write_json(settings.out, measured)
    return 0


def measure_shape(shape: str, limit: float, settings: SpeedSettings) -> dict[str, Any]:
    """Measure the sides in turn, and print a row for each."""
    sides = ["nanogpt", "ours"] if settings.peer else ["ours"]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(settings.rounds):
        for side in sides:
            arguments = (side, shape, settings.seconds, settings.peer)
            runs[side].append(measure_in_process("bench.speed", *arguments))

    config, batch_size = SHAPES[shape]
    tokens = batch_size * config.block_size
    flops_per_token = GPT(config).flops_per_token()
    rates: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for side in sides:
        rates[side] = [tokens / statistics.median(run["seconds"]) for run in runs[side]]
        memory[side] = statistics.median(run["peak_bytes"] for run in runs[side])
        rate = statistics.median(rates[side])
        print_row(
            shape, side, f"{rate:,.0f}", f"{median_ratio(rates[side], rates[sides[0]]):.2f}",
            f"{rate * flops_per_token / limit:.0%}",
            f"{memory[side] / 2**20:,.0f} MB", f"{memory[side] / memory[sides[0]]:.2f}",
        )
    return {"tokens_per_second": rates, "peak_bytes": memory, "runs": runs}


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the rounds of our rate divided by theirs in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def product_rate(device: Device) -> float:
    """The highest FLOP/s of a product of square matrices, in the precision of training."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[device.precision]
    best = 0.0
    for size in PRODUCT_SIZES:
        a = torch.randn(size, size, device=device.torch, dtype=dtype)
        b = torch.randn(size, size, device=device.torch, dtype=dtype)
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            device.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(side: str, shape: str, least_seconds: float, peer: str) -> dict[str, Any]:
    """Seconds of each step of one side, and the peak memory of this process in bytes."""
    config, batch_size = SHAPES[shape]
    loader = random_loader(config, batch_size)
    if side == "ours":
        device = Device()
        configure(device)
        step = training_step(config, OptimConfig(), device, loader)
    else:
        step = nanogpt_step(Path(peer), config, loader)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds[2:]) < least_seconds:
        start = time.perf_counter()
        step(len(seconds))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[2:], "peak_bytes": peak_bytes()}


def random_loader(config: GPTConfig, batch_size: int, micro_steps: int = 1,
                  world_size: int = 1) -> Loader:
    """Batches of random tokens; each of `world_size` processes has so many micro-steps a step."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 2_000_000, dtype=np.uint16)
    return Loader([Tokens([ids])], config.block_size, batch_size, micro_steps,
                  world_size=world_size)


def training_step(
    config: GPTConfig, optim: OptimConfig, device: Device, loader: Loader
) -> Callable[[int], dict[str, float]]:
    """A function that does one training step and returns the seconds of each of its parts."""
    model = GPT(config).to(device.torch)
    model.loss_options = loss_options(device.torch, fused=True)
    loss_fn = BatchLoss(model, device)
    optimizers = Optimizers(model.parameters_by_role(), optim)
    scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

    def now() -> float:
        device.synchronize()
        return time.perf_counter()

    def step(number: int) -> dict[str, float]:
        start = now()
        loss = loss_fn(loader.batch(number))
        forward = now()
        scaler.scale(loss).backward()
        backward = now()
        optimizers.step(scaler, optimizers.gradient_norm(scaler), optim.grad_clip)
        end = now()
        return {
            "forward": forward - start,
            "backward": backward - forward,
            "optimizer": end - backward,
        }

    return step


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
