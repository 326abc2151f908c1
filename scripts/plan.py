"""Print what a training run needs, without training: parameters, FLOPs, memory, disk and time.

  python -m scripts.plan experiment=gpt2_124m data.path=folder
  python -m scripts.plan model=gpt2-medium training.batch_size=8 measure=false
  python -m scripts.plan model=gpt2-xl data=hub ranks=8 device=h100

Takes all settings of train.py, too. Memory is counted in a training step on tensors that have
shapes but no content. On a CPU, the memory of the process without a model and the fragmentation of
the heap are added. The data need not exist; their number of tokens is known once they are prepared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.launch import launch
from setting import ScriptSettings, setting
from training.gpus import GPU_GIGABYTES, PEAK_FLOPS, gpu_named, gpu_problems


@dataclass(frozen=True)
class PlanSettings(ScriptSettings):
    """The settings of a plan; all others are those of train.py."""

    measure: bool = setting(True, "time a few micro-steps on this machine; false prints no time")
    device: str = setting(
        "", "plan for another GPU by its data sheet, such as h100; device=? lists them")
    mfu: float = setting(
        0.4, "part of that GPU's peak FLOP/s that training is assumed to reach", gt=0, le=1)
    ranks: int = setting(1, "plan for this number of processes of torchrun", ge=1, le=2**20)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.device:
            yield from gpu_problems(self.device)


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.plan:main", PlanSettings, __doc__)

import math
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpointing import memory_plan
from checkpointing.initial import shape_of_weights
from conf.schema import compose
from conf.settings import Settings
from conf.yaml_files import ConfigError
from data.chat import MARKERS
from data.config import DataConfig
from data.loader import Loader
from data.prepare import planned
from data.shards import Tokens, read_meta
from data.tokenizer_json import planned_size
from hardware import available_memory, free_space
from model import GPT
from terminal import counted, readable_size, readable_time, say
from training.configure import configure
from training.device import Device
from training.estimate import Pace, Workload, measure_pace
from training.step import BatchLoss, first_loss

# The vocabulary of characters of a text that is not prepared: that of Tiny Shakespeare.
ASSUMED_CHARACTERS = 65
# Memory of activations on a CPU divided by their bytes, because of holes in the heap. Measured: 1.1
# to 1.8, see docs/benchmarks.md.
CPU_FRAGMENTATION = 1.4
CPU_RUNTIME = 50 * 2**20  # bytes that torch takes once it computes


def main(plan: PlanSettings) -> int:
    # What the process holds before it plans anything.
    process_bytes = resident_bytes()
    settings, has_data = settings_without_data(list(plan.train))
    gpu = gpu_named(plan.device)
    if gpu:
        # Counting computes nothing: its memory is counted on a CPU, in the GPU's precision.
        device = Device("cpu", "bf16")
    else:
        device = Device(settings.training.device, settings.training.precision)
    configure(device)

    # The size of the vocabulary is that of the data, the shape that of the weights to start from.
    vocab_size, meta, description = describe_data(settings.data, has_data)
    shape = shape_of_weights(settings)
    settings = replace(settings, model=replace(shape, vocab_size=vocab_size))
    say(f"Data: {description}")

    # Print the parts of the plan.
    flops = plan_model(settings, meta)
    state_bytes, peak_bytes = plan_memory(plan, settings, device, gpu, process_bytes)
    plan_disk(settings, state_bytes)
    for warning in settings.warnings():
        say(f"Warning: {warning}")
    if gpu:
        say(f"Time: {time_by_data_sheet(plan, gpu, flops)}")
    # Only this machine can be timed, with one process.
    elif plan.ranks > 1:
        say("Time: is planned for one process, or by device=")
    elif plan.measure and peak_bytes > available_memory():
        say(f"Time: not measured, because only {readable_size(available_memory())} of memory "
            "are free")
    elif plan.measure:
        say("Timing a few micro-steps (measure=false skips this) ...", sys.stderr)
        pace = pace_of(settings, device, meta)
        say(f"Time: {pace.describe(settings.training)} ({device.describe()})")
    return 0


def settings_without_data(overrides: list[str]) -> tuple[Settings, bool]:
    """The settings of a command line, and whether the data that they name exist."""
    try:
        return compose("config", overrides), True
    except ConfigError:
        # With data that exist, all other problems are still reported.
        existing = ["data.mix=pydocs:1", "data.path=", "data.val_path=", "data.val_split="]
        return compose("config", [*overrides, *existing]), False


def describe_data(config: DataConfig,
                  exists: bool = True) -> tuple[int, dict[str, Any] | None, str]:
    """The size of the vocabulary, the metadata of prepared tokens if there are any, and a line."""
    state = "not looked up" if exists else "not found"
    # Other sources cannot be looked up without a network.
    if exists and config.source in ("pydocs", "stdlib", "text", "chat") and not config.mix:
        folder = planned(config).folder
        if folder.is_dir():
            meta = read_meta(folder)
            n_tokens = meta["splits"]["train"]["tokens"]
            return meta["vocab_size"], meta, f"{n_tokens:,} training tokens ({folder})"
        state = "not prepared yet"
    size = planned_size(config.tokenizer, config.vocab_size) or ASSUMED_CHARACTERS
    if config.source == "chat":
        size += len(MARKERS)
    source = "assumed" if config.tokenizer == "char" else f"of {config.tokenizer}"
    return size, None, f"{state}; a vocabulary of {size:,} ({source})"


def plan_model(settings: Settings, meta: dict[str, Any] | None) -> float:
    """Print parameters, tokens and FLOPs; return the FLOPs."""
    # The model, without memory for its weights.
    training = settings.training
    block_size = settings.model.block_size
    model = GPT.empty(settings.model)
    counts = model.parameter_counts()
    n_parameters = sum(counts.values())
    say(f"Model: {n_parameters:,} parameters")
    for role, count in counts.items():
        say(f"  {role:<10} {count:>15,}")

    # The tokens of the training, also in epochs and per parameter.
    tokens_per_step = training.batch_size * block_size * training.micro_steps(block_size)
    tokens = tokens_per_step * training.max_steps
    line = f"Tokens: {tokens:,}, in {counted(training.max_steps, 'step')} of {tokens_per_step:,}"
    if meta:
        epochs = tokens / meta["splits"]["train"]["tokens"]
        line += f"; {epochs:,.1f} epochs"
    say(f"{line}; {tokens / n_parameters:,.1f} per parameter")

    flops = model.flops_per_token() * tokens
    say(f"FLOPs: {flops:.3g}, {model.flops_per_token() / 1e6:,.1f} M per token")
    return flops


def plan_memory(plan: PlanSettings, settings: Settings, device: Device, gpu: str,
                process_bytes: int) -> tuple[int, float]:
    """Print the memory of a process, and whether it fits into the GPU.

    Returns the bytes of the state that checkpoints save, and those of a process at its peak.
    """
    # Count the memory of one process, on the GPU that is planned for.
    gpu_bytes = 0
    if gpu:
        gpu_bytes = GPU_GIGABYTES[gpu] * 2**30
    elif device.type == "cuda":
        gpu_bytes = memory_plan.memory_limit(device)
    state_bytes, step_bytes = memory_plan.count_memory(settings, device, gpu_bytes)

    # Several processes may each have all weights, or a part of them.
    several = plan.ranks > 1
    for shard in ("none", "full") if several else ("none",):
        memory = memory_plan.memory_of_each(settings, state_bytes, step_bytes, plan.ranks,
                                            sharded=shard == "full")
        # Saving copies the state, and may continue beside the next step.
        saved = state_bytes / plan.ranks
        while_saving = memory["weights and optimizer"] + saved
        if device.type == "cpu" and not gpu:
            memory["activations"] *= CPU_FRAGMENTATION
            memory["Python and torch"] = process_bytes + CPU_RUNTIME
            while_saving += memory["Python and torch"]
        peak_bytes = max(sum(memory.values()), while_saving)
        title = f" of each of {plan.ranks} processes, training.shard={shard}" if several else ""
        say(f"Memory{title}: {readable_size(peak_bytes)} at the peak; while a checkpoint is saved, "
            f"{readable_size(saved)} more if they are free")
        for name, nbytes in memory.items():
            say(f"  {name:<22} {readable_size(nbytes):>10}")

    # The last choice is the one that needs least.
    if gpu_bytes and peak_bytes > memory_plan.USABLE_MEMORY * gpu_bytes:
        fitting = memory_plan.fitting_batch_size(settings, device, gpu_bytes, plan.ranks, several)
        advice = f"training.batch_size={fitting} does"
        if not fitting:
            advice = "nor does training.batch_size=1"
        say(f"Warning: this does not fit into the {readable_size(gpu_bytes)} of "
            f"{gpu or device.name()}; {advice}")
    return state_bytes, peak_bytes


def plan_disk(settings: Settings, state_bytes: int) -> None:
    """Print the disk space that checkpoints take."""
    training = settings.training
    every = training.checkpoint_every or training.max_steps
    # The newest ones and the best one.
    kept = min(math.ceil(training.max_steps / every), training.keep_last + 1)
    _, free = free_space(Path(settings.runs_dir))
    say(f"Disk: {readable_size((kept + 1) * state_bytes)} for checkpoints of "
        f"{readable_size(state_bytes)}: {kept} that are kept, and one that is being written; "
        f"{readable_size(free)} are free")


def time_by_data_sheet(plan: PlanSettings, gpu: str, flops: float) -> str:
    """The time of training on another GPU, in words."""
    peak = PEAK_FLOPS[gpu]
    seconds = flops / (peak * plan.mfu) / plan.ranks
    gpus = f"one {gpu}" if plan.ranks == 1 else f"{plan.ranks} x {gpu}"
    return (f"about {readable_time(seconds)} on {gpus}, if training reaches {plan.mfu:.0%} of the "
            f"{peak / 1e12:,.0f} TFLOP/s for bf16 in its data sheet (mfu={plan.mfu}), without "
            "evaluation and saving")


def pace_of(settings: Settings, device: Device, meta: dict[str, Any] | None) -> Pace:
    """The time of a step and of an evaluation, measured by micro-steps on random tokens."""
    # A loader of random tokens.
    config, training = settings.model, settings.training
    n_tokens = 4 * training.batch_size * config.block_size + 1
    ids = np.random.default_rng(0).integers(0, config.vocab_size, n_tokens, dtype=np.uint32)
    loader = Loader([Tokens([ids])], config.block_size, training.batch_size)
    boundary = 0 if settings.data.respect_documents else None

    # Time micro-steps, and scale evaluation by the tokens that it reads.
    model = GPT(config).to(device.torch)
    eval_tokens = training.eval_tokens
    if meta:
        eval_tokens = min(eval_tokens, meta["splits"]["val"]["tokens"])
    work = Workload(training, settings.optim, model.parameters_by_role(),
                    training.micro_steps(config.block_size),
                    math.ceil(eval_tokens / config.block_size))
    loss_fn = BatchLoss(model, device, boundary)
    return measure_pace(first_loss(loss_fn, loader.batch(0)), work, device)


def resident_bytes() -> int:
    """The memory that this process holds now.

    Its maximum so far would include that of the process that started it.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # Not Linux.
        maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return maximum if sys.platform == "darwin" else 1024 * maximum
