"""Say what a training will take, without training: parameters, tokens, FLOPs, memory, disk, and time.

  python -m scripts.plan experiment=gpt2_124m data.path=folder
  python -m scripts.plan model=gpt2-medium training.batch_size=8 measure=false

Takes the settings of train.py, and
  measure=true     time a few micro-steps of the model on this machine, as train.py does; false says no time
  device=h100      plan for a GPU that is not here, by its data sheet: a10, a10g, a100, h100,
                   h100-pcie, h200, l4, l40s, rtx-3090, rtx-4090
  mfu=0.4          the part of the data sheet's FLOP/s that training is assumed to reach there

Memory is counted in a step of the training itself, on tensors that have shapes but no content; on a CPU comes what the
process takes without a model, and what the heap loses to holes. Data need not be there; how many tokens they have is
known once they are prepared.
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.plan:plan", "scripts.plan:PlanSettings", __doc__)

import math
import os
import re
import resource
import shutil
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpointing.state import State
from conf.presets import ConfigError
from conf.schema import compose
from conf.settings import Settings
from data.loader import Loader
from data.prepare import planned
from data.shards import Tokens, read_meta
from data.sources import DataConfig
from data.tokenizer import ByteTokenizer
from model import GPT, Undrawn
from terminal import counted, readable_size, readable_time, say
from training.device import PEAK_FLOPS, Device, available_memory, configure
from training.estimate import measure_pace
from training.optim import Optimizers
from training.step import loss_of

ROOT = Path(__file__).parent.parent
GPUS = sorted(name.lower().replace(" ", "-") for name in PEAK_FLOPS)
PUBLISHED_SIZES = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}
ASSUMED_CHARACTERS = 65  # as many as Tiny Shakespeare has
CPU_HOLES = 1.4  # what activations take of the heap, by what they hold; measured 1.1 to 1.8, see docs/benchmarks.md
CPU_RUNTIME = 50 * 2**20  # that torch takes once it computes


@dataclass(frozen=True)
class PlanSettings:
    """How to plan; all other settings are the training's own."""

    measure: bool = True
    device: str = ""  # a GPU that is not here, by its name in PEAK_FLOPS; empty: this machine
    mfu: float = 0.4  # of such a GPU: the part of its peak that training reaches
    train: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.device and not gpu_named(self.device):
            yield f"device={self.device} is not known: choose one of {', '.join(GPUS)}."
        if not 0 < self.mfu <= 1:
            yield f"mfu={self.mfu} is a part of the peak: choose 0 < mfu <= 1; 0.4 is usual."


def plan(own: PlanSettings) -> int:
    settings, data_is_there = settings_without_data(list(own.train))
    limits, base = settings.training, resident()
    gpu = gpu_named(own.device)
    # Counting memory runs nothing, and what a GPU takes is counted on a CPU in its precision.
    device = Device("cpu", "bf16") if gpu else Device(limits.device, limits.precision)
    configure(device)
    vocab_size, prepared, data = look_up(settings.data, data_is_there)
    settings = replace(settings, model=replace(settings.model, vocab_size=vocab_size))
    say(f"Data: {data}")

    with Undrawn("meta"):
        model = GPT(settings.model)
    parts = {role: sum(weights.numel() for weights in of.values()) for role, of in model.parameters_by_role().items()}
    tokens_per_step = limits.batch_size * settings.model.block_size * limits.micro_steps(settings.model.block_size)
    tokens = tokens_per_step * limits.max_steps
    flops = model.flops_per_token() * tokens
    say(f"Model: {sum(parts.values()):,} parameters")
    for role, count in parts.items():
        say(f"  {role:<10} {count:>15,}")
    say(f"Tokens: {tokens:,}, in {counted(limits.max_steps, 'step')} of {tokens_per_step:,}"
          + (f"; {tokens / prepared['splits']['train']['tokens']:,.1f} epochs" if prepared else "")
          + f"; {tokens / sum(parts.values()):,.1f} a parameter")
    say(f"FLOPs: {flops:.3g}, {model.flops_per_token() / 1e6:,.1f} M a token")

    kept, peak = count_memory(settings, device)
    gradients = 4 * sum(parts.values())
    memory = {"weights and optimizer": kept, "gradients": gradients, "activations": max(0, peak - kept - gradients)}
    if device.type == "cpu" and not gpu:
        memory["activations"] *= CPU_HOLES
        memory["Python and torch"] = base + CPU_RUNTIME
    saving = 2 * kept + memory.get("Python and torch", 0)  # which makes a copy, and may go on beside the next step
    total = max(sum(memory.values()), saving)
    say(f"Memory: {readable_size(total)} at the peak; {readable_size(kept)} more, where they are free, while a save lasts")
    for what, nbytes in memory.items():
        say(f"  {what:<22} {readable_size(nbytes):>10}")
    most = min(occurrences(limits.max_steps, limits.checkpoint_every), limits.keep_last + 1)
    folder = Path(settings.runs_dir)
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    say(f"Disk: {readable_size((most + 1) * kept)} for checkpoints of {readable_size(kept)}: {most} that are kept, "
          f"and one that is being written; {readable_size(free)} are free")
    for warning in settings.warnings():
        say(f"Warning: {warning}")
    if gpu:
        seconds = flops / (PEAK_FLOPS[gpu] * own.mfu)
        say(f"Time: about {readable_time(seconds)} on one {gpu}, if training reaches "
            f"{own.mfu:.0%} of the {PEAK_FLOPS[gpu] / 1e12:,.0f} TFLOP/s that its data sheet has "
            f"for bf16 (mfu={own.mfu}); evaluation and saving come on top")
    elif own.measure and total > available_memory():
        say(f"Time: not measured, {readable_size(available_memory())} of memory are free")
    elif own.measure:
        say("Timing a few micro-steps (measure=false leaves that out) ...", sys.stderr)
        say(f"Time: {expected_time(settings, device, prepared)}")
    return 0


