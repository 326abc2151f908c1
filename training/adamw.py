"""AdamW (arXiv:1711.05101), by torch's fused kernels."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from training.muon import WithoutCompiler

# torch's default.
ADAM_EPSILON = 1e-8


class AdamW(WithoutCompiler, torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, with its state created at once: checkpoint sizes need it."""

    STATE = ("step", "exp_avg", "exp_avg_sq")
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float],
                 epsilon: float = ADAM_EPSILON) -> None:
        super().__init__(params, lr, betas, epsilon, fused=True)
        for group in self.param_groups:
            for weights in group["params"]:
                self.state[weights] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weights.device),
                    "exp_avg": torch.zeros_like(weights),
                    "exp_avg_sq": torch.zeros_like(weights),
                }
