"""Kernels: C products and attention equal torch's on every processor; compiled code is cached, and nothing planted is loaded."""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from generation import c_library, kernels
from generation.c_library import load_library
from generation.kernels import NARROW, attend, in_panels, product, values_width

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
every_cache_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

# Compilers and flags: this processor, and others whose code it can run.
PROCESSORS = {
    "native": ("gcc", ""), "AVX2": ("gcc", "-march=haswell"), "AVX-512 without bf16": ("gcc", "-mno-avx512bf16"),
    "SSE2": ("gcc", "-march=x86-64"), "clang": ("clang", ""), "AVX2 by clang": ("clang", "-march=haswell")}
FAST = ("native", "AVX2")
every_processor = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PROCESSORS]


@pytest.fixture(scope="module")
def compiled_for(tmp_path_factory):
    """Compiles the kernels for one of PROCESSORS."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "nothing.c").touch()

    @cache
    def compile_for(name: str) -> ctypes.CDLL:
        if name == "native" and "CC" not in os.environ and "NANOHYDRA_CFLAGS" not in os.environ:
            return kernels.library()  # compiled already
        compiler, flags = PROCESSORS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CC", compiler)
            patch.setenv("NANOHYDRA_CFLAGS", flags)
            patch.setenv("XDG_CACHE_HOME", str(folder))
            try:
                load_library(folder / "nothing.c")
            except OSError as error:
                pytest.skip(f"this machine cannot compile with {compiler} {flags}: {error}")
            return kernels.library.__wrapped__()
    return compile_for


@pytest.fixture(params=every_processor)
def processor(request, compiled_for, monkeypatch):
    found = compiled_for(request.param)
    assert not isinstance(found, OSError), found
    monkeypatch.setattr(kernels, "library", lambda: found)
    return found


# Products


@every_precision
def test_a_product_is_a_linear_layer(processor, precision):
    tolerance = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.02}[precision]
    for size in [(24, 32), (53, 30), (64, 1), (1, 5), (5025, 16)]:
        torch.manual_seed(0)
        weight, bias = torch.randn(size), torch.randn(size[0])
        multiply, without_bias = product(weight, bias, precision), product(weight, None, precision)
        for rows in [1, 3, 16, 70]:
            torch.manual_seed(rows)
            x = torch.randn(rows, 1, size[1])
            y, expected = multiply(x), F.linear(x, weight, bias)
            assert y.shape == expected.shape and y.dtype == torch.float32
            assert (y - expected).abs().max() / expected.abs().max() < tolerance
            torch.testing.assert_close(without_bias(x), y - bias, rtol=1e-4, atol=1e-4)


@every_precision
def test_a_row_is_bit_identical_alone_and_among_others(processor, precision):
    torch.manual_seed(0)
    multiply, x = product(torch.randn(500, 90), torch.randn(500), precision), torch.randn(70, 90)
    y = multiply(x)
    for rows in (1, 2, 4, 7, 65):
        assert torch.equal(multiply(x[-rows:]), y[-rows:])


@every_precision
def test_rows_need_not_be_contiguous(precision):
    torch.manual_seed(0)
    multiply, x = product(torch.randn(70, 32), None, precision), torch.randn(32, 5).t()
    assert torch.equal(multiply(x), multiply(x.contiguous()))


def test_bf16_rounds_rows_only_where_it_is_native(processor):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    rows = x.bfloat16() if ctypes.c_int.in_dll(processor, "rounds_rows").value else x
    expected = F.linear(rows.double(), weight.bfloat16().double())
    torch.testing.assert_close(product(weight, None, "bf16")(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_int8_rounds_only_weights_to_127_steps(processor):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    scales = weight.abs().amax(1, keepdim=True) / 127
    expected = F.linear(x.double(), ((weight / scales).round() * scales).double())
    torch.testing.assert_close(product(weight, None, "int8")(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in every_processor if name.values[0] in ("AVX-512 without bf16", "AVX2", "SSE2")])
def test_code_without_bf16_instructions_rounds_no_rows(compiled_for, name):
    assert not ctypes.c_int.in_dll(compiled_for(name), "rounds_rows").value


@every_precision
def test_large_and_small_weights_and_an_output_of_zeros(precision):
    weight = torch.tensor([[1e30] * 8, [1e-20] * 8, [0.0] * 8])
    torch.testing.assert_close(product(weight, None, precision)(torch.ones(1, 8)), 8 * weight.T[:1],
                               rtol=0.01, atol=0 if precision != "int8" else 1e-10)


@every_precision
def test_nan_and_infinity_reach_the_result(processor, precision):
    for rows in (1, 2, 5):
        for number in (torch.inf, torch.nan):
            assert not product(torch.ones(8, 8), None, precision)(torch.full((rows, 8), number)).isfinite().any()
            assert not product(torch.full((8, 8), number), None, precision)(torch.ones(rows, 8)).isfinite().any()


def test_rounding_to_bf16_keeps_nan(processor):
    """Also the NaN whose bits overflow when rounded."""
    nan = torch.tensor([[-1] * 8, [0x7FFFFFFF] * 8], dtype=torch.int32).view(torch.float32)
    assert not product(torch.ones(8, 8), None, "bf16")(nan).isfinite().any()


# Attention


@every_cache_type
@pytest.mark.parametrize(("groups", "heads", "D"), [(4, 1, 64), (2, 2, 8), (1, 6, 80), (3, 5, 128), (2, 1, 2)])
@pytest.mark.parametrize("lengths", [(0,), (1, 62), (63, 64, 127, 5)], ids=str)
def test_attention_is_that_of_torch(processor, dtype, groups, heads, D, lengths):
    """With a cache of rounded numbers, which gets the new position at the end of each row and no other change."""
    torch.manual_seed(0)
    B, capacity, width = len(lengths), 192, values_width(D)
    cached = [torch.full((B, groups, capacity, D), torch.nan) for _ in range(2)]  # as uninitialised memory may be
    for each in cached:
        for row, length in enumerate(lengths):
            each[row, :, :length] = torch.randn(groups, length, D)
    q = 3 * torch.randn(B, groups * heads + 1, 1, D)[:, 1:]  # rows that are not contiguous
    k, v = torch.randn(B, groups, 1, D), torch.randn(B, groups, 1, D)
    keys, values = in_panels(cached[0].to(dtype)), in_panels(cached[1].mT.to(dtype), width)
    y = attend(q, k, v, keys, values, torch.full((B, groups * heads, capacity), torch.nan), torch.tensor(lengths))
    for row, length in enumerate(lengths):
        for each, new in zip(cached, (k, v), strict=True):
            each[row, :, length] = new[row, :, 0]
        k_seen, v_seen = (each[row : row + 1, :, : length + 1].to(dtype).float() for each in cached)
        expected = F.scaled_dot_product_attention(q[row : row + 1], k_seen, v_seen, enable_gqa=True)
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        if dtype == torch.bfloat16 and length % 2 == 0:
            cached[1][row, :, length + 1] = 0  # two are stored together
    for found, expected in ((keys, in_panels(cached[0].to(dtype))), (values, in_panels(cached[1].mT.to(dtype), width))):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_cache_type
def test_softmax_is_right_where_scores_are_far_apart(dtype):
    """From one that takes all to equal ones, also where an exponential underflows."""
    for spread in (0.0, 1.0, 30.0, 86.0, 89.0, 1e4, 1e30):
        cached = torch.zeros(1, 1, 64, 2)
        cached[0, 0, :20, 0] = torch.linspace(-spread, 0, 20) * math.sqrt(2)
        values = torch.zeros(1, 1, 64, 2)
        values[0, 0, :20] = torch.arange(40.0).view(20, 2)
        q, new = torch.tensor([[[[1.0, 0.0]]]]), torch.full((1, 1, 1, 2), -1e30)
        y = attend(q, new, new * 0, in_panels(cached.to(dtype)), in_panels(values.mT.to(dtype), NARROW), torch.empty(1, 1, 64), torch.tensor([20]))
        scores = cached[0, 0, :20, 0].to(dtype).float() / math.sqrt(2)
        torch.testing.assert_close(y.view(1, 2), scores.softmax(0)[None] @ values[0, 0, :20], rtol=1e-5, atol=1e-5)


@every_cache_type
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_nan_and_infinity_stay_in_the_cache(dtype, number):
    """Except for a score of -infinity beside others, which has weight 0."""
    cached = torch.zeros(1, 1, 64, 16)
    one, scores, first, second = torch.ones(1, 1, 1, 16), torch.empty(1, 1, 64), torch.tensor([0]), torch.tensor([1])
    for new_key, new_value in ((number * one, one), (one, number * one)):
        keys, values = in_panels(cached.to(dtype)), in_panels(cached.mT.to(dtype), NARROW)
        assert not attend(one, new_key, new_value, keys, values, scores, first).isfinite().any()
        has_no_weight = new_key[0, 0, 0, 0] == -torch.inf
        assert attend(one, one, one, keys, values, scores, second).isfinite().all() == has_no_weight


# Compiling


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A source that compiles fast, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }")
    return source


@pytest.fixture
def compilations(monkeypatch):
    """The commands that compile a library."""
    commands, run = [], c_library.compile_source
    monkeypatch.setattr(c_library, "compile_source", lambda source, command: commands.append(command) or run(source, command))
    return commands


def cached_files(tmp_path):
    return list((tmp_path / "cache/nanohydra").iterdir())


def test_the_next_process_loads_the_cached_library(small, compilations, tmp_path):
    assert load_library(small).answer() == 42 and len(compilations) == 1
    assert load_library(small).answer() == 42
    assert len(compilations) == 1 and len(cached_files(tmp_path)) == 1


@pytest.mark.parametrize("change", ["source", "flags", "processor"])
def test_another_source_flag_or_processor_is_compiled(small, compilations, change, monkeypatch, tmp_path):
    load_library(small)
    if change == "source":
        small.write_text("int answer(void) { return 43; }")
    elif change == "flags":
        monkeypatch.setenv("NANOHYDRA_CFLAGS", "-DANSWER")
    else:
        monkeypatch.setattr(c_library, "cpu_info", lambda field: "another")
    assert load_library(small).answer() == (43 if change == "source" else 42)
    assert len(compilations) == 2 and len(cached_files(tmp_path)) == 2


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


DAMAGES = {
    "empty": lambda content: b"", "cut in its checksum": lambda content: content[:20],
    "a page short": lambda content: content[:-4096], "longer": lambda content: content + b"0",
    "zeros": lambda content: bytes(len(content)), "another checksum": lambda content: flip(content, 3),
    "first bit": lambda content: flip(content, 32), "a bit": lambda content: flip(content, 7000), "last bit": lambda content: flip(content, len(content) - 1)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_replaced(small, compilations, damage, tmp_path):
    load_library(small)
    (path,) = cached_files(tmp_path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert load_library(small).answer() == 42 and len(compilations) == 2
    load_library(small)
    assert len(compilations) == 2, "it was not replaced"


def test_a_cached_file_that_is_no_library_is_replaced(small, tmp_path):
    load_library(small)
    (path,) = cached_files(tmp_path)
    c_library.write_cached(path, b"no library")
    assert load_library(small).answer() == 42


def test_truncating_a_loaded_library_changes_nothing(small, tmp_path):
    """A library that is mapped from a file crashes the process when that file is truncated."""
    library = load_library(small)
    (path,) = cached_files(tmp_path)
    os.truncate(path, 0)
    assert library.answer() == 42


@pytest.mark.parametrize("planted", ["file", "link", "fifo", "folder"])
def test_a_planted_library_is_not_loaded(small, planted, tmp_path, monkeypatch):
    load_library(small)
    (path,) = cached_files(tmp_path)
    evil = tmp_path / "evil.c"
    evil.write_text("int answer(void) { return 666; }")
    content = c_library.compile_source(evil, ["gcc", *c_library.OPTIONS])
    path.unlink()
    if planted == "link":
        c_library.write_cached(tmp_path / "elsewhere/evil", content)
        path.symlink_to(tmp_path / "elsewhere/evil")
    elif planted == "fifo":
        os.mkfifo(path)
    elif planted == "folder":
        path.mkdir()
    else:
        c_library.write_cached(path, content)
        give_to_another_user(monkeypatch, path)
    assert load_library(small).answer() == 42


def give_to_another_user(monkeypatch, path):
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr("os.getuid", lambda: 12345)


def test_a_folder_of_another_user_is_not_used(small, compilations, monkeypatch, tmp_path):
    load_library(small)
    give_to_another_user(monkeypatch, tmp_path / "cache/nanohydra")
    before = cached_files(tmp_path)[0].stat()
    assert load_library(small).answer() == 42
    assert len(compilations) == 2 and cached_files(tmp_path)[0].stat() == before


def test_a_folder_that_is_a_link_is_not_used(small, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/nanohydra").symlink_to(tmp_path / "elsewhere")
    assert load_library(small).answer() == 42
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_folder_is_closed_to_other_users(small, tmp_path):
    load_library(small)
    folder = tmp_path / "cache/nanohydra"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    load_library(small)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("home", ["/proc/nobody", "", "relative"])
def test_without_a_cache_folder_each_process_compiles(small, home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert load_library(small).answer() == 42
    assert list(tmp_path.iterdir()) == [small]


def test_without_memfd_a_private_copy_is_loaded(small, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert load_library(small).answer() == 42


def test_several_libraries_can_be_loaded(small):
    found = []
    for answer in range(3):
        small.write_text(f"int answer(void) {{ return {answer}; }}")
        found.append(load_library(small))
    assert [library.answer() for library in found] == [0, 1, 2]


@pytest.mark.parametrize(("compiler", "source", "problem"), [
    ("no-such-compiler", "int x;", "no C compiler here .no-such-compiler.: install gcc"),
    ("/", "int x;", "no C compiler here"), ("gcc", "int x", "gcc .*some.c.* failed: ")])
def test_the_error_says_why_compiling_failed(compiler, source, problem, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "some.c"
    path.write_text(source)
    with pytest.raises(OSError, match=problem):
        load_library(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", ["gcc", "clang", "cc"])
def test_any_common_compiler_is_found(there, small, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_library.shutil, "which", lambda name: name if name == there else None)
    monkeypatch.setattr(c_library, "compile_source", lambda source, command: command[0].encode())
    monkeypatch.setattr(c_library, "load", bytes.decode)
    assert load_library(small) == there
