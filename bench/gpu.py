"""One GPU: training speed and its parts, peak memory, decoding and resuming, in ten minutes.

  python -m bench gpu out=gpu.json
  python -m bench gpu part=training seconds=10

Trains GPT-2 124M and modern-124m on random tokens, uncompiled and compiled, and at last without
each of the changes that were made for GPUs. Decodes with the shape of GPT-2 XL. Kills and resumes a
deterministic run. Each case runs in a process of its own, and `out` is written after each. Nothing
is downloaded. The tests for GPUs are `pytest -m gpu`, and `python -m bench result device=cuda`
trains beside nanoGPT.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from bench import timing
from bench.decode import MODERN, RULES, bytes_read
from bench.speed import TrainingStep, random_loader
from bench.timing import measure_in_process, print_header, print_row, run_command, write_json
from generation.decoder import Decoder
from generation.sampling import generate
from model import GPT, GPTConfig, attention
from model.loss import LossOptions, loss_options
from setting import FilePath, SettingsBase, setting
from training.compiling import check_fused_loss
from training.config import OptimConfig
from training.configure import configure
from training.device import Device

SHAPES = {
    "gpt2": GPTConfig(),
    "modern-124m": replace(MODERN, n_head=6, zero_init=True),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    # For tests on CPUs.
    "tiny": GPTConfig(block_size=32, vocab_size=65, n_layer=1, n_head=2, n_embd=16),
}
# How a case differs from what train.py does, and its predicted speed, where "eager" is 1. Estimated
# for all changes of the loss together: x 0.88.
VARIANTS = {"eager": "", "compiled": "", "small chunks": "0.88 or more",
            "unfused loss": "0.88 or more", "unpadded vocabulary": "0.88 or more",
            "fp32 norms": "less than 1"}
LOSS_CHANGES = {"small chunks": {"max_logits": 2**24}, "unpadded vocabulary": {"multiple": 1}}
# A case that cannot have this time is left out.
LEAST_SECONDS = 20.0
# So that one case, such as a compilation that hangs, does not take the time of all others.
MOST_SECONDS = 150.0


class Case(NamedTuple):
    """One row of the table: the arguments of `measure`, but for the device."""

    kind: Literal["training", "decoding", "resume"]
    shape: str
    variant: str = ""


@dataclass(frozen=True)
class GpuSettings(SettingsBase):
    """Settings of the benchmark of one GPU."""

    part: Literal["all", "training", "decoding", "resume"] = setting("all", "what is measured")
    batch_size: int = setting(16, "sequences in a micro-step", ge=1)
    seconds: float = setting(5.0, "of timed steps in each case", gt=0, lt=3600)
    shape: Literal["all", "gpt2", "modern-124m", "tiny"] = setting("all", "that is trained")
    decoded: Literal["gpt2-xl", "gpt2", "tiny"] = setting("gpt2-xl", "that decodes")
    minutes: float = setting(9.5, "cases that are not finished by then are left out", gt=0)
    device: Literal["cuda", "cpu"] = setting("cuda", "cpu: to try the benchmark itself")
    out: FilePath = setting("", "write the measurements as JSON")


def main(settings: GpuSettings) -> int:
    end = time.monotonic() + 60 * settings.minutes
    device = Device(settings.device)
    title = f"torch {torch.__version__}, {device.describe()}, {time.strftime('%Y-%m-%d')}"
    print(f"{title}\n")
    print_header("shape", "case", "tokens/s", "MFU, or part of the memory rate", "peak memory",
                 "first step, s", "of eager", "predicted")
    measured: dict[str, Any] = {"machine": title}
    for case in cases(settings):
        name = " ".join(filter(None, case))
        found = measure_case(case, settings, end - time.monotonic())
        measured[name] = found
        # What is measured is kept, whatever happens to the next case.
        write_json(settings.out, measured)
        eager = measured.get(f"training {case.shape} eager", {})
        print_row(case.shape, case.variant or case.kind, *cells(case, found, eager))
    return 0


def cases(settings: GpuSettings) -> list[Case]:
    """The cases in the order in which they are measured: those that matter most come first."""
    shapes = ["gpt2", "modern-124m"] if settings.shape == "all" else [settings.shape]
    training = []
    for shape, variant in product(shapes, VARIANTS):
        # Only models with norms of queries and keys have them in fp32 without the change.
        if variant != "fp32 norms" or SHAPES[shape].qk_norm:
            training.append(Case("training", shape, variant))
    first = [case for case in training if case.variant in ("eager", "compiled")]
    resumed = "nano" if settings.device == "cpu" else "baby-gpu"
    found = [*first, Case("decoding", settings.decoded), Case("resume", resumed),
             *(case for case in training if case not in first)]
    return [case for case in found if settings.part in ("all", case.kind)]


def measure_case(case: Case, settings: GpuSettings, seconds_left: float) -> dict[str, Any]:
    """What `measure` returns, from a process of its own; or the error, with its last lines."""
    try:
        if seconds_left < LEAST_SECONDS:
            raise ValueError(f"minutes={settings.minutes:g} are over")
        timeout = min(seconds_left, MOST_SECONDS + settings.seconds)
        if case.kind == "resume":
            return {"answer": verify_resume(case.shape, settings.device, timeout)}
        return measure_in_process("bench.gpu", *case, settings.batch_size, settings.seconds,
                                  settings.device, timeout=timeout)
    except ValueError as error:
        return {"error": str(error), "lines": getattr(error, "__notes__", [])}


def cells(case: Case, found: dict[str, Any], eager: dict[str, Any]) -> list[str]:
    """The cells of a row after its name. `eager` is what was measured of that variant, if it was.
    """
    if "rate" not in found:
        return [found.get("answer") or f"not measured: {found['error']}", "", "", "", "", ""]
    share = "not known" if found["share"] is None else f"{found['share']:.1%}"
    comparison = ["", ""]
    if case.kind == "training" and "rate" in eager:
        comparison = [f"{found['rate'] / eager['rate']:.2f}", VARIANTS[case.variant]]
    note = ", but its loss could not be compiled" if found.get("loss_failed") else ""
    return [f"{found['rate']:,.0f}{note}", share, f"{found['peak_bytes'] / 2**20:,.0f} MB",
            f"{found['first']:.1f}", *comparison]


def verify_resume(model: str, device: str, timeout: float) -> str:
    """The answer of scripts/verify_resume.py for a short deterministic run."""
    command = [sys.executable, "-m", "scripts.verify_resume", "kills=1", f"model={model}",
               "optim=muon", "training.max_steps=20", "training.deterministic=true",
               f"training.device={device}"]
    return run_command(command, timeout=timeout).splitlines()[-1]


def measure(kind: str, shape: str, variant: str, batch_size: int, seconds: float,
            device_name: str) -> dict[str, Any]:
    """Measure a case in this process."""
    device = Device(device_name)
    with configure(device):
        torch.manual_seed(0)
        if kind == "decoding":
            found = measure_decoding(SHAPES[shape], device)
        else:
            found = measure_training(SHAPES[shape], variant, batch_size, seconds, device)
    is_gpu = device.type == "cuda"
    return found | {"peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else 0}


def options_of(variant: str, device: Device) -> LossOptions | None:
    """How the loss of a variant is computed."""
    options = loss_options(device.torch, fused=variant != "unfused loss")
    return replace(options, **LOSS_CHANGES.get(variant, {})) if options else None


def measure_training(config: GPTConfig, variant: str, batch_size: int, least_seconds: float,
                     device: Device) -> dict[str, Any]:
    """The tokens a second of whole steps, each with one micro-step, and their share of the peak."""
    with device.torch:
        model = GPT(config)
    optim = OptimConfig(optimizer="muon" if config.qk_norm else "adamw")
    step = TrainingStep(model, optim, device, random_loader(config, batch_size),
                        compiled=variant == "compiled")
    model.loss_options = options = options_of(variant, device)
    if variant == "fp32 norms":
        # As autocast would have it.
        attention.rms_norm = lambda x: F.rms_norm(x, (x.size(-1),))
    compiling = 0.0
    if variant != "compiled":
        # As in train.py: without a C compiler, the loss is not compiled.
        batch = step.batches.batch(0)
        compiling = timing.seconds_of(check_fused_loss, step.loss_fn, batch, print)
    times = timing.step_seconds(step, least_seconds, warm_up=3)
    rate = batch_size * config.block_size / statistics.median(times[3:])
    peak = device.peak_flops()
    share = model.flops_per_token() * rate / peak if peak else None
    return {"rate": rate, "share": share, "first": compiling + times[0],
            "loss_failed": model.loss_options != options}


def measure_decoding(config: GPTConfig, device: Device) -> dict[str, Any]:
    """The tokens a second of one sequence, and their bytes as a share of the copying rate."""
    with device.torch:
        model = GPT(config).eval()
    prompt, tokens = config.block_size // 4, min(128, config.block_size // 2)
    prompts = torch.randint(config.vocab_size, (1, prompt)).tolist()

    def decode(count: int) -> None:
        list(generate(model, prompts, replace(RULES, max_new_tokens=count), decoder=decoder))
        device.synchronize()

    with device.autocast():
        decoder = Decoder(model)
        # Each graph is captured the second time that a step needs it.
        first, *_ = (timing.seconds_of(decode, count) for count in (tokens, 2))
        short, long = (1 / timing.best_rate(1, decode, count) for count in (2, tokens))
    rate = (tokens - 2) / max(long - short, 1e-9)
    precision = "fp32" if decoder.dtype == torch.float32 else "bf16"
    read = bytes_read(model, precision, 1, prompt + tokens / 2)
    return {"rate": rate, "share": rate * read / copy_rate(device), "first": first}


def copy_rate(device: Device) -> float:
    """The bytes a second that a copy reads and writes, at best."""
    source = torch.zeros(2**22 if device.type == "cpu" else 2**28, device=device.torch)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        device.synchronize()

    return timing.best_rate(2 * source.nbytes, copy)
