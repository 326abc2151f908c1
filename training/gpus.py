"""Data sheets of GPUs, by parts of their names."""

from __future__ import annotations

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
