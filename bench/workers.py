"""Several processes that train together, on CPUs, beside one process with all threads.

  python -m bench workers
  python -m bench workers shape=gpt2 rounds=1

Each side runs in processes of its own, in turn, started as torchrun starts them; medians are
printed. The step has the same micro-steps on all sides. Waiting is the time in which a process does
nothing but wait for gradients, weights or numbers of the others. Then the sum of gradients in a
binary tree is timed beside plain accumulation, in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from bench import timing
from bench.speed import SHAPES, random_loader
from data.loader import Prefetch
from model import GPT, GPTConfig
from setting import setting
from training.buckets import GradientBuckets
from training.config import OptimConfig
from training.configure import configure
from training.device import Device
from training.distributed import World
from training.interrupt import Interrupt
from training.optim import Optimizers, own_states
from training.step import BatchLoss, accumulate_gradients
from training.tree_sum import TreeSum

# The number of processes, and of threads of each. The first is what others are compared with.
SIDES = ((1, 2), (1, 1), (2, 1))


@dataclass(frozen=True)
class WorkersSettings(timing.BenchSettings):
    """Settings of the benchmark of several processes."""

    shape: Literal["wide", "narrow", "gpt2"] = setting("wide", "gpt2 is GPT-2 124M")
    optimizer: Literal["adamw", "muon"] = setting("muon", "of the step")
    micro_steps: int = setting(4, "of a step, of all processes together", ge=2)
    seconds: float = setting(5.0, "of timed steps in each process", gt=0, lt=3600)

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        yield from super().problems()
        if self.micro_steps % 2:
            yield f"micro_steps={self.micro_steps} cannot be divided among 2 processes."


def main(settings: WorkersSettings) -> int:
    device = Device("cpu")
    config, batch_size = SHAPES[settings.shape]
    print(f"torch {torch.__version__}, {device.describe()}; {settings.micro_steps} x {batch_size} "
          f"sequences of {config.block_size} tokens a step, {settings.optimizer}\n")
    runs = timing.in_turn(SIDES, settings.rounds, lambda side: timing.measure_in_process(
        "bench.workers", settings.shape, settings.optimizer, settings.micro_steps, side[1],
        settings.seconds, processes=side[0]))

    timing.print_header("processes x threads", "step, s", "x", "waiting", "memory of each, MB", "x",
                        "optimizer state of each, MB")
    first = runs[SIDES[0]]
    for (processes, threads), of_side in runs.items():
        median = timing.medians(of_side)
        waiting = statistics.median(run["waiting"] / run["seconds"] for run in of_side)
        timing.print_row(f"{processes} x {threads}", f"{median['seconds']:.3f}",
                         f"{timing.median_ratio(of_side, first, 'seconds'):.2f}", f"{waiting:.1%}",
                         f"{median['peak_bytes'] / 2**20:,.0f}",
                         f"{timing.median_ratio(of_side, first, 'peak_bytes'):.2f}",
                         f"{median['state_bytes'] / 2**20:,.1f}")

    cost = sum_seconds(config, batch_size, settings, device)
    print(f"\nOne process, {torch.get_num_threads()} threads: gradients added in a tree instead of "
          f"in place: step x {cost['tree'] / cost['plain']:.3f}")
    timing.write_json(settings.out, {"runs": list(runs.values()), "sum": cost})
    return 0


class TimedWorld(World):
    """Counts the seconds in which this process waits for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0.0

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.waiting += time.perf_counter() - start
        return result

    def gather(self, values: Tensor) -> Tensor:
        return self.timed(super().gather, values)

    def share(self, parts: list[list[Tensor]]) -> None:
        self.timed(super().share, parts)

    def exchange(self, sent: Tensor, sizes: list[int]) -> tuple[Tensor, SimpleNamespace]:
        received, work = super().exchange(sent, sizes)
        return received, SimpleNamespace(wait=lambda: self.timed(work.wait))


def measure(shape: str, optimizer: str, micro_steps: int, threads: int,
            least_seconds: float) -> dict[str, Any] | None:
    """The median seconds of a step, and the memory of the largest process; in rank 0 only."""
    torch.set_num_threads(threads)
    config, batch_size = SHAPES[shape]
    world = TimedWorld()
    with world.joined():
        device = Device("cpu")
        configure(device)
        torch.manual_seed(0)
        model = GPT(config)
        optim = OptimConfig(optimizer=optimizer)
        optimizers = Optimizers(model.parameters_by_role(), optim, world)
        buckets = GradientBuckets(world, list(model.parameters()), optimizers.parts)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loader = random_loader(config, batch_size, micro_steps // world.size, world.size)
        batches = Prefetch(loader, device.torch, world.rank)
        seconds, waiting = [], []
        # The first two steps warm up.
        while len(seconds) < 5 or world.agree(sum(seconds[2:]), False)[0] < least_seconds:
            start, world.waiting = time.perf_counter(), 0.0
            losses = accumulate_gradients(BatchLoss(model, device), batches, buckets, scaler,
                                          len(seconds), 0, Interrupt())
            norm = optimizers.gradient_norm(scaler)
            world.gather(losses)
            optimizers.step(scaler, norm, optim.grad_clip)
            waiting.append(world.waiting)
            seconds.append(time.perf_counter() - start)
        state = sum(tensor.nbytes for _, tensor in own_states(optimizers).values())
        largest = world.gather(torch.tensor([[timing.peak_bytes(), state]])).amax(0).tolist()
    if not world.is_first:
        return None
    return {"seconds": statistics.median(seconds[2:]), "waiting": statistics.median(waiting[2:]),
            "peak_bytes": largest[0], "state_bytes": largest[1]}


def sum_seconds(config: GPTConfig, batch_size: int, settings: WorkersSettings,
                device: Device) -> dict[str, float]:
    """The median seconds of a step's gradients, added in a tree and in place."""
    model = GPT(config)
    loss_fn = BatchLoss(model, device)
    loader = random_loader(config, batch_size, settings.micro_steps)
    parameters = list(model.parameters())

    def step(in_tree: bool) -> None:
        total = TreeSum(parameters, settings.micro_steps)
        for micro_step in range(settings.micro_steps):
            loss_fn(loader.batch(0, micro_step)).backward()
            if in_tree:
                total.after_backward(micro_step)
        if in_tree:
            total.finish()
        model.zero_grad()

    calls = {"plain": lambda: step(False), "tree": lambda: step(True)}
    return timing.alternating_medians(calls, 3 * settings.rounds)
