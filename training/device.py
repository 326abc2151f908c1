"""The device of a run: its precision, threads and speed.

A `Device` only describes; training/configure.py applies it to the process.
"""

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from hardware import cpu_info, native
from setting import SettingsBase, setting
from terminal import counted
from training.gpus import peak_flops

# FLOP/s that training is assumed to reach, to decide whether compiling pays. Nothing is timed,
# since how busy a machine is must not change what a run computes.
CPU_FLOPS_NATIVE_BF16 = 1.5e11  # per thread
CPU_FLOPS = 5e10  # per thread
GPU_MFU = 0.3  # of the peak
UNKNOWN_GPU_FLOPS = 5e13


@dataclass(frozen=True)
class Environment(SettingsBase):
    """Everything beside the settings on which the last bits of a result depend."""

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    processor: str = ""
    threads: int = setting(1, "", ge=1, le=1024)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False
    compiled: bool = False
    torch: str = ""
    # Decides the precision of Muon's products.
    native_bf16: bool = False
    # The number of processes, which changes no bits if it is a power of two.
    world_size: int = setting(1, "", ge=1, le=2**20)


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
        # Choose the device: by default, the fastest that is here.
        here = [name for name, is_here in available().items() if is_here]
        if device not in ("auto", *here):
            raise ValueError(f"device={device} is not available on this machine: "
                             f"choose {' or '.join(['auto', *here])}.")
        self.type = here[0] if device == "auto" else device
        self.torch = torch.device(self.type)
        self.threads = threads or torch.get_num_threads()
        self.deterministic = deterministic
        self.native_bf16 = native("bf16", self.type)
        self.keeps_memory = self.type == "cpu" and platform.libc_ver()[0] == "glibc"
        # Set by `configure`: kernels of attention other than torch's own.
        self.attention = ""

        # Choose the precision: by default, the fastest that the device does not emulate.
        if precision != "auto":
            self.precision, self.reason = precision, set_by
        elif self.native_bf16:
            self.precision, self.reason = "bf16", "native here"
        elif self.type == "cuda":
            self.precision, self.reason = "fp16", "bf16 is not native here"
        else:
            self.precision, self.reason = "fp32", "no faster precision is native here"
        if self.precision == "bf16" and self.type == "cuda" and not self.native_bf16:
            raise ValueError("precision=bf16 is not native to this GPU: choose auto, fp16 or fp32.")

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
        return peak_flops(self.name())

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


def processor() -> str:
    """The CPU's name, and the instruction set that torch uses of it."""
    name = cpu_info("model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
