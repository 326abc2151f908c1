"""Measure training steps: beside nanoGPT's, against the machine's own limit, and where their time goes; and decoding.

  python -m bench.bench speed peer=../nanoGPT     tokens a second, and peak memory, of both
  python -m bench.bench result peer=../nanoGPT    seconds of training to its result, and the result in its seconds
  python -m bench.bench ablation                  what each ingredient of a recipe gives
  python -m bench.bench start peer=../nanoGPT     from the start of the process to the end of its first step
  python -m bench.bench profile                   what a step of the default run spends its time on
  python -m bench.bench decode peer=../nanoGPT    sampling: tokens a second, beside transformers too if it is installed

`peer` is a folder with a nanoGPT checkout, which is not part of nanohydra; without it, only our side is measured. Each
side runs in processes of its own, in turn, as its README says for CPUs; the medians count.

Settings of speed, each with its default:
  shape=all        or one of: wide, narrow, gpt2 (GPT-2 124M)
  rounds=3         processes a side
  seconds=5        of steps that are timed in each (two of them at least), after two that warm up
  out=FILE         also as JSON
Settings of result, which trains nanoGPT's Shakespeare for CPUs and our two experiments on the same text (ten minutes):
  rounds=3         each from another seed; seed=1337 is the first
  out=FILE         also as JSON
Settings of start:
  rounds=5  out=FILE
Settings of ablation: those of train.py, and
  seeds=3          a row
Settings of profile: those of train.py, and
  rows=12          of the table
  trace=FILE       a trace for a browser's tracing page
Settings of decode:
  shape=gpt2       or gpt2-medium, modern, grouped
  prompt=768  tokens=64  batch=16  rounds=3  out=FILE
"""

from __future__ import annotations

import sys

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    modes = {
        "speed": ("bench.bench:speed", "bench.bench:SpeedSettings"),
        "result": ("bench.result:result", "bench.result:ResultSettings"),
        "ablation": ("bench.ablation:ablation", "bench.ablation:AblationSettings"),
        "start": ("bench.start:to_first_step", "bench.start:StartSettings"),
        "profile": ("bench.bench:profile", "bench.bench:ProfileSettings"),
        "decode": ("bench.decode:decode", "bench.decode:DecodeSettings"),
    }
    mode = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in modes else "speed"
    launch(*modes[mode], __doc__)

import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import atomic
from bench.peer import nanogpt_module, peer_problems
from conf.schema import FilePath, compose
from data.loader import Loader
from data.shards import Tokens
from model import GPT, GPTConfig
from train import loss_of
from training.device import Device
from training.optim import OptimConfig, Optimizers

ROOT = Path(__file__).parent.parent
GPT2_LIKE = GPTConfig(dropout=0.0, bias=False, activation="gelu_erf")  # as nanoGPT trains it
SHAPES = {  # the model, and the sequences in a batch
    "wide": (replace(GPT2_LIKE, n_layer=4, n_head=4, n_embd=256, block_size=128, vocab_size=65), 64),
    "narrow": (replace(GPT2_LIKE, n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12),
    "gpt2": (replace(GPT2_LIKE, vocab_size=50304), 4),
}
PRODUCT_SIZES = (512, 1024, 2048)  # rows and columns of the matrices whose product is the machine's limit


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed, and how often."""

    peer: FilePath = ""  # a nanoGPT checkout
    shape: Literal["all", "wide", "narrow", "gpt2"] = "all"
    rounds: int = 3
    seconds: float = 5.0
    out: FilePath = ""

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        yield from peer_problems(self.peer)
        if self.rounds < 1:
            yield f"rounds={self.rounds} must be at least 1."
        if not 0 < self.seconds < 3600:
            yield f"seconds={self.seconds} must be more than 0, and less than an hour."


def speed(settings: SpeedSettings) -> int:
    device = Device()
    limit = product_rate(device)
    print(f"torch {torch.__version__}, {device.describe()}; best measured product in {device.precision}: "
          f"{limit / 1e9:,.0f} GFLOP/s\n")
    print("| shape | nanoGPT, tokens/s | ours | x | of product rate | memory, nanoGPT | ours | x |\n" + "|---" * 8 + "|")
    measured: dict[str, Any] = {"precision": device.precision, "product_flops": limit}
    for shape in SHAPES if settings.shape == "all" else [settings.shape]:
        config, batch_size = SHAPES[shape]
        sides = ["nanogpt", "ours"] if settings.peer else ["ours"]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(settings.rounds):
            for side in sides:
                runs[side].append(in_a_process(side, shape, settings))
        tokens = batch_size * config.block_size
        rates = {side: [tokens / statistics.median(run["seconds"]) for run in of] for side, of in runs.items()}
        rate = {side: statistics.median(of) for side, of in rates.items()}
        memory = {side: statistics.median(run["peak_bytes"] for run in of) for side, of in runs.items()}
        share = rate["ours"] * GPT(config).flops_per_token() / limit
        measured[shape] = {"tokens_per_second": rates, "peak_bytes": memory, "of_product_rate": share, "runs": runs}
        there = "nanogpt" in runs
        print(f"| {shape} | {rate['nanogpt']:,.0f} | " if there else f"| {shape} | not measured | ", end="")
        print(f"{rate['ours']:,.0f} | " + (f"{middle_ratio(rates):.2f}" if there else "") + f" | {share:.0%} | "
              + (f"{memory['nanogpt'] / 2**20:,.0f} MB" if there else "") + f" | {memory['ours'] / 2**20:,.0f} MB | "
              + (f"{memory['ours'] / memory['nanogpt']:.2f}" if there else "") + " |", flush=True)
    if settings.out:
        atomic.write_bytes(Path(settings.out), json.dumps(measured, indent=2).encode())
    return 0


def middle_ratio(rates: dict[str, list[float]]) -> float:
    """Our rate by nanoGPT's, of each round: what both had to share then counts for neither."""
    return statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates["nanogpt"], strict=True))


