"""Matrix products and attention for decoding on a CPU, in C (kernels.c), compiled on first use.

A decoding step computes little with each weight that it reads, so memory bandwidth is the limit:
docs/benchmarks.md has measurements. Shapes: B rows, H heads, G key-value heads, D head width.

The compiled library is kept in the user's cache. A file there counts as damaged or planted until
proven otherwise: its folder must belong to the user alone, its checksum must agree, and it is
loaded from a copy in memory that nobody else can change.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import atomic

SOURCE = Path(__file__).with_suffix(".c")
COMPILE = "-O3 -march=native -fno-strict-aliasing -fPIC -c {source} -o {made}.o"
LINK = "-shared {made}.o -o {made}.so"  # torch has loaded the OpenMP library that the code calls
COMPILERS = ("gcc", "clang", "cc")
CHECKSUM_BYTES = hashlib.sha256().digest_size

# As in kernels.c: the number of outputs that are stored side by side, and the types of matrices.
PANEL, NARROW = 64, 16
FP32, BF16, INT8, BF16_CACHE = range(4)
TYPES = {"fp32": (FP32, torch.float32), "bf16": (BF16, torch.bfloat16), "int8": (INT8, torch.int8)}


# Using the kernels


@cache
def library() -> ctypes.CDLL | OSError:
    """The compiled kernels, or the error if they cannot be compiled."""
    try:
        found = load_library(SOURCE)
    except OSError as error:
        return error
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.product.argtypes = [ctypes.c_int] + [pointer] * 5 + [number] * 3
    found.attend.argtypes = [ctypes.c_int] + [pointer] * 8 + [number] * 9 + [ctypes.c_float]
    return found


def available() -> bool:
    return not isinstance(library(), OSError)


def in_panels(matrix: Tensor, width: int = PANEL) -> Tensor:
    """A matrix `[..., out, in]` in the order in which the kernels read it.

    `[..., out / width, in / n, width, n]`, with n numbers in 4 bytes; both sizes are padded with
    zeros.
    """
    n = 4 // matrix.itemsize
    padding = (0, -matrix.size(-1) % n, 0, -matrix.size(-2) % width)
    if any(padding):
        matrix = F.pad(matrix, padding)
    return matrix.unflatten(-1, (-1, n)).unflatten(-3, (-1, width)).transpose(-3, -2).contiguous()


def product(weight: Tensor, bias: Tensor | None, precision: str) -> Callable[[Tensor], Tensor]:
    """A function from rows `[..., in]` to rows @ `weight`.T + bias `[..., out]`, in fp32.

    `precision` is that of the weights: "fp32", "bf16" (the rows are rounded too on CPUs with bf16
    instructions), or "int8" (with a scale for each output). A row's result is bit-identical alone
    and among others.
    """
    kind, dtype = TYPES[precision]
    outputs, inputs = weight.shape
    scales = None
    if kind == INT8:
        # Symmetric quantization: the largest weight of each output becomes 127.
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (weight / scales[:, None]).round()
    packed = in_panels(weight.to(dtype))  # [out / PANEL, in / n, PANEL, n]
    padded = packed.size(1) * packed.size(3)

    def multiply(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        x = F.pad(x, (0, padded - inputs)) if padded > inputs else x.contiguous()
        y = torch.empty(*x.shape[:-1], outputs)
        rows = y.numel() // outputs
        library().product(kind, packed.data_ptr(), x.data_ptr(), y.data_ptr(), address(scales),
                          address(bias), rows, padded, outputs)
        return y

    return multiply


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def values_width(head_width: int) -> int:
    """The width of panels of values: narrow where wide ones would be padded with zeros."""
    return NARROW if head_width % PANEL else PANEL


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scores: Tensor,
           lengths: Tensor) -> Tensor:
    """Attention `[B, H, 1, D]` of one new position per row to itself and to the cache.

    `q` is `[B, H, 1, D]`. `k` and `v`, `[B, G, 1, D]`, are first appended to the cache, which holds
    `lengths` `[B]` positions, packed by `in_panels`: `keys` as B x G matrices `[positions, D]`,
    `values` as `[D, positions]`. `scores` `[B, H, positions]` is working memory.
    """
    B, H, _, D = q.shape
    G = k.size(1)
    q, k, v = (x.float().flatten(1) for x in (q, k, v))
    y = torch.empty(B, H, 1, D)
    kind = FP32 if keys.dtype == torch.float32 else BF16_CACHE
    tensors = (keys, values, scores, q, k, v, y, lengths)
    library().attend(kind, *(tensor.data_ptr() for tensor in tensors), B, G, H // G, D,
                     scores.size(2), values.size(4), q.stride(0), k.stride(0), v.stride(0),
                     1 / math.sqrt(D))
    return y


# Compiling them


def load_library(source: Path) -> ctypes.CDLL:
    """A C file as a library: the one kept in the cache, or compiled and kept.

    Environment: CC is the compiler, NANOHYDRA_CFLAGS are additional flags. Raises OSError, with
    the reason, where it cannot be compiled.
    """
    flags = os.environ.get("NANOHYDRA_CFLAGS", "")
    found = next(filter(shutil.which, COMPILERS), COMPILERS[0])
    compiler = os.environ.get("CC") or found

    # All that decides the compiled code is in the name of the kept file.
    inputs = repr((source.read_bytes(), compiler, COMPILE, flags, LINK, processor()))
    name = f"{source.stem}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache_home):
        cache_home = os.path.expanduser("~/.cache")
    path = Path(cache_home, "nanohydra", name)

    with suppress(OSError):
        return load(read_cached(path))
    content = compile_source(source, shlex.split(compiler), shlex.split(flags))
    # If the folder cannot be used or the disk is full, the next process compiles again.
    with suppress(OSError):
        write_cached(path, content)
    return load(content)


def compile_source(source: Path, compiler: list[str], flags: list[str]) -> bytes:
    """The content of the compiled library. Raises OSError if compiling fails."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, source.stem)
        for step, more in ((COMPILE, flags), (LINK, [])):
            arguments = [word.format(source=source, made=made) for word in step.split()]
            run_compiler([*compiler, *arguments, *more])
        return own_bytes(f"{made}.so")


