"""Apply the settings of a device to this process, and undo that at the end."""

import ctypes
import os
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec

import torch

from training.device import Device

# Options of glibc's malloc.h, and their defaults.
M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD = -1, 128 * 1024
M_MMAP_MAX, DEFAULT_MMAP_MAX = -4, 65536


class configure(ExitStack):
    """Apply a device's settings to this process. As a context manager, undo that at the end.

    Sets the number of threads, TF32, kernels of attention, deterministic kernels and malloc's
    options. At the end, these and torch's random number generators are as before, whatever was set
    in between. `dropout` is that of the model, if it is trained.
    """

    def __init__(self, device: Device, dropout: float = 0.0) -> None:
        super().__init__()
        # Each callback restores the present state.
        self.callback(torch.set_rng_state, torch.get_rng_state())
        if device.type == "cuda":
            self.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())

        self.callback(set_threads, torch.get_num_threads())
        set_threads(device.threads)

        self.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
            # FlashAttention 3 has no dropout.
            restore = None if dropout else activate_flash_attention_3()
            if restore:
                device.attention = "FlashAttention 3"
                self.callback(restore)
                # On a Hopper, torch prefers cuDNN's kernels to those of any FlashAttention.
                self.callback(torch.backends.cuda.enable_cudnn_sdp,
                              torch.backends.cuda.cudnn_sdp_enabled())
                torch.backends.cuda.enable_cudnn_sdp(False)

        # Also where this device is not deterministic: compiling on a CPU sets it later.
        self.callback(restore_determinism, torch.are_deterministic_algorithms_enabled(),
                      torch.is_deterministic_algorithms_warn_only_enabled(),
                      torch.utils.deterministic.fill_uninitialized_memory,
                      os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        if device.type == "cuda":
            set_cublas_workspace()
        if device.deterministic:
            be_deterministic()

        if device.keeps_memory:
            self.callback(set_malloc_options, DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX)
            keep_freed_memory()


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
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError):
        # The package or torch is of a version without the other.
        return None
    return restore


def set_threads(threads: int) -> None:
    # Setting even the present number has side effects on MKL.
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def set_cublas_workspace() -> None:
    """Choose memory with which cuBLAS is deterministic. torch only looks for it once in a process.

    See "Results reproducibility" in the documentation of cuBLAS.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def be_deterministic() -> None:
    """Use only kernels that are bit-identical from run to run, where torch has them."""
    set_cublas_workspace()
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

    Returned to the system, each page would be faulted in again; see docs/experiments.md.
    """
    set_malloc_options(trim_threshold=2**31 - 1, mmap_max=0)


def set_malloc_options(trim_threshold: int, mmap_max: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)
    libc.mallopt(M_MMAP_MAX, mmap_max)
    if mmap_max:
        libc.malloc_trim(0)
