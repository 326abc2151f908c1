"""Data sheets of GPUs, by parts of their names."""

import re
from collections.abc import Iterator

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
GPUS = sorted(name.lower().replace(" ", "-") for name in PEAK_FLOPS)


def peak_flops(name: str) -> float | None:
    """The peak of the GPU that the driver calls `name`; None if it is not known."""
    for gpu, peak in PEAK_FLOPS.items():
        # An L40 is no L4.
        if re.search(rf"{gpu}(?![A-Z0-9])", name):
            return peak
    return None


def gpu_named(name: str) -> str:
    """The key of PEAK_FLOPS for a name such as h100 or rtx-4090; empty if there is none."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for gpu in PEAK_FLOPS:
        full = gpu.lower().replace(" ", "")
        if plain in (full, full.removeprefix("rtx")):
            return gpu
    return ""


def gpu_problems(name: str) -> Iterator[str]:
    """One sentence for a setting device=NAME that names none of these GPUs."""
    if not gpu_named(name):
        yield f"device={name} is not known: choose one of {', '.join(GPUS)}."
