"""The kernels of decoding: products and attention in C are those of torch, by every way in which they can be compiled."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from generation import kernels
from generation.kernels import attend, in_panels, product, values_width

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels here: {kernels.library()}")
every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])


PROCESSORS = {  # what a compiler is asked for: this processor, and others whose code it can run
    "native": ("gcc", ""), "AVX-512 without bf16": ("gcc", "-mno-avx512bf16"),
    "AVX2": ("gcc", "-march=haswell"), "SSE2": ("gcc", "-march=x86-64"), "clang": ("clang", ""),
    "AVX2 by clang": ("clang", "-march=haswell")}


@pytest.fixture(scope="module")
def compiled_for(tmp_path_factory):
    """Compiles the kernels for one of PROCESSORS."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "nothing.c").touch()

    @cache
    def compile_for(name: str) -> ctypes.CDLL:
        compiler, flags = PROCESSORS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CC", compiler)
            patch.setenv("NANOHYDRA_CFLAGS", flags)
            patch.setenv("XDG_CACHE_HOME", str(folder))
            try:
                kernels.load_library(folder / "nothing.c")
            except OSError as error:
                pytest.skip(f"this machine cannot compile with {compiler} {flags}: {error}")
            return kernels.library.__wrapped__()
    return compile_for


@pytest.fixture(params=PROCESSORS)
def processor(request, compiled_for, monkeypatch):
    found = compiled_for(request.param)
    assert not isinstance(found, OSError), found
    monkeypatch.setattr(kernels, "library", lambda: found)
    return found


@every_precision
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("size", [(24, 32), (53, 30), (64, 1), (1, 5), (50257, 16)], ids=str)
def test_a_product_is_a_linear_layer(processor, precision, rows, size):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(size), torch.randn(size[0]), torch.randn(rows, 1, size[1])
    expected = F.linear(x, weight, bias)
    y = product(weight, bias, precision)(x)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert (y - expected).abs().max() / expected.abs().max() < {"fp32": 1e-6, "bf16": 0.01, "int8": 0.02}[precision]
    torch.testing.assert_close(product(weight, None, precision)(x), y - bias, rtol=1e-4, atol=1e-4)


@every_precision
def test_a_row_gives_the_same_bits_alone_and_among_others(processor, precision):
    torch.manual_seed(0)
    multiply, x = product(torch.randn(500, 90), torch.randn(500), precision), torch.randn(70, 90)
    y = multiply(x)
    for rows in (1, 2, 4, 7, 65):
        assert torch.equal(multiply(x[-rows:]), y[-rows:])


@every_precision
def test_rows_may_lie_in_memory_as_they_like(precision):
    torch.manual_seed(0)
    multiply, x = product(torch.randn(70, 32), None, precision), torch.randn(32, 5).t()
    assert torch.equal(multiply(x), multiply(x.contiguous()))


def test_bf16_rounds_rows_only_where_it_is_native(processor):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    rows = x.bfloat16() if ctypes.c_int.in_dll(processor, "rounds_rows").value else x
    expected = F.linear(rows.double(), weight.bfloat16().double())
    found = product(weight, None, "bf16")(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_int8_rounds_weights_alone_to_127_steps(processor):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(5, 256)
    scales = weight.abs().amax(1, keepdim=True) / 127
    expected = F.linear(x.double(), ((weight / scales).round() * scales).double())
    found = product(weight, None, "int8")(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_code_without_bf16_instructions_rounds_no_rows(compiled_for):
    for name in ("AVX-512 without bf16", "AVX2", "SSE2"):
        assert not ctypes.c_int.in_dll(compiled_for(name), "rounds_rows").value


@every_precision
def test_large_and_small_weights_and_an_output_of_zeros(precision):
    weight = torch.tensor([[1e30] * 8, [1e-20] * 8, [0.0] * 8])
    torch.testing.assert_close(product(weight, None, precision)(torch.ones(1, 8)), 8 * weight.T[:1],
                               rtol=0.01, atol=0 if precision != "int8" else 1e-10)


@every_precision
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_of_what_is_not_finite_nothing_finite_comes(processor, precision, rows, number):
    assert not product(torch.ones(8, 8), None, precision)(torch.full((rows, 8), number)).isfinite().any()
    assert not product(torch.full((8, 8), number), None, precision)(torch.ones(rows, 8)).isfinite().any()


def test_rounding_makes_no_number_of_any_nan(processor):
    """Also of those next to which the whole numbers begin again."""
    nan = torch.tensor([[-1] * 8, [0x7FFFFFFF] * 8], dtype=torch.int32).view(torch.float32)
    assert not product(torch.ones(8, 8), None, "bf16")(nan).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "heads", "D"), [(4, 1, 64), (2, 2, 8), (1, 6, 80), (3, 5, 128), (2, 1, 2)])
