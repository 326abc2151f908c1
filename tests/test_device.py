"""Device, precision and compilation: what "auto" chooses, what is refused, what is restored."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch

import train
from checkpointing.memory_plan import memory_limit
from model.loss import LossOptions
from startup import compiled_loss
from training import slow_cpu
from training.compiling import check_fused_loss, maybe_compile
from training.configure import activate_flash_attention_3, configure
from training.device import Device
from training.slow_cpu import slow_cpu_warnings
from training.step import BatchLoss


@pytest.fixture(autouse=True)
def restored():
    """Restores torch's settings, which `maybe_compile` changes."""
    with configure(Device("cpu")):
        yield


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def global_settings():
    """Everything that `configure` changes and Python can read."""
    return {"threads": torch.get_num_threads(), "random state": torch.get_rng_state().tolist(),
            "matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "fill": torch.utils.deterministic.fill_uninitialized_memory,
            "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG")}


@pytest.mark.parametrize(("native", "precision"), [("1", "bf16"), ("0", "fp32")])
def test_auto_on_a_cpu_is_bf16_only_where_native(monkeypatch, no_accelerator, native, precision):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    device = Device()
    assert (device.type, device.precision) == ("cpu", precision)
    assert "native" in device.describe()


def test_auto_on_an_old_gpu_is_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert Device().precision == "fp16"
    with pytest.raises(ValueError, match="bf16 is not native"):
        Device(precision="bf16")


def test_a_missing_device_is_an_error_that_lists_the_others(no_accelerator):
    with pytest.raises(ValueError, match=r"device=cuda is not available .*: choose auto or cpu"):
        Device("cuda")


def test_constructing_a_device_changes_nothing():
    before = global_settings()
    Device("cpu", "bf16", deterministic=True, threads=3)
    assert global_settings() == before


def test_configure_applies_a_device_and_restores_everything():
    before = global_settings()
    torch.set_float32_matmul_precision("high")
    with configure(Device("cpu", deterministic=True, threads=3)):
        assert torch.get_num_threads() == 3 and torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(5)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before["matmul"])
    assert global_settings() == before


@pytest.fixture
def pretend_gpu(monkeypatch):
    """What `configure` reads and restores of a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    device = Device("cpu")
    device.type = "cuda"
    return device


def test_a_gpu_is_waited_for_and_asked_for_its_memory(pretend_gpu, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=100 + number))
    pretend_gpu.synchronize()
    assert waited and memory_limit(pretend_gpu) == 103


def test_a_later_run_on_a_gpu_can_be_deterministic(pretend_gpu):
    """In the same process: torch looks for this variable at the first product."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    with configure(pretend_gpu):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.get_float32_matmul_precision() == "high"
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before


@pytest.mark.parametrize(("major", "installed", "dropout", "used"), [
    (9, True, 0.0, True), (9, True, 0.1, False), (9, False, 0.0, False), (8, True, 0.0, False), (10, True, 0.0, False)])
def test_flash_attention_3_is_used_where_it_is(monkeypatch, pretend_gpu, major, installed, dropout, used):
    """It has no dropout. torch would use cuDNN's kernels before it."""
    calls = []
    monkeypatch.setattr("training.configure.find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None, raising=False)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", calls.append, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: calls.append("torch's own"), raising=False)
    with configure(pretend_gpu, dropout):
        assert calls == ["FA3"] * used and pretend_gpu.name() == "NVIDIA H100" + " with FlashAttention 3" * used
        assert torch.backends.cuda.cudnn_sdp_enabled() != used
    assert calls == ["FA3", "torch's own"] * used and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ImportError, OSError, AttributeError])
