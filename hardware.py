"""The number formats that a device multiplies by instructions of its own: the one place that asks.

Where a format is not native, torch emulates it: on a CPU bf16 then takes 30 times as long as fp32.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


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
    quota = cpu_quota(CGROUPS, OWN_GROUPS)
    return cpus if quota is None else max(1, min(cpus, round(quota)))


def cpu_quota(root: Path, own_groups: Path) -> float | None:
    """The CPUs' worth of time that the cgroups (version 2 or 1) below `root` grant this process; None without a limit.

    `own_groups` is the file that names the groups of this process.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        lines = []
    quotas = []
    for line in ["0::/", "0:cpu:/", *lines]:
        controllers, _, place = line.partition(":")[2].partition(":")
        top = root / "cpu" if "cpu" in controllers.split(",") else root
        # A group has at most what each group around it has. In a container, the path may be one of outside.
        group = top / place.lstrip("/")
        quotas += [quota_of(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return min((quota for quota in quotas if quota is not None), default=None)


def quota_of(group: Path) -> float | None:
    """The CPUs' worth of time that one cgroup grants; None without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such limit, or "max"
        return None


def busy_cpus() -> float:
    """How many CPUs other processes keep busy: now, and in the mean of the last minute; 0 where nobody knows."""
    runnable = []
    try:
        for _ in range(5):
            load, _, _, counts = Path("/proc/loadavg").read_text().split()[:4]
            runnable.append(int(counts.partition("/")[0]))
            time.sleep(0.004)
        # One that is running now is this process.
        return max(0.0, min(float(load), statistics.median(runnable) - 1))
    except (OSError, ValueError):
        return 0.0


def are_crowded(threads: int, busy: float) -> bool:
    """Whether so many threads have to share CPUs, where others keep `busy` of them busy."""
    return threads > 1 and busy + threads > (os.cpu_count() or 1) + 0.5


def sleep_while_waiting() -> None:
    """Where CPUs are busy, let torch's threads sleep when they wait. Call it before torch is imported.

    OpenMP's threads spin until the last one is done, on the CPU that this one needs: beside another program, a step on
    two threads then takes ten times as long as on one. On a quiet machine spinning is faster.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if are_crowded(int(threads) if threads.isdecimal() else usable_cpus(), busy_cpus()):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
