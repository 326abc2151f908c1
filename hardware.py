"""The CPUs and the memory of this machine, and the formats that its devices multiply natively.

Where a format is not native, torch emulates it: on a CPU bf16 then takes 30 times as long as fp32.
torch is imported inside functions, since the command line counts threads before it needs torch.
"""

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from terminal import readable_size

CGROUPS = Path("/sys/fs/cgroup")
# The file that names the cgroups of this process.
OWN_GROUPS = Path("/proc/self/cgroup")
# The files of a cgroup with its limit of memory and its usage, and the name in memory.stat of the
# usage that only caches files: in version 2 and in version 1.
MEMORY_FILES = (("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def native(precision: str, device: str = "cpu") -> bool:
    """Whether a device ("cpu", "cuda", "mps") multiplies "fp32", "bf16" or "fp16" natively.

    NANOHYDRA_NATIVE_BF16=0 or 1 (and ..._FP16) overrides the answer for CPUs, so that one machine
    can be tested as another.
    """
    import torch

    if precision == "fp32":
        return True
    # GPUs.
    if device == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return precision == "fp16"
    # CPUs: the override, or else the instructions.
    answer = os.environ.get(f"NANOHYDRA_NATIVE_{precision.upper()}")
    if answer in ("0", "1"):
        return answer == "1"
    # oneDNN computes these products. It may be missing, or configured to use older instructions.
    if not torch.backends.mkldnn.is_available():
        return False
    if precision == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_beats_mkl() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL.

    In measurements it did on AMD's CPUs with AVX-512, and not on those with AVX2 only.
    NANOHYDRA_ONEDNN=0 or 1 overrides the answer. False where torch lacks one of the two.
    """
    import torch

    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # A private function, which a version of torch may lack.
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    answer = os.environ.get("NANOHYDRA_ONEDNN")
    if answer in ("0", "1"):
        return answer == "1"
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and cpu_info("vendor_id") == "AuthenticAMD"


@cache
def cpu_info(field: str) -> str:
    """A field of Linux's /proc/cpuinfo; empty where there is none, and on other systems."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def usable_cpus() -> int:
    """The number of CPUs of this process, by its affinity and the quota of its container."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:
        # Only Linux has affinities.
        cpus = os.cpu_count() or 1
    quota = cpu_quota(CGROUPS, OWN_GROUPS)
    return cpus if quota is None else max(1, min(cpus, round(quota)))


def cpu_quota(root: Path, own_groups: Path) -> float | None:
    """The number of CPUs that cgroups grant this process; None without a limit.

    The arguments are those of `cgroups`.
    """
    quotas = map(quota_of, cgroups("cpu", root, own_groups))
    return min((quota for quota in quotas if quota is not None), default=None)


def cgroups(controller: str, root: Path, own_groups: Path) -> Iterator[Path]:
    """The cgroups (version 2 or 1) of this process, and the groups around them.

    A process has at most what each of them grants. `controller` is "cpu" or "memory", `root` the
    folder of the cgroups, and `own_groups` the file that names those of this process.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        lines = []
    # In a container, the path may be one outside of it: the roots are always read.
    for line in ["0::/", f"0:{controller}:/", *lines]:
        controllers, _, place = line.partition(":")[2].partition(":")
        top = root / controller if controller in controllers.split(",") else root
        group = top / place.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder


def quota_of(group: Path) -> float | None:
    """The number of CPUs that one cgroup grants; None without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        # There is no such file, or it says "max".
        return None


def available_memory(root: Path = CGROUPS, own_groups: Path = OWN_GROUPS) -> float:
    """The bytes that can be allocated without swapping, within the limit of a container or job.

    Linux's own estimate; all physical memory on other systems.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        free = physical_memory()
    limits = map(memory_of, cgroups("memory", root, own_groups))
    return min([free, *(limit - used for limit, used in filter(None, limits))])


def check_free(nbytes: float, place: object) -> None:
    """Raise ValueError, naming the `place` of the content, if it does not fit in free memory."""
    free = available_memory()
    if nbytes > free:
        raise ValueError(f"{place} needs {readable_size(nbytes)} of memory, {readable_size(free)} "
                         "are free.")


def memory_size() -> float:
    """The bytes of memory that this process may use, free or not."""
    limits = map(memory_of, cgroups("memory", CGROUPS, OWN_GROUPS))
    return min([physical_memory(), *(limit for limit, _ in filter(None, limits))])


def physical_memory() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def memory_of(group: Path) -> tuple[int, int] | None:
    """The limit and the usage of one cgroup in bytes; None without a limit."""
    for limit, usage, cached in MEMORY_FILES:
        try:
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / usage).read_text()) - int(counts[cached])
            return int((group / limit).read_text()), used
        except (OSError, KeyError, ValueError):
            # There is no such file, or it says "max".
            continue
    return None


def free_space(folder: Path) -> tuple[Path, int]:
    """The free bytes of the disk that `folder` is or will be on, and the nearest that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free


def busy_cpus() -> float:
    """The number of CPUs that other processes use, now and in the last minute; 0 if unknown."""
    # Each reading of the runnable processes is one moment; their median leaves out short ones.
    runnable = []
    try:
        for _ in range(5):
            load, _, _, counts = Path("/proc/loadavg").read_text().split()[:4]
            runnable.append(int(counts.partition("/")[0]))
            time.sleep(0.004)
        # One of the runnable processes is this one.
        return max(0.0, min(float(load), statistics.median(runnable) - 1))
    except (OSError, ValueError):
        return 0.0


def are_crowded(threads: int, busy: float) -> bool:
    """Whether `threads` have to share CPUs, while other processes keep `busy` CPUs busy."""
    return threads > 1 and busy + threads > (os.cpu_count() or 1) + 0.5


def sleep_while_waiting() -> None:
    """Let torch's waiting threads sleep if the CPUs are busy. Call it before importing torch.

    OpenMP's threads spin until the last one is done, on the CPU that it needs: beside another
    program, a step on two threads then takes ten times as long as on one. On a quiet machine,
    spinning is faster.
    """
    setting = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(setting) if setting.isdecimal() else usable_cpus()
    if are_crowded(threads, busy_cpus()):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