@pytest.mark.parametrize("lengths", [(0,), (1, 62), (63, 64, 127, 5)], ids=str)
def test_attention_is_that_of_torch(processor, dtype, groups, heads, D, lengths):
    """With what is in the cache rounded as it is there; the new position comes behind the others of its own row."""
    torch.manual_seed(0)
    B, room, width = len(lengths), 192, values_width(D)
    held = [torch.full((B, groups, room, D), torch.nan) for _ in range(2)]  # as memory may be
    for each in held:
        for row, length in enumerate(lengths):
            each[row, :, :length] = torch.randn(groups, length, D)
    q = 3 * torch.randn(B, groups * heads + 1, 1, D)[:, 1:]  # rows that lie apart
    k, v = torch.randn(B, groups, 1, D), torch.randn(B, groups, 1, D)
    keys, values = in_panels(held[0].to(dtype)), in_panels(held[1].mT.to(dtype), width)
    y = attend(q, k, v, keys, values, torch.full((B, groups * heads, room), torch.nan), torch.tensor(lengths))
    for row, length in enumerate(lengths):
        for each, new in zip(held, (k, v), strict=True):
            each[row, :, length] = new[row, :, 0]
        k_seen, v_seen = (each[row : row + 1, :, : length + 1].to(dtype).float() for each in held)
        expected = F.scaled_dot_product_attention(q[row : row + 1], k_seen, v_seen, enable_gqa=True)
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        if dtype == torch.bfloat16 and length % 2 == 0:
            held[1][row, :, length + 1] = 0  # two lie together
    for found, expected in ((keys, in_panels(held[0].to(dtype))), (values, in_panels(held[1].mT.to(dtype), width))):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_right_where_scores_are_far_apart(dtype):
    """From one that takes all to those that are alike, also where an exponential is next to nothing."""
    for spread in (0.0, 1.0, 30.0, 86.0, 89.0, 1e4, 1e30):
        held = torch.zeros(1, 1, 64, 2)
        held[0, 0, :20, 0] = torch.linspace(-spread, 0, 20) * math.sqrt(2)
        values = torch.zeros(1, 1, 64, 2)
        values[0, 0, :20] = torch.arange(40.0).view(20, 2)
        q, new = torch.tensor([[[[1.0, 0.0]]]]), torch.full((1, 1, 1, 2), -1e30)
        y = attend(q, new, new * 0, in_panels(held.to(dtype)), in_panels(values.mT.to(dtype), 16), torch.empty(1, 1, 64), torch.tensor([20]))
        scores = held[0, 0, :20, 0].to(dtype).float() / math.sqrt(2)
        torch.testing.assert_close(y.view(1, 2), scores.softmax(0)[None] @ values[0, 0, :20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_seen_from_then_on(dtype, number):
    """But for a score of -infinity beside others, which weighs nothing."""
    held = torch.zeros(1, 1, 64, 16)
    one, scores, first, second = torch.ones(1, 1, 1, 16), torch.empty(1, 1, 64), torch.tensor([0]), torch.tensor([1])
    for new_key, new_value in ((number * one, one), (one, number * one)):
        keys, values = in_panels(held.to(dtype)), in_panels(held.mT.to(dtype), 16)
        assert not attend(one, new_key, new_value, keys, values, scores, first).isfinite().any()
        weighs_nothing = new_key[0, 0, 0, 0] == -torch.inf
        assert attend(one, one, one, keys, values, scores, second).isfinite().all() == weighs_nothing
