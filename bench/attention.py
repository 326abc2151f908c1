"""Time the steps from one head after the other to the fused block: forward, and forward with backward.

  python -m bench.attention

Settings, each with its default:
  rounds=15        each round times every way once, in turn; medians are printed
  device=auto  precision=auto
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    place = "bench.attention"
    launch(f"{place}:main", f"{place}:BenchAttentionSettings", __doc__)

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from model import attention
from model.reference import MultiHeadAttention, MultiHeadAttentionWrapper, fuse
from training.device import Device

SIZES = {"batch 32, 128 positions, width 256, 4 heads": (32, 128, 256, 4),
         "batch 4, 1,024 positions, width 768, 12 heads": (4, 1024, 768, 12)}


@dataclass(frozen=True)
class BenchAttentionSettings:
    """How attention is timed."""

    rounds: int = 15  # each times every way once; the medians count
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.rounds < 1:
            yield f"rounds={self.rounds} must be at least 1."


def main(settings: BenchAttentionSettings) -> int:
    device = Device(settings.device, settings.precision)
    print(f"torch {torch.__version__}, {device.describe()}; medians of {settings.rounds} alternating rounds")
    for name, (B, T, C, H) in SIZES.items():
        torch.manual_seed(0)
        x = torch.randn(B, T, C, device=device.torch, requires_grad=True)
        ways = make_ways(C, T, H, device.torch)
        forward = medians({way: once(device, module, x, backward=False) for way, module in ways.items()}, settings.rounds)
        both = medians({way: once(device, module, x, backward=True) for way, module in ways.items()}, settings.rounds)
        print(f"\n{name}\n\n| way | forward, ms | x | forward + backward, ms | x |\n|---|---|---|---|---|")
        for way in ways:
            print(f"| {way} | {1000 * forward[way]:.1f} | {forward['head by head'] / forward[way]:.2f} "
                  f"| {1000 * both[way]:.1f} | {both['head by head'] / both[way]:.2f} |")
    return 0


def make_ways(C: int, T: int, H: int, device: torch.device) -> dict[str, nn.Module | Callable[[Tensor], Tensor]]:
    """The same kind of function of `[B, T, C]` five times, each with an output projection."""
    split = MultiHeadAttention(C, C, T, 0.0, H, qkv_bias=True).to(device)
    fused = fuse(split)
    wrapper = nn.Sequential(MultiHeadAttentionWrapper(C, C // H, T, 0.0, H, qkv_bias=True), nn.Linear(C, C)).to(device)

    def by_kernel(x: Tensor) -> Tensor:
        with patch.object(attention, "products_are_faster", lambda v: False):
            return fused(x)

    return {"head by head": wrapper, "split projections": split,
            "one projection, plain products": lambda x: fused.explicit(x)[0],
            "one projection, fused kernel": by_kernel,
            "the block, which chooses": fused}


def once(device: Device, call: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], None]:
    """One pass to be timed, as training has it."""
    def run() -> None:
        with device.autocast(), torch.set_grad_enabled(backward):
            y = call(x)
        if backward:
            y.sum().backward()
        device.synchronize()
    return run


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds a call: all calls in turn, `rounds` times, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}
