"""The number formats that a device multiplies by instructions of its own: the one place that asks.

Where a format is not native, torch emulates it: on a CPU bf16 then takes 30 times as long as fp32.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


def native(precision: str, device: str = "cpu") -> bool:
    """Whether a device ("cpu", "cuda", "mps") multiplies "fp32", "bf16" or "fp16" natively.

    NANOHYDRA_NATIVE_BF16=0 or 1 (and ..._FP16) overrides the answer for CPUs, so that every machine
    can be tested as any other.
    """
    import torch  # here, since the command line asks this module for threads before it needs torch

    if precision == "fp32":
        return True
    if device == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return precision == "fp16"
    answer = os.environ.get(f"NANOHYDRA_NATIVE_{precision.upper()}")
    if answer in ("0", "1"):
        return answer == "1"
    # oneDNN computes these products, and can be kept from using what the processor has.
    if not torch.backends.mkldnn.is_available():
        return False
    if precision == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_beats_mkl() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL: on AMD's processors, where that was measured.

    NANOHYDRA_ONEDNN=0 or 1 overrides the answer. False where torch lacks one of the two.
    """
    import torch

    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # A private function of torch, which a version may lack.
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    answer = os.environ.get("NANOHYDRA_ONEDNN")
    return answer == "1" if answer in ("0", "1") else vendor() == "AuthenticAMD"


@cache
def vendor() -> str:
    """The maker of the processor, as Linux names it; empty on other systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def usable_cpus() -> int:
    """The number of CPUs that this process may use: by its affinity, and by the quota of its container (cgroup)."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    quota = cpu_quota(Path("/sys/fs/cgroup"))
    return cpus if quota is None else max(1, min(cpus, round(quota)))


def cpu_quota(group: Path) -> float | None:
    """The CPUs' worth of time that a cgroup (version 2 or 1) grants; None without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu/cpu.cfs_quota_us").read_text()
            period = (group / "cpu/cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such limit, or "max"
        return None


def busy_cpus() -> float:
    """How many CPUs other processes keep busy: now, and in the mean of the last minute; 0 where nobody knows."""
    try:
        load, _, _, runnable = Path("/proc/loadavg").read_text().split()[:4]
        return min(float(load), float(runnable.partition("/")[0]) - 1)
    except (OSError, ValueError):
        return 0.0