def run_compiler(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except (FileNotFoundError, PermissionError):
        raise OSError(f"There is no C compiler here ({command[0]}): install gcc, "
                      "or name one in CC.") from None
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()[:300]}")


def processor() -> str:
    """Identifies the processor's instructions: machines of several kinds can share a home."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = ("model name", "flags", "Features")
        return "\n".join(sorted({line for line in lines if line.startswith(described)}))
    return platform.machine() + platform.processor()


def open_private(folder: Path) -> int:
    """Open a folder, close it to other users, and return its descriptor.

    Raises OSError if it is missing, a relative path, a symbolic link, or belongs to another user.
    """
    if not folder.is_absolute():
        raise OSError("There is no home folder.")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.getuid():
            raise OSError(f"{folder} belongs to another user.")
        os.fchmod(handle, 0o700)
        return handle
    except OSError:
        os.close(handle)
        raise


def own_bytes(path: str, folder: int | None = None) -> bytes:
    """The content of a file; `path` is relative to the descriptor `folder` where given.

    Raises OSError if it is missing, or not a plain file of this user.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a plain file of this user.")
        return file.read()


def read_cached(path: Path) -> bytes:
    """A library from the cache. Raises OSError unless it can be trusted."""
    folder = open_private(path.parent)
    try:
        content = own_bytes(path.name, folder)
    finally:
        os.close(folder)
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        raise OSError(f"{path} is damaged.")
    return content


def write_cached(path: Path, content: bytes) -> None:
    """Write a library, after its checksum, for the next process."""
    if path.is_absolute():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(open_private(path.parent))
    atomic.write_bytes(path, hashlib.sha256(content).digest() + content)


def load(content: bytes) -> ctypes.CDLL:
    """Load a library from a private copy, which no other process can change or truncate."""
    try:
        handle = os.memfd_create("library")
    except (AttributeError, OSError):  # not Linux, or forbidden here
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "library.so")
            atomic.write_bytes(copy, content)
            return ctypes.CDLL(str(copy))
    try:
        atomic.write_all(handle, content)
        # The handle stays open: the loader would take another file of the same name for this one.
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise
