"""The settings of a training: how weights are updated, how long it lasts, how often it evaluates and saves.

This module does not import torch, so that settings are checked before torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimConfig:
    """How weights change. The defaults are GPT-2's and GPT-3's usual ones (arXiv:2005.14165, table 2.1)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-4  # of AdamW: everything with adamw; embeddings, head, gains and biases with muon
    muon_lr: float = 0.02  # of Muon: the blocks' matrices; the spectral norm of an update, not an AdamW rate
    weight_decay: float = 0.1  # of matrices and embeddings; gains and biases are never decayed
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of Muon
    grad_clip: float = 1.0  # the largest norm of all gradients together; 0 for no limit
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.5  # wsd: the last part of the run, in which the rate falls
    min_lr_ratio: float = 0.1  # cosine and wsd end at this part of the rate

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        for name in ("lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"{name}={getattr(self, name)} must be more than 0; {name}={getattr(OptimConfig, name)} is usual."
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"{name}={getattr(self, name)} must be at least 0."
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must satisfy 0 <= {name} < 1."
        for name in ("decay_fraction", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name}={getattr(self, name)} must lie between 0 and 1."

    def last_full_step(self, max_steps: int) -> int:
        """The last step, from 0, at which the rate can be whole: a longer warm-up never gets there."""
        if self.schedule == "wsd":
            return min(max_steps - 1, self.decay_start(max_steps))
        return max_steps - 1

    def decay_start(self, max_steps: int) -> int:
        """The step at which the wsd schedule begins to fall."""
        return round(max_steps * (1 - self.decay_fraction))

# Of a micro-step. A larger number is a mistake, and a batch of it would not fit in memory.
MOST_SEQUENCES = 2**16


@dataclass(frozen=True)
class TrainingConfig:
    """The course of a run. A step is one optimizer update; a micro-step one forward and backward of it."""

    max_steps: int = 260
    max_seconds: float | None = None  # of training; whichever limit comes first ends the run
    batch_size: int = 32  # sequences in a micro-step
    tokens_per_step: int | None = None  # more than one micro-step holds: gradients are accumulated
    eval_every: int = 130  # steps; 0: only after the last one, which is always evaluated
    patience: int = 0  # stop after so many evaluations in a row without a new lowest loss; 0: never
    eval_tokens: int = 2**18  # of the validation split, from its start; a smaller split is read whole
    sample_tokens: int = 48  # the length of the sample at each evaluation; 0 for none, at the end neither
    checkpoint_every: int = 130  # steps; 0: only after the last one, which is always saved
    keep_last: int = 2  # checkpoints, beside the best one
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: int = 0  # on a CPU; 0: as many as the machine has cores, or as the run began with
    compile: Literal["auto", "true", "false"] = "auto"
    recompute: bool = False  # keep less for the backward pass and compute it again: less memory, about a sixth more time
    deterministic: bool = False  # on a GPU: only kernels that give the same bits each time, where torch has them
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # what to do when a loss or gradient is NaN or infinite
    nonfinite_limit: int = 5  # skip and rollback: how often in a run; the next one stops it
    on_save_error: Literal["continue", "stop"] = "continue"  # when a checkpoint cannot be written, as on a full disk

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        for name in ("max_steps", "batch_size", "eval_tokens", "keep_last"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        for name in ("eval_every", "patience", "checkpoint_every", "sample_tokens", "nonfinite_limit",
                     "threads"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must be at least 0."
        if self.batch_size > MOST_SEQUENCES:
            yield f"batch_size={self.batch_size} must be at most {MOST_SEQUENCES}."
        if self.threads > 1024:
            yield f"threads={self.threads} must be at most 1024."
        if self.max_steps >= 2**63:
            yield f"max_steps={self.max_steps} is too large to count."
        if self.patience > 0 and self.eval_every == 0:
            yield f"patience={self.patience} counts evaluations, and eval_every=0 asks for none: raise eval_every."
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            yield f"max_seconds={self.max_seconds} must be more than 0, or null for no limit."

    def reached(self, step: int, seconds: float, stale_evaluations: int = 0) -> str:
        """The limit that ends the run here, if one does."""
        if step >= self.max_steps:
            return "max_steps"
        if self.max_seconds and seconds >= self.max_seconds:
            return "max_seconds"
        return "patience" if self.patience and stale_evaluations >= self.patience else ""

    def evaluates(self, step: int) -> bool:
        """Whether `eval_every` asks for an evaluation after `step` steps."""
        return self.eval_every > 0 and step % self.eval_every == 0

    def evaluations(self, step: int, steps: int) -> int:
        """How many evaluations the `steps` steps after `step` have; the last step always has one."""
        if steps <= 0:
            return 0
        if not self.eval_every:
            return 1
        last = step + steps
        return last // self.eval_every - step // self.eval_every + (last % self.eval_every > 0)

    def saves(self, step: int) -> bool:
        """Whether `checkpoint_every` asks for a checkpoint after `step` steps; one of step 0 is always as planned."""
        return step == 0 or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)

    def micro_steps(self, block_size: int, world_size: int = 1) -> int:
        """How many micro-steps make a step. Raises ValueError where `tokens_per_step` is not a whole number of them."""
        one = self.batch_size * block_size * world_size
        if self.tokens_per_step is None:
            return 1
        if self.tokens_per_step < one or self.tokens_per_step % one:
            nearest = max(1, round(self.tokens_per_step / one)) * one
            raise ValueError(f"training.tokens_per_step={self.tokens_per_step} is not a multiple of the {one} tokens of a "
                             f"micro-step (batch_size={self.batch_size} x block_size={block_size}): try {nearest}.")
        return self.tokens_per_step // one
