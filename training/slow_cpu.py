"""Why training on a CPU is slower than necessary: its precision, its threads, other programs."""

import os
from collections.abc import Iterator

import torch

from hardware import are_crowded, busy_cpus, native, usable_cpus
from terminal import counted
from training.device import Device


def slow_cpu_warnings(device: Device, processes: int = 1) -> Iterator[str]:
    """One sentence for each thing that makes training on a CPU slower than necessary.

    `processes` are those of the run on this machine.
    """
    if device.type != "cpu":
        return
    # A precision without instructions for it.
    if device.precision != "fp32" and not native(device.precision):
        yield (f"this processor emulates {device.precision}: a matrix product took "
               f"{times_fp32(device):.1f} times as long as in fp32. Leave training.precision out.")

    # More threads than CPUs.
    cpus, threads = usable_cpus(), processes * device.threads
    if threads > cpus:
        fewer = max(1, cpus // processes)
        yield (f"{threads} threads share {counted(cpus, 'CPU')}. Threads wait for each "
               f"other and can take far longer than fewer: try training.threads={fewer}.")
        return

    # Other programs. Of several processes of a run, the others are busy, too.
    busy = busy_cpus() if processes == 1 else 0.0
    if are_crowded(device.threads, busy):
        cpus = os.cpu_count() or 1
        fewer = max(1, round(cpus - busy))
        yield (f"other processes keep {min(busy, cpus):.0f} of {counted(cpus, 'CPU')} busy. "
               f"{device.threads} threads that wait for each other can take far longer than "
               f"fewer: try training.threads={fewer}.")


def times_fp32(device: Device) -> float:
    """How many times as long as in fp32 a small matrix product takes in the device's precision."""
    from torch.utils.benchmark import Timer

    seconds = []
    for dtype in (torch.float32, device.low_dtype):
        matrix = torch.ones((256, 256), dtype=dtype)
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=device.threads)
        seconds.append(timer.timeit(3).mean)
    return seconds[1] / seconds[0]