def settings_without_data(words: list[str]) -> tuple[Settings, bool]:
    """The settings of a command line, also where it names no data, and whether it names some."""
    try:
        return compose("config", words), True
    except ConfigError:
        # What is there is assumed to be the data, which leaves all other problems.
        some = ["data.mix=", "data.val_path=", f"data.path={ROOT}", "data.hub_name=a/b"]
        return compose("config", [*words, *some]), False


def gpu_named(name: str) -> str:
    """The GPU of PEAK_FLOPS that is called `name`, as in h100 or rtx-4090; empty for none."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for gpu in PEAK_FLOPS:
        full = gpu.lower().replace(" ", "")
        if plain in (full, full.removeprefix("rtx")):
            return gpu
    return ""


def look_up(config: DataConfig, is_there: bool = True) -> tuple[int, dict[str, Any] | None, str]:
    """The size of the vocabulary, what is known of the tokens if they are prepared, and a line about both."""
    sizes = PUBLISHED_SIZES | {"byte": ByteTokenizer.vocab_size, "bpe": config.vocab_size, "char": ASSUMED_CHARACTERS}
    size = sizes[config.tokenizer]
    # The others could not be found without a network.
    if is_there and config.source in ("pydocs", "stdlib", "text") and not config.mix:
        folder = planned(config)[0]
        if folder.is_dir():
            meta = read_meta(folder)
            return meta["vocab_size"], meta, f"{meta['splits']['train']['tokens']:,} tokens to train on ({folder})"
    sure = "assumed" if config.tokenizer == "char" else f"of {config.tokenizer}"
    known = "not looked into" if is_there else "not there"
    return size, None, f"{known}: a vocabulary of {size:,} ({sure})"


class Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be while it is active, as long as they live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = call(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        return result

    def change(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def count_memory(settings: Settings, device: Device) -> tuple[int, int]:
    """Bytes of what a checkpoint holds, and of the most that a step takes with it: counted in one, on empty tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch's own way to run a model without its memory

    scaler = torch.amp.GradScaler(device.type, enabled=False)
    with FakeTensorMode(), Counter() as counter, device.torch:
        model = GPT(settings.model)
        optimizers = Optimizers(model.parameters_by_role(), settings.optim)
        ids = torch.zeros((settings.training.batch_size, settings.model.block_size), dtype=torch.int64)
        for _ in range(2):
            loss_of(model, (ids, ids), device, 0 if settings.data.respect_documents else None).backward()
        optimizers.step(scaler, optimizers.gradient_norm(scaler), settings.optim.grad_clip)
        return State(model, optimizers, scaler).nbytes(), counter.peak


def expected_time(settings: Settings, device: Device, prepared: dict[str, Any] | None) -> str:
    """How long training will take, by micro-steps on random tokens."""
    config, limits = settings.model, settings.training
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 4 * limits.batch_size * config.block_size + 1)
    loader = Loader([Tokens([ids.astype(np.uint32)])], config.block_size, limits.batch_size)
    boundary = 0 if settings.data.respect_documents else None
    model = GPT(config).to(device.torch)
    inputs, targets = loader.batch(0)

    def loss(sequences: int) -> Tensor:
        return loss_of(model, (inputs[:sequences], targets[:sequences]), device, boundary)

    tokens = min(limits.eval_tokens, prepared["splits"]["val"]["tokens"] if prepared else math.inf)
    pace = measure_pace(loss, model.parameters_by_role(), settings.optim, device, limits,
                        limits.micro_steps(config.block_size), math.ceil(tokens / config.block_size))
    return f"{pace.describe(limits)} ({device.describe()})"


def occurrences(max_steps: int, every: int) -> int:
    """How often something happens in a run that happens `every` so many steps, or with 0 only at the end."""
    return math.ceil(max_steps / every) if every else 1


def resident() -> int:
    """The bytes that this process holds now. (The most that it held would count what the process that started it held.)"""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
