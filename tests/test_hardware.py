"""Native number formats: asked of the device, or answered by the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hardware import (
    are_crowded,
    available_memory,
    cpu_quota,
    native,
    onednn_beats_mkl,
    sleep_while_waiting,
    usable_cpus,
)
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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert native("bf16", "cuda") == supported and native("fp16", "cuda")
    assert native("fp16", "mps") and not native("bf16", "mps")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cpu_build_without_onednn_has_fp32_only(precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not native(precision) and native("fp32")


def write_cgroups(folder, groups, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "own").write_text(groups)


V1 = {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(("groups", "files", "expected"), [
    ("0::/", {}, None), ("0::/", {"cpu.max": "150000 100000"}, 1.5), ("0::/", {"cpu.max": "max 100000"}, None),
    ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
    ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "100000 100000"}, 1.0),
    ("0::/of/outside", {"cpu.max": "50000 100000"}, 0.5), ("", {"cpu.max": "50000 100000"}, 0.5),
    ("3:cpu,cpuacct:/x\n2:memory:/", V1, 3.0), ("2:memory:/x", V1, None),
    ("3:cpu:/of/outside", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ("0::/", {"cpu.max": "?"}, None), ("0::/", {"cpu.max": "1 0"}, None), ("odd", {}, None)])
def test_the_quota_of_this_processs_groups_is_read(groups, files, expected, tmp_path):
    write_cgroups(tmp_path, groups, files)
    assert cpu_quota(tmp_path, tmp_path / "own") == expected


USED = {"memory.current": "3000", "memory.stat": "file 9\ninactive_file 1000"}


@pytest.mark.parametrize(("groups", "limits", "expected"), [
    ("0::/", {"memory.max": "5000"}, 3000), ("0::/job/step", {"job/memory.max": "5000"}, 3000),
    ("0::/job", {"memory.max": "4500", "job/memory.max": "5000"}, 2500)])
def test_the_free_memory_is_that_of_this_processs_groups(groups, limits, expected, tmp_path):
    """A scheduler limits the group of a job, which is not the root."""
    folders = {str(Path(name).parent) for name in limits}
    write_cgroups(tmp_path, groups, limits | {f"{folder}/{name}": content for folder in folders for name, content in USED.items()})
    assert available_memory(tmp_path, tmp_path / "own") == expected


def test_the_free_memory_by_cgroups_of_version_1(tmp_path):
    files = {"limit_in_bytes": "5000", "usage_in_bytes": "3000", "stat": "inactive_file 5\ntotal_inactive_file 1000"}
    write_cgroups(tmp_path, "4:memory:/x", {f"memory/x/memory.{name}": content for name, content in files.items()})
    assert available_memory(tmp_path, tmp_path / "own") == 3000


@pytest.mark.parametrize(("threads", "busy", "expected"), [
    (2, 0.0, False), (2, 1.0, True), (1, 8.0, False), (4, 0.3, False), (3, 2.0, True)])
def test_threads_are_crowded_where_others_need_their_cpus(monkeypatch, threads, busy, expected):
    monkeypatch.setattr("os.cpu_count", lambda: max(threads, 4) if threads != 2 else 2)
    assert are_crowded(threads, busy) == expected


@pytest.mark.parametrize(("busy", "policy", "expected"), [
    (2.0, None, "PASSIVE"), (0.0, None, None), (2.0, "ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_where_cpus_are_busy(monkeypatch, busy, policy, expected):
    environment = {"OMP_NUM_THREADS": "2"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("hardware.busy_cpus", lambda: busy)
    sleep_while_waiting()
    assert environment.get("OMP_WAIT_POLICY") == expected


def test_no_more_cpus_are_used_than_the_quota(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, expected in ((None, 8), (1.5, 2), (0.2, 1), (64, 8)):
        monkeypatch.setattr("hardware.cpu_quota", lambda *_, quota=quota: quota)
        assert usable_cpus() == expected


@pytest.mark.parametrize(("vendor", "capability", "answer", "expected"), [
    ("AuthenticAMD", "AVX512", None, True), ("AuthenticAMD", "AVX2", None, False), ("GenuineIntel", "AVX512", None, False),
    ("", "AVX512", None, False), ("GenuineIntel", "AVX2", "1", True), ("AuthenticAMD", "AVX512", "0", False)])
def test_onednn_replaces_mkl_on_amd_or_on_request(vendor, capability, answer, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr("hardware.cpu_info", lambda field: vendor)
    monkeypatch.delenv("NANOHYDRA_ONEDNN", raising=False)
    if answer:
        monkeypatch.setenv("NANOHYDRA_ONEDNN", answer)
    assert onednn_beats_mkl() == expected


def test_onednn_needs_torchs_function(monkeypatch):
    monkeypatch.setenv("NANOHYDRA_ONEDNN", "1")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not onednn_beats_mkl()
