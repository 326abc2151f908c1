"""Device, precision and compilation: what 'auto' picks, and what is refused."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import device as place
from training.device import Device, maybe_compile
from training.memory import bytes_kept


@pytest.fixture(autouse=True)
def any_kernel():
    """What a test asks of torch's kernels ends with it."""
    yield
    torch.use_deterministic_algorithms(False)


def test_auto_on_a_cpu_takes_bf16_only_where_it_is_native(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for native, precision in (("1", "bf16"), ("0", "fp32")):
        monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
        device = Device()
        assert (device.type, device.precision) == ("cpu", precision)
        assert "native" in device.describe()


@pytest.mark.slow
def test_memory_that_is_freed_is_kept_and_said_to_be():
    """200 MB after 240 are no new pages: without it, there are 100 or 50,000 faults, by the size of a page."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc is what can be asked to")
    code = ("import resource, torch\nfrom training.device import Device\ndevice = Device('cpu')\n"
            "def faults(size):\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n    torch.ones(size)\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "faults(60_000_000)\nprint(faults(50_000_000), device.describe())")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    count, said = done.stdout.split(maxsplit=1)
    assert int(count) < 50 and said.endswith("; memory that a step frees is kept for the next\n")


def test_auto_on_an_old_gpu_takes_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert Device().precision == "fp16"
    with pytest.raises(ValueError, match="bf16 is not native"):
        Device(precision="bf16")


def test_a_device_that_is_not_there_is_an_error_that_names_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device=cuda is not available here: choose auto or one of .*cpu"):
        Device("cuda")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_are_in_the_precision_asked_for(precision, dtype):
    with Device("cpu", precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_peak_is_known_by_the_name_of_the_gpu(monkeypatch):
    device = Device("cpu", "bf16")
    assert device.peak_flops() is None
    device.type = "cuda"
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("?", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert device.peak_flops() == peak


def test_nominal_rates_follow_threads_and_formats(monkeypatch):
    rates = {}
    for native in ("0", "1"):
        monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            rates[native, threads] = Device("cpu").nominal_flops()
    assert rates["1", 1] > rates["0", 1] and rates["0", 2] == 2 * rates["0", 1]


def test_compiling_is_decided_without_a_clock(monkeypatch):
    def no_clock():
        raise AssertionError

    monkeypatch.setattr("time.perf_counter", no_clock)
    spy = Spy(monkeypatch)
    assert spy("auto", 60) == "model" and spy("auto", 1e5) == ("compiled", "model")


@pytest.mark.parametrize(("native", "precision", "warns"), [
    ("0", "bf16", True), ("0", "fp32", False), ("1", "bf16", False), ("0", "auto", False)])
def test_an_emulated_format_is_warned_of(monkeypatch, native, precision, warns):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", native)
    monkeypatch.setattr(place, "busy_cpus", lambda: 0.0)
    found = [line for line in Device("cpu", precision).warnings() if "emulates bf16" in line]
    assert bool(found) == warns
    assert all(re.search(r"took \d+\.\d times as long as in fp32", line) for line in found)


@pytest.mark.parametrize(("busy", "threads", "advice"), [
    (8, 4, "training.threads=1"), (8, 1, ""), (0.3, 4, ""), (1, 4, "training.threads=3"), (0, 6, "training.threads=4")])
def test_a_busy_machine_is_warned_of(monkeypatch, busy, threads, advice):
    monkeypatch.setattr(place, "busy_cpus", lambda: busy)
    monkeypatch.setattr(place.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(place, "usable_cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = list(Device("cpu", "fp32").warnings())
    assert [line.endswith(f"try {advice}.") for line in found] == [True] * bool(advice)


class Spy:
    def __init__(self, monkeypatch, fails=False):
        self.said, self.tried, self.compiled = [], [], 0
        self.fails = fails
        monkeypatch.setattr(torch, "compile", self.compile)
        monkeypatch.setattr(place.shutil, "which", lambda name: "/usr/bin/g++")

    def compile(self, model):
        self.compiled += 1
        return ("compiled", model)

    def trial(self, model):
        self.tried.append(model)
        if self.fails:
            raise RuntimeError("no header Python.h\nand more")

    def __call__(self, choice, nominal_seconds, device=None):
        device = device or Device("cpu", "fp32")
        flops = nominal_seconds * device.nominal_flops()
        return maybe_compile("model", choice, device, flops, self.trial, self.said.append)


def test_auto_compiles_only_where_it_pays_back(monkeypatch):
    spy = Spy(monkeypatch)
    assert spy("auto", 60) == "model" and spy.compiled == 0
    assert spy("auto", 1e5) == ("compiled", "model") and spy.tried == [("compiled", "model")]
    assert spy("false", 1e5) == "model" and spy("true", 1) == ("compiled", "model")


@pytest.mark.parametrize("choice, expected", [("true", True), ("false", False)])
def test_compiled_for_a_cpu_is_compiled_deterministically(monkeypatch, choice, expected):
    """The compiler's own gradient of an embedding adds in any order; plain torch's on a CPU does not."""
    Spy(monkeypatch)(choice, 1)
    assert torch.are_deterministic_algorithms_enabled() is expected


def test_auto_falls_back_with_one_warning_that_names_the_cause(monkeypatch):
    spy = Spy(monkeypatch, fails=True)
    assert spy("auto", 1e5) == "model"
    (warning,) = [line for line in spy.said if line.startswith("Warning")]
    assert "no header Python.h" in warning and "and more" not in warning


def test_true_fails_clearly(monkeypatch):
    with pytest.raises(ValueError, match=r"training.compile=true failed .*no header Python.h.*training.compile=false"):
        Spy(monkeypatch, fails=True)("true", 1)


def test_a_machine_without_a_compiler_is_named_as_the_cause(monkeypatch):
    spy = Spy(monkeypatch)
    monkeypatch.setattr(place.shutil, "which", lambda name: None)
    assert spy("auto", 1e5) == "model" and "no C++ compiler found" in spy.said[-1] and spy.compiled == 0


@pytest.mark.slow
def test_the_compiled_model_gives_the_same_loss_and_gradients():
    from model import GPT, GPTConfig

    if not any(map(place.shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, position="rotary", norm="rms", qk_norm=True))
    ids = torch.randint(11, (3, 8))
    results = []
    for one in (model, torch.compile(model)):
        model.zero_grad()
        loss = one(ids, ids.roll(-1, 1))
        loss.backward()
        results.append((loss.item(), [weights.grad.clone() for weights in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


def test_what_a_call_keeps_for_its_gradients_is_counted_once():
    x, weight = torch.ones(100, 50), torch.nn.Parameter(torch.ones(20, 50))
    assert bytes_kept(lambda: torch.nn.functional.linear(x, weight)) == 4 * 100 * 50
    assert bytes_kept(lambda: torch.nn.functional.linear(x, weight).exp() + torch.nn.functional.linear(x, weight)) == 4 * (100 * 50 + 100 * 20)
    with torch.no_grad():
        assert bytes_kept(lambda: torch.nn.functional.linear(x, weight)) == 0
