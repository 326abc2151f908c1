"""The device of a run: its precision, threads and memory.

A `Device` only describes; `configure` applies it to the process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from hardware import are_crowded, busy_cpus, native, usable_cpus
from terminal import counted

# Dense bf16 peaks in FLOP/s from data sheets. The first name that the GPU's name contains counts.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}
# Of the smallest card of that name.
GPU_GIGABYTES = {
    "H200": 141, "H100 PCIe": 80, "H100": 80, "A100": 40, "L40S": 48, "L4": 24, "A10G": 24,
    "A10": 24, "RTX 4090": 24, "RTX 3090": 24,
}
# FLOP/s that training is assumed to reach, to decide whether compiling pays. Nothing is timed,
# since how busy a machine is must not change what a run computes.
CPU_FLOPS_NATIVE_BF16 = 1.5e11  # per thread
CPU_FLOPS = 5e10  # per thread
GPU_MFU = 0.3  # of the peak
UNKNOWN_GPU_FLOPS = 5e13
# Options of glibc's malloc.h, and their defaults.
M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD = -1, 128 * 1024
M_MMAP_MAX, DEFAULT_MMAP_MAX = -4, 65536


@dataclass(frozen=True)
class Environment:
    """Everything beside the settings on which the last bits of a result depend."""

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    processor: str = ""
    threads: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False
    compiled: bool = False
    torch: str = ""
    # Decides the precision of Muon's products. None: from a version that did not record it.
    native_bf16: bool | None = None
    # The number of processes, which changes no bits if it is a power of two.
    world_size: int = 1

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not 1 <= self.threads <= 1024:
            yield f"threads={self.threads} must lie between 1 and 1024."
        if not 1 <= self.world_size <= 2**20:
            yield f"world_size={self.world_size} must lie between 1 and {2**20}."


def available() -> dict[str, bool]:
    """Which devices this machine has, in order of preference."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {"cuda": cuda, "mps": mps, "cpu": True}


class Device:
    """The device, precision and threads of a run. Constructing one changes nothing.

    `precision` is "fp32", or the "bf16" or "fp16" of matrix products under autocast; `set_by`
    explains a precision other than "auto" in the log. `threads=0` keeps the present number.
    Raises ValueError for a device or precision that this machine does not have.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", deterministic: bool = False,
                 set_by: str = "as set", threads: int = 0) -> None:
        here = [name for name, is_here in available().items() if is_here]
        if device not in ("auto", *here):
            raise ValueError(f"device={device} is not available on this machine: "
                             f"choose auto or one of {', '.join(here)}.")
        self.type = here[0] if device == "auto" else device
        self.torch = torch.device(self.type)
        self.threads = threads or torch.get_num_threads()
        self.deterministic = deterministic
        self.native_bf16 = native("bf16", self.type)
        self.keeps_memory = self.type == "cpu" and platform.libc_ver()[0] == "glibc"
        # Set by `configure`: kernels of attention other than torch's own.
        self.attention = ""
        reasons = {"bf16": "native here", "fp16": "bf16 is not native here",
                   "fp32": "no faster precision is native here"}
        if precision == "auto":
            self.precision = self._best_precision()
            self.reason = reasons[self.precision]
        else:
            self.precision, self.reason = precision, set_by
        if self.precision == "bf16" and self.type == "cuda" and not self.native_bf16:
            raise ValueError("precision=bf16 is not native to this GPU: choose auto, fp16 or fp32.")

    def _best_precision(self) -> str:
        if self.native_bf16:
            return "bf16"
        return "fp16" if self.type == "cuda" else "fp32"

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which matrix products use the run's precision; weights stay fp32."""
        return torch.autocast(self.type, self.low_dtype, enabled=self.precision != "fp32")

    @property
    def low_dtype(self) -> torch.dtype:
        """The format of matrix products, unless the precision is "fp32"."""
        return torch.float16 if self.precision == "fp16" else torch.bfloat16

    @property
    def sum_dtype(self) -> torch.dtype:
        """The format in which losses are added up; Apple's GPUs have no fp64."""
        return torch.float32 if self.type == "mps" else torch.float64

    def describe(self) -> str:
        """A line for the log: what was chosen, and why."""
        kept = "; memory that a step frees is kept for the next" if self.keeps_memory else ""
        return f"{self.name()}; {self.precision} ({self.reason}){kept}"

    def warnings(self, processes: int = 1) -> Iterator[str]:
        """One sentence for each thing that makes training on this CPU slower than necessary.

        `processes` are those of the run on this machine.
        """
        if self.type != "cpu":
            return
        if self.precision != "fp32" and not native(self.precision):
            yield (f"this processor emulates {self.precision}: a product of 256 x 256 matrices "
                   f"took {self.times_fp32():.1f} times as long as in fp32. "
                   f"Leave training.precision={self.precision} out.")
        cpus, threads = usable_cpus(), processes * self.threads
        if threads > cpus:
            fewer = max(1, cpus // processes)
            yield (f"{threads} threads share {counted(cpus, 'CPU')}. Threads wait for each "
                   f"other and can take far longer than fewer: try training.threads={fewer}.")
            return
        # The other processes of the run are busy, too.
        busy = busy_cpus() if processes == 1 else 0.0
        if are_crowded(self.threads, busy):
            cpus = os.cpu_count() or 1
            fewer = max(1, round(cpus - busy))
            yield (f"other processes keep {min(busy, cpus):.0f} of {counted(cpus, 'CPU')} busy. "
                   f"{self.threads} threads that wait for each other can take far longer than "
                   f"fewer: try training.threads={fewer}.")

    def times_fp32(self) -> float:
        """How many times as long as in fp32 a small matrix product takes in this precision."""
        seconds = []
        for dtype in (torch.float32, self.low_dtype):
            matrix = torch.ones((256, 256), dtype=dtype)
            times = []
            for _ in range(4):
                start = time.perf_counter()
                matrix @ matrix
                times.append(time.perf_counter() - start)
            seconds.append(min(times))
        return seconds[1] / seconds[0]

    def environment(self, compiled: bool, world_size: int = 1) -> Environment:
        name = processor() if self.type == "cpu" else self.name()
        return Environment(self.type, name, self.threads, self.precision, self.deterministic,
                           compiled, torch.__version__, self.native_bf16, world_size)

    def name(self) -> str:
        if self.type == "cuda":
            kernels = f" with {self.attention}" if self.attention else ""
            return torch.cuda.get_device_name() + kernels
        if self.type == "cpu":
            return f"cpu, {counted(self.threads, 'thread')}"
        return self.type

    def peak_flops(self) -> float | None:
        """The peak FLOP/s in bf16 of the data sheet, or None where it is not known."""
        if self.type != "cuda" or self.precision == "fp32":
            return None
        name = self.name()
        return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)

    def mfu(self, flops_per_second: float) -> dict[str, str]:
        """Model FLOPs utilisation (arXiv:2204.02311), to show, where the device's peak is known."""
        peak = self.peak_flops()
        if not peak:
            return {}
        return {"mfu": f"{flops_per_second / peak:.1%}"}

    def nominal_flops(self) -> float:
        """The FLOP/s that training is assumed to reach, however busy the machine is."""
        if self.type == "cpu":
            is_fast = self.precision == "bf16" and self.native_bf16
            return self.threads * (CPU_FLOPS_NATIVE_BF16 if is_fast else CPU_FLOPS)
        peak = self.peak_flops()
        return GPU_MFU * peak if peak else UNKNOWN_GPU_FLOPS

    def synchronize(self) -> None:
        """Wait for the device to finish its work, so that timings are meaningful."""
        if self.type == "cuda":
            torch.cuda.synchronize()
        elif self.type == "mps":
            torch.mps.synchronize()


