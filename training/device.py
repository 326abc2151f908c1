"""What a run computes on: device, precision, compilation. Resolves 'auto' and says why."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from hardware import are_crowded, busy_cpus, native, usable_cpus
from terminal import counted

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
# FLOP/s that training reaches, to decide whether compiling pays. Nominal rates and no timings: the load of the machine
# must not decide what a run computes.
NOMINAL_CPU_FLOPS = {True: 1.5e11, False: 5e10}  # of a thread, in bf16 where that is native and in fp32
NOMINAL_MFU = 0.3  # of a GPU's peak
UNKNOWN_GPU_FLOPS = 5e13
# Compiling takes minutes on a CPU and about one on a GPU, and saves a quarter to a half of each step after that.
COMPILE_PAYS_AFTER_SECONDS = {"cuda": 300, "cpu": 900}


@dataclass(frozen=True)
class Environment:
    """What the last bits of a result depend on beside the settings."""

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    processor: str = ""
    threads: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False
    compiled: bool = False
    torch: str = ""
    native_bf16: bool | None = None  # decides the format of Muon's products; None: an older version did not say

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot be."""
        if not 1 <= self.threads <= 1024:
            yield f"threads={self.threads} is no number of threads."


def available() -> dict[str, bool]:
    """Which devices this machine has, the one to prefer first."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


class Device:
    """Where and in what precision a run computes, and the reasons for the log.

    `precision` is "fp32" or what autocast uses for products: "bf16" or "fp16".
    `set_by` says where a precision other than "auto" comes from. Raises ValueError for a device that this machine
    does not have.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", deterministic: bool = False,
                 set_by: str = "as set") -> None:
        here = [name for name, there in available().items() if there]
        if device not in ("auto", *here):
            raise ValueError(f"device={device} is not available here: choose auto or one of {', '.join(here)}.")
        self.type = device if device != "auto" else here[0]
        self.torch = torch.device(self.type)
        self.native_bf16 = native("bf16", self.type)
        self.chosen, self.set_by = precision == "auto", set_by
        self.precision = precision if precision != "auto" else self._best_precision()
        if self.precision == "bf16" and self.type == "cuda" and not self.native_bf16:
            raise ValueError("precision=bf16 is not native to this GPU: choose auto, fp16 or fp32.")
        if self.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where a product stays in fp32
        self.keeps_memory = self.type == "cpu" and keep_freed_memory()
        self.deterministic = deterministic
        if deterministic:
            be_deterministic()

    def _best_precision(self) -> str:
        if self.native_bf16:
            return "bf16"
        return "fp16" if self.type == "cuda" else "fp32"

    def autocast(self) -> AbstractContextManager[None]:
        """Products in the run's precision inside this context; weights stay fp32."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.type, dtype, enabled=self.precision != "fp32")

    @property
    def sum_dtype(self) -> torch.dtype:
        """The format in which losses are added up; Apple's GPUs have no fp64."""
        return torch.float32 if self.type == "mps" else torch.float64

    def describe(self) -> str:
        """For the log: what was chosen, and why."""
        reason = {"bf16": "native here", "fp16": "bf16 is not native here", "fp32": "no faster one is native here"}
        kept = "; memory that a step frees is kept for the next" if self.keeps_memory else ""
        return f"{self.name()}; {self.precision} ({reason[self.precision] if self.chosen else self.set_by}){kept}"

    def warnings(self) -> Iterator[str]:
        """One sentence for each thing that makes training on this CPU slower than it has to be."""
        if self.type != "cpu":
            return
        if self.precision != "fp32" and not native(self.precision):
            yield (f"this processor emulates {self.precision}: a product of 256 x 256 matrices took {self.times_fp32():.1f} "
                   f"times as long as in fp32. Leave training.precision={self.precision} out.")
        busy, threads = busy_cpus(), torch.get_num_threads()
        if threads > usable_cpus():
            yield (f"{threads} threads share {counted(usable_cpus(), 'CPU')}. Threads wait for each other and can take far "
                   f"longer than fewer: try training.threads={usable_cpus()}.")
        elif are_crowded(threads, busy):
            cpus = os.cpu_count() or 1
            fewer = max(1, round(cpus - busy))
            yield (f"other processes keep {min(busy, cpus):.0f} of {counted(cpus, 'CPU')} busy. {threads} threads that "
                   f"wait for each other can take far longer than fewer: try training.threads={fewer}.")

    def times_fp32(self) -> float:
        """How many times as long as in fp32 a small product takes in this precision, timed."""
        seconds = []
        for dtype in (torch.float32, torch.float16 if self.precision == "fp16" else torch.bfloat16):
            matrix = torch.ones((256, 256), dtype=dtype)
            times = []
            for _ in range(4):
                start = time.perf_counter()
                matrix @ matrix
                times.append(time.perf_counter() - start)
            seconds.append(min(times))
        return seconds[1] / seconds[0]

    def environment(self, compiled: bool) -> Environment:
        return Environment(self.type, processor() if self.type == "cpu" else self.name(), torch.get_num_threads(),
                           self.precision, self.deterministic, compiled, torch.__version__, self.native_bf16)

    def name(self) -> str:
        if self.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{self.type}, {counted(torch.get_num_threads(), 'thread')}" if self.type == "cpu" else self.type

    def peak_flops(self) -> float | None:
        """The data sheet's FLOP/s in bf16, for model FLOPs utilisation; None where it is not known."""
        if self.type != "cuda" or self.precision == "fp32":
            return None
        return next((peak for name, peak in PEAK_FLOPS.items() if name in self.name()), None)

    def nominal_flops(self) -> float:
        """The FLOP/s that training is taken to reach here: the same however busy the machine is."""
        if self.type == "cpu":
            return torch.get_num_threads() * NOMINAL_CPU_FLOPS[self.precision == "bf16" and self.native_bf16]
        peak = self.peak_flops()
        return NOMINAL_MFU * peak if peak else UNKNOWN_GPU_FLOPS

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked, so that a clock means something."""
        if self.type == "cuda":
            torch.cuda.synchronize()
        elif self.type == "mps":
            torch.mps.synchronize()


def processor() -> str:
    """The CPU's name, and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def be_deterministic() -> None:
    """From now on use only kernels that give the same bits each time, where torch has them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see cuBLAS, "Results reproducibility"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would cost time and find no mistake of ours


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step, instead of returning it and faulting every page in again.

    A step frees and asks for the same hundreds of MB each time; see docs/benchmarks.md for what this saves. False where
    the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(trim_threshold, 2**31 - 1) and libc.mallopt(mmap_max, 0))


def available_memory() -> float:
    """Bytes that could be had without swapping, by Linux's own estimate and the limit of a container; else all there are."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(counts["inactive_file"])
        return min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no such limit
        return free


def maybe_compile(model: nn.Module, choice: str, device: Device, flops: float,
                  trial: Callable[[nn.Module], None], say: Callable[[str], None]) -> nn.Module:
    """The model compiled, where `choice` ('auto', 'true', 'false') and the `flops` of the whole run ask for it.

    `trial` runs the model once, so that a failure shows here: with 'auto' it is one warning and the plain
    model, with 'true' a ValueError.
    """
    pays_after = COMPILE_PAYS_AFTER_SECONDS.get(device.type)
    pays = pays_after is not None and flops / device.nominal_flops() >= pays_after
    if choice == "false" or (choice == "auto" and not pays):
        return model
    say("Compiling the model: the first step takes a minute or more.")
    try:
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise RuntimeError("no C++ compiler found")
        if device.type == "cpu":  # where plain kernels always are; the compiler's add an embedding's gradients in any order
            be_deterministic()
        compiled = torch.compile(model)
        trial(compiled)
        return compiled
    except Exception as error:  # whatever a compiler can fail with
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if choice == "true":
            raise ValueError(f"training.compile=true failed ({cause}): set training.compile=false.") from error
        say(f"Warning: the model could not be compiled and runs uncompiled ({cause}).")
        return model