def test_flash_attention_3_that_fails_is_not_used(error, monkeypatch):
    """ValueError: torch does not know it."""
    def fails(name):
        raise error

    monkeypatch.setattr("training.configure.find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None, raising=False)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fails, raising=False)
    assert activate_flash_attention_3() is None


@pytest.mark.slow
def test_training_from_python_changes_no_global_state(compose_tiny):
    before = global_settings()
    settings = compose_tiny("training.max_steps=1", "training.threads=2", "training.deterministic=true")
    assert train.train(settings) == 0
    assert global_settings() == before


@pytest.mark.slow
def test_freed_memory_is_kept_while_configured():
    """Allocating 200 MB after 240 MB needs no new pages, until the settings are restored."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has these options")
    code = """
import resource, torch
from training.configure import activate_flash_attention_3, configure
from training.device import Device
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with configure(Device("cpu")):
    torch.ones(60_000_000)
    print(faults())
print(faults())
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    kept, restored = map(int, done.stdout.split())
    assert kept < 50 < restored


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_multiplies_in_the_precision(precision, dtype):
    with Device("cpu", precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_peak_is_found_by_the_name_of_the_gpu(monkeypatch):
    device = Device("cpu", "bf16")
    assert device.peak_flops() is None
    device.type = "cuda"
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA GH200 480GB", 989e12),
                       ("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA RTX A1000 Laptop GPU", None), ("?", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert device.peak_flops() == peak


def test_nominal_flops_follow_threads_and_native_formats(monkeypatch):
    flops = {}
    for native in ("0", "1"):
        monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
        for threads in (1, 2):
            flops[native, threads] = Device("cpu", threads=threads).nominal_flops()
    assert flops["1", 1] > flops["0", 1] and flops["0", 2] == 2 * flops["0", 1]


@pytest.mark.parametrize("native, precision, warns", [
    ("0", "bf16", True), ("0", "fp32", False), ("1", "bf16", False), ("0", "auto", False)])
def test_an_emulated_precision_is_warned_about(monkeypatch, native, precision, warns):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setattr(slow_cpu, "busy_cpus", lambda: 0.0)
    found = [line for line in slow_cpu_warnings(Device("cpu", precision)) if "emulates bf16" in line]
    assert bool(found) == warns
    assert all(re.search(r"took \d+\.\d times as long as in fp32", line) for line in found)


@pytest.mark.parametrize(("busy", "threads", "processes", "advice"), [
    (8, 4, 1, "training.threads=1"), (8, 1, 1, ""), (0.3, 4, 1, ""), (1, 4, 1, "training.threads=3"),
    (0, 6, 1, "training.threads=4"), (0, 4, 2, "training.threads=2"), (4, 2, 2, "")])
def test_a_busy_machine_is_warned_about(monkeypatch, busy, threads, processes, advice):
    monkeypatch.setattr(slow_cpu, "busy_cpus", lambda: busy)
    monkeypatch.setattr(slow_cpu.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(slow_cpu, "usable_cpus", lambda: 4)
    found = list(slow_cpu_warnings(Device("cpu", "fp32", threads=threads), processes))
    assert [line.endswith(f"try {advice}.") for line in found] == [True] * bool(advice)


class Compiler:
    """Stands in for torch.compile; called, it asks `maybe_compile` for a run of so many seconds."""

    def __init__(self, monkeypatch, fails=False):
        self.said, self.tried, self.fails = [], [], fails
        monkeypatch.setattr(torch, "compile", lambda model, dynamic: ("compiled" if dynamic is False else "for any shape", model))
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
        monkeypatch.setattr(BatchLoss, "try_backward", lambda *words: self.try_backward(*words))

    def try_backward(self, loss_fn, batch):
        self.tried.append(loss_fn.model)
        if self.fails:
            raise RuntimeError("no header Python.h\nand more")

    def __call__(self, choice, seconds):
        device = Device("cpu", "fp32")
        flops = seconds * device.nominal_flops()
        return maybe_compile(BatchLoss("model", device), None, choice, flops, self.said.append).model


def test_compiling_is_decided_without_a_clock(monkeypatch):
    compiler = Compiler(monkeypatch)
    monkeypatch.delattr("time.perf_counter")
    assert compiler("auto", 60) == "model" and not compiler.tried
    assert compiler("auto", 1e5) == ("compiled", "model") and compiler.tried == [("compiled", "model")]
    assert compiler("false", 1e5) == "model" and compiler("true", 1) == ("compiled", "model")


@pytest.mark.parametrize("choice, expected", [("true", True), ("false", False)])
def test_compiling_for_a_cpu_is_deterministic(monkeypatch, choice, expected):
    Compiler(monkeypatch)(choice, 1)
    assert torch.are_deterministic_algorithms_enabled() is expected


def test_auto_falls_back_with_a_warning_that_names_the_cause(monkeypatch):
    compiler = Compiler(monkeypatch, fails=True)
    assert compiler("auto", 1e5) == "model"
    (warning,) = [line for line in compiler.said if line.startswith("Warning")]
    assert "no header Python.h" in warning and "and more" not in warning


def test_compile_true_fails_with_the_cause_and_advice(monkeypatch):
    with pytest.raises(ValueError, match=r"training.compile=true failed .*no header Python.h.*training.compile=false"):
        Compiler(monkeypatch, fails=True)("true", 1)


def test_a_full_gpu_is_no_reason_to_train_uncompiled(monkeypatch):
    """Which takes more memory."""
    compiler = Compiler(monkeypatch)
    monkeypatch.setattr(compiler, "try_backward", Mock(side_effect=torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        compiler("auto", 1e5)


def test_a_missing_c_compiler_is_named_as_the_cause(monkeypatch):
    compiler = Compiler(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiler("auto", 1e5) == "model"
    assert "no C++ compiler found" in compiler.said[-1] and not compiler.tried


@pytest.mark.parametrize("compiled", [True, False])
def test_the_loss_is_tried_where_the_model_is_not_compiled(compiled, monkeypatch):
    tried, trainer = [], MagicMock(**{"training.max_seconds": 0})
    monkeypatch.setattr("startup.maybe_compile", lambda loss_fn, *rest: "compiled" if compiled else loss_fn)
    monkeypatch.setattr("startup.check_fused_loss", lambda loss_fn, *rest: tried.append(loss_fn))
    found = compiled_loss(trainer)
    assert (found, tried) == (("compiled", []) if compiled else (trainer.loss_fn, [trainer.loss_fn]))


def test_a_loss_that_cannot_be_compiled_runs_uncompiled(monkeypatch):
    """With a warning. A GPU that is full is no reason to try without."""
    model, said = SimpleNamespace(loss_options=LossOptions(2**20, 64, fused=True)), []
    loss_fn = BatchLoss(model, Device("cpu"))
    attempt = Mock(side_effect=[torch.OutOfMemoryError("full"), RuntimeError("no compiler")])
    monkeypatch.setattr(BatchLoss, "try_backward", attempt)
    with pytest.raises(torch.OutOfMemoryError):
        check_fused_loss(loss_fn, None, said.append)
    check_fused_loss(loss_fn, None, said.append)
    assert not model.loss_options.fused and "no compiler" in said[0]
    check_fused_loss(loss_fn, None, said.append)
    check_fused_loss(replace(loss_fn, model=SimpleNamespace(loss_options=None)), None, said.append)
    assert attempt.call_count == 2