class configure:
    """Apply a device's settings to this process. As a context manager, undo that at the end.

    Sets the number of threads, TF32, kernels of attention, deterministic kernels and malloc's
    options. At the end, these and torch's random number generators are as before, whatever was set
    in between. `dropout` is that of the model, if it is trained.
    """

    def __init__(self, device: Device, dropout: float = 0.0) -> None:
        self.before = ExitStack()
        self.before.callback(torch.set_rng_state, torch.get_rng_state())
        if device.type == "cuda":
            self.before.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())

        self.before.callback(set_threads, torch.get_num_threads())
        set_threads(device.threads)

        self.before.callback(
            torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
            # FlashAttention 3 has no dropout.
            restore = None if dropout else activate_flash_attention_3()
            if restore:
                device.attention = "FlashAttention 3"
                self.before.callback(restore)

        self.before.callback(restore_determinism, torch.are_deterministic_algorithms_enabled(),
                             torch.is_deterministic_algorithms_warn_only_enabled(),
                             torch.utils.deterministic.fill_uninitialized_memory,
                             os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        if device.deterministic:
            be_deterministic()

        if device.keeps_memory:
            self.before.callback(set_malloc_options, DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX)
            keep_freed_memory()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *failure: object) -> None:
        self.before.close()


def activate_flash_attention_3() -> Callable[[], None] | None:
    """Use FlashAttention 3, if the GPU is a Hopper and the package is installed.

    Returns the function that ends its use; None if it is not used, or already was.
    """
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    if not is_hopper or find_spec("flash_attn_interface") is None:
        return None
    from torch.nn import attention

    try:
        if attention.current_flash_attention_impl():
            return None
        restore = attention.restore_flash_attention_impl
        attention.activate_flash_attention_impl("FA3")
    except (AttributeError, ImportError, OSError, RuntimeError):
        # The package or torch is of a version without the other.
        return None
    return restore


def set_threads(threads: int) -> None:
    # Setting even the present number has side effects on MKL.
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def be_deterministic() -> None:
    """Use only kernels that are bit-identical from run to run, where torch has them."""
    # See "Results reproducibility" in the documentation of cuBLAS.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling memory takes time, and only helps to find reads of uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False


def restore_determinism(enabled: bool, warn_only: bool, fill: bool, cublas: str | None) -> None:
    # This imports torch's compiler, which takes 2 s.
    if torch.are_deterministic_algorithms_enabled() != enabled:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    if cublas is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    else:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = cublas


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, since a step allocates and frees the same hundreds of MB.

    Returned to the system, each page would be faulted in again; see docs/benchmarks.md.
    """
    set_malloc_options(trim_threshold=2**31 - 1, mmap_max=0)


def set_malloc_options(trim_threshold: int, mmap_max: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)
    libc.mallopt(M_MMAP_MAX, mmap_max)
    if mmap_max:
        libc.malloc_trim(0)


def processor() -> str:
    """The CPU's name, and the instruction set that torch uses of it."""
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    name = name or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def available_memory() -> float:
    """The bytes that can be allocated without swapping, within the limit of a container.

    Linux's own estimate; all physical memory on other systems.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        stat = (group / "memory.stat").read_text()
        counts = dict(line.split() for line in stat.splitlines())
        used = int((group / "memory.current").read_text()) - int(counts["inactive_file"])
        return min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no limit
        return free


def memory_limit(device: Device) -> float:
    """The bytes of a device's memory, free or not; of a CPU, those that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
