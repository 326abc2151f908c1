"""The time of a training step: its parts, and its slowest operations by torch's profiler.

  python -m bench profile
  python -m bench profile experiment=speedrun_shakespeare rows=20

Takes the settings of train.py too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity

from bench.speed import TrainingStep, random_loader
from bench.timing import medians, print_header, print_row
from conf.schema import compose
from model import GPT
from setting import FilePath, ScriptSettings, setting
from training.configure import configure
from training.device import Device


@dataclass(frozen=True)
class ProfileSettings(ScriptSettings):
    """Settings of the profile; all others are those of train.py."""

    rows: int = setting(12, "operations in the table", ge=1)
    trace: FilePath = setting("", "write a trace for chrome://tracing")


def main(own: ProfileSettings) -> int:
    settings = compose("config", list(own.train))
    vocab_size = settings.data.vocab_size if settings.data.tokenizer == "bpe" else 50257
    config = replace(settings.model, vocab_size=vocab_size)
    device = Device(settings.training.device, settings.training.precision)
    configure(device)
    loader = random_loader(config, settings.training.batch_size)
    step = TrainingStep(GPT(config).to(device.torch), settings.optim, device, loader)

    # The first two steps warm up.
    seconds_of = medians([time_parts(step, number) for number in range(8)][2:])
    print(f"torch {torch.__version__}, {device.describe()}; "
          f"{loader.tokens_per_step:,} tokens per step\n")
    print_header("part", "ms", "share")
    for part, seconds in seconds_of.items():
        share = seconds / sum(seconds_of.values())
        print_row(part, f"{1000 * seconds:.1f}", f"{share:.0%}")

    activities = [ProfilerActivity.CPU]
    sort_by = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        sort_by = "self_device_time_total"
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for number in range(3):
            step(number)
    operations = profiler.key_averages(group_by_input_shape=True)
    print(operations.table(sort_by=sort_by, row_limit=own.rows, max_shapes_column_width=60,
                           max_name_column_width=40))
    if own.trace:
        profiler.export_chrome_trace(own.trace)
        print(f"Wrote {own.trace}")
    return 0


def time_parts(step: TrainingStep, number: int) -> dict[str, float]:
    """The seconds of each part of a step."""
    def now() -> float:
        step.device.synchronize()
        return time.perf_counter()

    start = now()
    loss = step.forward(number)
    forward = now()
    step.backward(loss)
    backward = now()
    step.update()
    return {"forward": forward - start, "backward": backward - forward,
            "optimizer": now() - backward}
