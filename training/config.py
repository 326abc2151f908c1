"""The settings of a training: the optimizer, the length of the run, evaluation, records.

This module does not import torch, so that settings are checked before torch is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from setting import SettingsBase, setting
from terminal import counted


@dataclass(frozen=True)
class OptimConfig(SettingsBase):
    """The optimizer. The defaults are those of GPT-2 and GPT-3 (arXiv:2005.14165, table 2.1)."""

    # The optimizers.
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon updates the matrices of the blocks with Muon, the rest with AdamW")
    lr: float = setting(6e-4, "learning rate of AdamW", gt=0)
    # The spectral norm of an update: not comparable to a learning rate of AdamW.
    muon_lr: float = setting(0.02, "learning rate of Muon", gt=0)
    ngram_lr_ratio: float = setting(
        1.0, "learning rate of the table of n-grams, as a fraction of AdamW's", gt=0)
    weight_decay: float = setting(0.1, "for matrices and embeddings, not gains and biases", ge=0)
    beta1: float = setting(0.9, "AdamW's decay rate of the gradients' mean", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay rate of the squared gradients' mean", ge=0, lt=1)
    momentum: float = setting(0.95, "momentum of Muon", ge=0, lt=1)
    normalize_rows: bool = setting(False, "Muon: the rows of an update have equal norms")
    grad_clip: float = setting(1.0, "the largest norm of the gradient; 0: no clipping", ge=0)
    # The learning rate of each step, as a fraction of the full one: training/schedule.py.
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "of the learning rate after the warm-up; wsd: warm-up, stable, decay")
    warmup_steps: int = setting(0, "steps in which the learning rate rises from 0", ge=0)
    decay_fraction: float = setting(0.5, "the decay of wsd, as a fraction of the steps", ge=0, le=1)
    min_lr_ratio: float = setting(
        0.1, "the last learning rate of cosine and wsd, as a fraction of the highest", ge=0, le=1)

    def last_full_step(self, max_steps: int) -> int:
        """The last step, from 0, that can have the full learning rate: warm-up must end by then."""
        if self.schedule == "wsd":
            return min(max_steps - 1, self.decay_start(max_steps))
        return max_steps - 1

    def decay_start(self, max_steps: int) -> int:
        """The step at which the decay of the wsd schedule begins."""
        return round(max_steps * (1 - self.decay_fraction))


@dataclass(frozen=True)
class TrainingConfig(SettingsBase):
    """The course of a run.

    A step is one update of the optimizer; a micro-step is one forward and backward pass of it.
    """

    # The length of the run, and the size of a step.
    max_steps: int = setting(260, "the run ends after this step", ge=1, lt=2**63)
    max_seconds: float | None = setting(None, "the run ends after this training time", gt=0)
    batch_size: int = setting(32, "sequences in a micro-step", ge=1, le=2**16)
    tokens_per_step: int | None = setting(
        None, "tokens in a step, over as many micro-steps as that takes", ge=1, le=2**32)
    # Evaluation, and samples of the model's text.
    eval_every: int = setting(130, "steps; 0: evaluate only after the last step", ge=0)
    patience: int = setting(
        0, "stop after this many evaluations in a row without a lower loss; 0: never", ge=0)
    eval_tokens: int = setting(2**18, "tokens of the validation split to evaluate on", ge=1)
    eval_tasks: str = setting(
        "", "tasks to measure at each evaluation, as in hellaswag:100,piqa:50 (docs/evaluation.md)")
    sample_tokens: int = setting(48, "length of the sample at each evaluation; 0: none", ge=0)
    # Checkpoints.
    checkpoint_every: int = setting(130, "steps; 0: save only after the last step", ge=0)
    keep_last: int = setting(2, "checkpoints to keep, besides the best one", ge=1)
    # The machine: speed and memory.
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "number format of matrix products")
    threads: int = setting(
        0, "on a CPU; 0: one for each core, or as before when a run resumes", ge=0, le=1024)
    compile: Literal["auto", "true", "false"] = setting("auto", "use torch.compile")
    recompute: bool = setting(
        False, "recompute activations in the backward pass: less memory, a sixth more time")
    shard: Literal["auto", "none", "full"] = setting(
        "auto", "full: each process has a part of the weights (FSDP2); auto: if they do not fit")
    deterministic: bool = setting(
        False, "on a GPU, use only deterministic kernels where torch has them")
    # Failures.
    on_nonfinite: Literal["stop", "skip", "rollback"] = setting(
        "stop", "the reaction to a loss or gradient that is NaN or infinite")
    nonfinite_limit: int = setting(5, "skips or rollbacks in a run; the next one stops it", ge=0)
    on_save_error: Literal["continue", "stop"] = setting(
        "continue", "the reaction to a checkpoint that cannot be written")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.shard == "full" and self.compile == "true":
            yield "shard=full does not support compile=true: leave one of them out."
        for task, count in self.tasks().items():
            if not task or not count.isdecimal() or int(count) < 1:
                yield (f"eval_tasks={self.eval_tasks}: write a task and a number of documents, as "
                       f"in hellaswag:100, instead of {f'{task}:{count}' if task else count}.")
        if self.eval_tasks and len(self.tasks()) <= self.eval_tasks.count(","):
            yield f"eval_tasks={self.eval_tasks} names a task twice: leave one of them out."
        if self.patience > 0 and self.eval_every == 0:
            yield (f"patience={self.patience} counts evaluations, and eval_every=0 asks for none: "
                   "raise eval_every.")

    def tasks(self) -> dict[str, str]:
        """The tasks in `eval_tasks`, each with its number of documents."""
        found = {}
        for part in self.eval_tasks.split(",") if self.eval_tasks else []:
            task, _, count = part.strip().rpartition(":")
            found[task] = count
        return found

    def reached(self, step: int, seconds: float, stale_evaluations: int = 0) -> str:
        """The name of the limit that ends the run at this point; empty if none does."""
        if step >= self.max_steps:
            return "max_steps"
        if self.max_seconds and seconds >= self.max_seconds:
            return "max_seconds"
        if self.patience and stale_evaluations >= self.patience:
            return "patience"
        return ""

    def evaluates(self, step: int) -> bool:
        """Whether `eval_every` asks for an evaluation after `step` steps."""
        return self.eval_every > 0 and step % self.eval_every == 0

    def evaluations(self, step: int, steps: int) -> int:
        """The number of evaluations in the `steps` steps after `step`; the last step has one."""
        if steps <= 0:
            return 0
        if not self.eval_every:
            return 1
        last = step + steps
        regular = last // self.eval_every - step // self.eval_every
        return regular if last % self.eval_every == 0 else regular + 1

    def saves(self, step: int) -> bool:
        """Whether `checkpoint_every` asks for a checkpoint after `step` steps; step 0 has one."""
        return step == 0 or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)

    def step_tokens(self, block_size: int) -> int:
        """The tokens of a step: those of a micro-step, unless `tokens_per_step` is set."""
        if self.tokens_per_step is None:
            return self.batch_size * block_size
        return self.tokens_per_step

    def micro_steps(self, block_size: int, world_size: int = 1) -> int:
        """The number of micro-steps of a step, for each of `world_size` processes.

        Raises ValueError where `tokens_per_step` is not a multiple of a micro-step's tokens, and
        where the processes cannot share the micro-steps equally.
        """
        one = self.batch_size * block_size
        tokens = self.step_tokens(block_size)
        if tokens < one or tokens % one:
            nearest = max(1, round(tokens / one)) * one
            raise ValueError(
                f"training.tokens_per_step={tokens} is not a multiple of the {one} tokens of a "
                f"micro-step ({self.batch_size} sequences of {block_size}): try {nearest}.")
        if tokens // one % world_size:
            raise ValueError(self.indivisible(tokens, block_size, world_size))
        return tokens // one // world_size

    def indivisible(self, tokens: int, block_size: int, world_size: int) -> str:
        """The message that several processes cannot share the micro-steps of a step."""
        micro_steps = tokens // (self.batch_size * block_size)
        message = (f"{counted(micro_steps, 'micro-step')} a step ({tokens} tokens, batch_size="
                   f"{self.batch_size} x block_size={block_size}) cannot be divided among "
                   f"{world_size} processes: ")
        sequences = tokens // block_size
        if sequences % world_size:
            return message + "use another number of processes, or another training.tokens_per_step."
        each = sequences // world_size
        fitting = max(n for n in range(1, min(each, self.batch_size) + 1) if each % n == 0)
        return (message + f"for the same step, use training.batch_size={fitting} "
                f"training.tokens_per_step={tokens}.")


@dataclass(frozen=True)
class LoggerConfig:
    """The records of a run besides the metrics in its folder."""

    wandb: Literal["disabled", "offline", "online"] = setting(
        "disabled", "copy the metrics to Weights & Biases")
    project: str = setting("nanohydra", "the W&B project")
    group: str = setting("", "the W&B group; in a sweep, empty: the sweep's name")
    tags: str = setting("", "W&B tags, separated by spaces")
    report: bool = setting(True, "write report.html to the run's folder at the end")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.project:
            yield "project is empty: name the W&B project."
