"""Native number formats: asked of the device, or answered by the environment."""

from __future__ import annotations

import pytest
import torch

from hardware import cpu_quota, native, onednn_beats_mkl, usable_cpus
from training.device import Device


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    for precision in ("BF16", "FP16"):
        monkeypatch.delenv(f"NANOHYDRA_NATIVE_{precision}", raising=False)


@pytest.mark.parametrize(("avx512_bf16", "amx", "onednn", "expected"), [
    (False, False, False, False), (False, False, True, False),  # AVX2; AVX-512 without bf16
    (True, False, True, True), (False, True, True, True), (True, True, False, False)])
def test_bf16_needs_instructions_and_a_library_using_them(avx512_bf16, amx, onednn, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert native("bf16") == expected and native("fp32")
    assert Device("cpu").precision == ("bf16" if expected else "fp32")


@pytest.mark.parametrize("answer", ["0", "1"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_environment_overrides_the_answer(precision, answer, monkeypatch):
    monkeypatch.setenv(f"NANOHYDRA_NATIVE_{precision.upper()}", answer)
    assert native(precision) == (answer == "1")


@pytest.mark.parametrize("answer", ["", "yes", "2"])
def test_other_values_override_nothing(answer, monkeypatch):
    expected = native("bf16")
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", answer)
    assert native("bf16") == expected


@pytest.mark.parametrize("supported", [True, False])
def test_gpus_are_asked_themselves(supported, monkeypatch):
    monkeypatch.setenv("NANOHYDRA_NATIVE_BF16", str(int(not supported)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert native("bf16", "cuda") == supported and native("fp16", "cuda")
    assert native("fp16", "mps") and not native("bf16", "mps")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cpu_build_without_onednn_has_fp32_only(precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not native(precision) and native("fp32")


@pytest.mark.parametrize(("files", "expected"), [
    ({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None), ({"cpu.max": "?"}, None)])
def test_a_containers_quota_of_cpus_is_read(files, expected, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cpu_quota(tmp_path) == expected


def test_no_more_cpus_are_used_than_the_quota(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, expected in ((None, 8), (1.5, 2), (0.2, 1), (64, 8)):
        monkeypatch.setattr("hardware.cpu_quota", lambda _, quota=quota: quota)
        assert usable_cpus() == expected


@pytest.mark.parametrize(("vendor", "answer", "expected"), [
    ("AuthenticAMD", None, True), ("GenuineIntel", None, False), ("", None, False),
    ("GenuineIntel", "1", True), ("AuthenticAMD", "0", False)])
def test_onednn_replaces_mkl_on_amd_or_on_request(vendor, answer, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr("hardware.vendor", lambda: vendor)
    monkeypatch.delenv("NANOHYDRA_ONEDNN", raising=False)
    if answer:
        monkeypatch.setenv("NANOHYDRA_ONEDNN", answer)
    assert onednn_beats_mkl() == expected


def test_onednn_needs_torchs_function(monkeypatch):
    monkeypatch.setenv("NANOHYDRA_ONEDNN", "1")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not onednn_beats_mkl()