def product_rate(device: Device) -> float:
    """The most FLOP/s of a product of square matrices in the precision that our steps have, over several sizes."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[device.precision]
    best = 0.0
    for size in PRODUCT_SIZES:
        a, b = (torch.randn(size, size, device=device.torch, dtype=dtype) for _ in range(2))
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            device.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def in_a_process(side: str, shape: str, settings: SpeedSettings) -> dict[str, Any]:
    call = f"from bench.bench import measure; measure({side!r}, {shape!r}, {settings.seconds}, {settings.peer!r})"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{side}, {shape}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str, shape: str, least_seconds: float, peer: str) -> None:
    """Time steps in this process and print them as JSON."""
    config, batch_size = SHAPES[shape]
    torch.manual_seed(0)
    tokens = Tokens([np.random.default_rng(0).integers(0, config.vocab_size, 2_000_000, dtype=np.uint16)])
    loader = Loader([tokens], config.block_size, batch_size)
    step = our_step(config, loader) if side == "ours" else nanogpt_step(Path(peer), config, loader)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds[2:]) < least_seconds:
        start = time.perf_counter()
        step(len(seconds))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds[2:], "peak_bytes": peak}))


def our_step(config: GPTConfig, loader: Loader) -> Callable[[int], None]:
    device = Device()
    model = GPT(config).to(device.torch)
    optim = OptimConfig()
    optimizers = Optimizers(model.parameters_by_role(), optim)
    scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

    def step(number: int) -> None:
        loss = loss_of(model, loader.batch(number), device, None)
        scaler.scale(loss).backward()
        loss.item()
        optimizers.step(scaler, optimizers.gradient_norm(scaler), optim.grad_clip)
    return step


def nanogpt_step(peer: Path, config: GPTConfig, loader: Loader) -> Callable[[int], None]:
    """A step of nanoGPT's own model and optimizer, in the order of its training loop, in fp32 as it trains on CPUs."""
    module = nanogpt_module(peer)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    model = module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in names}))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(number: int) -> None:
        inputs, targets = (ids.contiguous() for ids in loader.batch(number))
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return step


@dataclass(frozen=True)
class ProfileSettings:
    """How a profile is shown; all other settings are the training's own."""

    rows: int = 12
    trace: FilePath = ""
    train: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.rows < 1:
            yield f"rows={self.rows} must be at least 1."


def profile(own: ProfileSettings) -> int:
    """Steps of the training that the settings describe, on random tokens, by torch's profiler."""
    settings = compose("config", list(own.train))
    vocab_size = settings.data.vocab_size if settings.data.tokenizer == "bpe" else 50257
    config = replace(settings.model, vocab_size=vocab_size)
    device = Device(settings.training.device, settings.training.precision)
    tokens = Tokens([np.random.default_rng(0).integers(0, vocab_size, 2_000_000, dtype=np.uint16)])
    loader = Loader([tokens], config.block_size, settings.training.batch_size)
    model = GPT(config).to(device.torch)
    optimizers = Optimizers(model.parameters_by_role(), settings.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def step(number: int) -> None:
        times = [time.perf_counter()]
        loss = loss_of(model, loader.batch(number), device, None)
        device.synchronize()
        times.append(time.perf_counter())
        scaler.scale(loss).backward()
        device.synchronize()
        times.append(time.perf_counter())
        optimizers.step(scaler, optimizers.gradient_norm(scaler), settings.optim.grad_clip)
        device.synchronize()
        times.append(time.perf_counter())
        for part, start, end in zip(parts.values(), times, times[1:], strict=False):
            part.append(end - start)

    for number in range(8):
        step(number)
    medians = {name: 1000 * statistics.median(part[2:]) for name, part in parts.items()}
    total = sum(medians.values())
    print(f"torch {torch.__version__}, {device.describe()}; {loader.tokens_per_step:,} tokens a step\n\n"
          "| part | ms | share |\n|---|---|---|")
    for name, milliseconds in medians.items():
        print(f"| {name} | {milliseconds:.1f} | {milliseconds / total:.0%} |")
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities, record_shapes=True) as found:
        for number in range(3):
            step(number)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages(group_by_input_shape=True).table(sort_by=by, row_limit=own.rows, max_shapes_column_width=60,
                                                              max_name_column_width=40))
    if own.trace:
        found.export_chrome_trace(own.trace)
        print(f"Wrote {own.trace}")
    return 0

