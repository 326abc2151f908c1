"""The number formats that a device multiplies by instructions of its own: the one place that asks.

Where a format is not native, torch emulates it: on a CPU bf16 then takes 30 times as long as fp32.
"""

from __future__ import annotations

import os

import torch


def native(precision: str, device: str = "cpu") -> bool:
    """Whether a device ("cpu", "cuda", "mps") multiplies "fp32", "bf16" or "fp16" natively.

    NANOHYDRA_NATIVE_BF16=0 or 1 (and ..._FP16) overrides the answer for CPUs, so that every machine
    can be tested as any other.
    """
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
