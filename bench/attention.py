"""Ways to compute attention, from one head after the other to the fused block: seconds of each.

  python -m bench attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.timing import alternating_medians, print_header, print_row
from model import attention
from model.reference import MultiHeadAttention, MultiHeadAttentionWrapper, fuse
from setting import SettingsBase, setting
from training.configure import configure
from training.device import Device

Module = Callable[[Tensor], Tensor]  # from `[B, T, C]` to `[B, T, C]`
SIZES = {
    "batch 32, 128 positions, width 256, 4 heads": (32, 128, 256, 4),
    "batch 4, 1,024 positions, width 768, 12 heads": (4, 1024, 768, 12),
}


@dataclass(frozen=True)
class AttentionSettings(SettingsBase):
    """Settings of the benchmark of attention."""

    rounds: int = setting(15, "each round times every way once; medians are printed", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "to compute on")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "of the products")


def main(settings: AttentionSettings) -> int:
    device = Device(settings.device, settings.precision)
    configure(device)
    print(f"torch {torch.__version__}, {device.describe()}; "
          f"medians of {settings.rounds} alternating rounds")
    for name, (B, T, C, H) in SIZES.items():
        torch.manual_seed(0)
        x = torch.randn(B, T, C, device=device.torch, requires_grad=True)
        modules = make_modules(C, T, H, device.torch)
        forward = time_modules(modules, x, device, settings.rounds, backward=False)
        both = time_modules(modules, x, device, settings.rounds, backward=True)
        print(f"\n{name}\n")
        print_header("way", "forward, ms", "x", "forward + backward, ms", "x")
        for way in modules:
            print_row(way, f"{1000 * forward[way]:.1f}",
                      f"{forward['head by head'] / forward[way]:.2f}",
                      f"{1000 * both[way]:.1f}", f"{both['head by head'] / both[way]:.2f}")
    return 0


def make_modules(C: int, T: int, H: int, device: torch.device) -> dict[str, Module]:
    """Causal attention with an output projection, in five ways."""
    one_by_one = MultiHeadAttentionWrapper(C, C // H, T, 0.0, H, qkv_bias=True)
    wrapper = nn.Sequential(one_by_one, nn.Linear(C, C)).to(device)
    split = MultiHeadAttention(C, C, T, 0.0, H, qkv_bias=True).to(device)
    fused = fuse(split)

    def with_kernel(x: Tensor) -> Tensor:
        with patch.object(attention, "unfused_is_faster", lambda v: False):
            return fused(x)

    return {
        "head by head": wrapper,
        "split projections": split,
        "one projection, plain products": lambda x: fused.forward_with_weights(x)[0],
        "one projection, fused kernel": with_kernel,
        "the block, which chooses": fused,
    }


def time_modules(modules: dict[str, Module], x: Tensor, device: Device, rounds: int,
                 backward: bool) -> dict[str, float]:
    """Median seconds of a forward pass of each module, with or without its backward pass."""
    def run_once(module: Module) -> None:
        with device.autocast(), torch.set_grad_enabled(backward):
            y = module(x)
        if backward:
            y.sum().backward()
        device.synchronize()

    return alternating_medians({way: partial(run_once, module) for way, module in modules.items()},
                               rounds)
