"""The low-bit kernels, interpreted, against float64 from the same codes. bfloat16 only compiles: it is interpreted
wrongly."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GATES, guarded, poisoned, relative_error, worst_error
from low_bit import exact_int8, exact_weight, exact_weight_only, int8_operands, packed_operands
from torch import Tensor

from archfront.kernels.ops import dequantise_weight, fp8_linear, int8_linear, quantise_rows, weight_only_linear
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.tuning import Setting

BITS = (8, 4, 3, 2)
HALF, FULL = torch.float16, torch.float32


def amid_poison(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [tensor if tensor is None else guarded(tensor)[0] for tensor in tensors]


def by_int8(
    given: tuple[Tensor | None, ...], activation: str, dtype: torch.dtype, setting: Setting | None = None
) -> Tensor:
    xq, _, wq, *_ = given
    assert xq is not None
    assert wq is not None
    out, strayed = poisoned((len(xq), len(wq)), dtype)
    int8_linear.run_kernel(*amid_poison(given), out, activation=activation, setting=setting)  # type: ignore[misc, arg-type]
    assert not strayed()
    return out


def by_weight_only(
    x: Tensor, weight: tuple[Tensor | None, ...], bits: int, group: int, setting: Setting | None = None
) -> Tensor:
    assert weight[0] is not None
    out, strayed = poisoned((len(x), weight[0].shape[1]), x.dtype)
    operands = amid_poison((x, *weight))
    weight_only_linear.run_kernel(*operands, out, bits=bits, group=group, setting=setting)  # type: ignore[misc, arg-type]
    assert not strayed()
    return out


def by_quantise(x: Tensor, before: int, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    codes, codes_strayed = poisoned(tuple(x.shape), torch.int8)
    scales, scales_strayed = poisoned((len(x),), FULL)
    operands = amid_poison((x, weight, bias))
    quantise_rows.run_kernel(*operands, codes, scales, before=before, eps=1e-6)  # type: ignore[misc, arg-type]
    assert not codes_strayed()
    assert not scales_strayed()
    return codes, scales


def tiles(candidates: list[Setting]) -> list[Setting]:
    """Without those that differ in warps and stages alone, which the interpreter knows nothing of."""
    found = [{name: value for name, value in one.items() if not name.startswith("num_")} for one in candidates]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def rows_before(x: Tensor, before: int, weight: Tensor, bias: Tensor) -> Tensor:
    """What is quantised, in float64."""
    wide = x.double()
    if before == quantise_rows.NORM:
        centred = wide - wide.mean(1, keepdim=True)
        return centred / (wide.var(1, correction=0, keepdim=True) + 1e-6).sqrt() * weight.double() + bias.double()
    return 0.5 * wide * (1 + torch.erf(wide * 0.5**0.5)) if before == quantise_rows.GELU else wide


@pytest.mark.parametrize("before", [quantise_rows.PLAIN, quantise_rows.NORM, quantise_rows.GELU])
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("shape", [(1, 384), (7, 33), (3, 1537), (5, 1)])
def test_codes_are_the_nearest_on_each_rows_scale(shape: tuple[int, int], dtype: torch.dtype, before: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    # Positive, since a row of nothing but the GELU's far negative side has few digits in float32.
    x[:, 0] = x[:, 0].abs() * 50
    x[1:2] = 0
    norm = (weight, bias) if before == quantise_rows.NORM else (None, None)
    codes, scales = by_quantise(x, before, *norm)
    twins = {
        quantise_rows.PLAIN: lambda: reference.quantise_rows(x),
        quantise_rows.NORM: lambda: reference.layer_norm_quantise(x, weight, bias, eps=1e-6),
        quantise_rows.GELU: lambda: reference.gelu_quantise(x),
    }
    exact = rows_before(x, before, weight, bias)
    for found, scale in ((codes, scales), twins[before]()):
        torch.testing.assert_close(scale.double(), exact.abs().amax(1).clamp_min(1e-37) / 127, rtol=1e-5, atol=1e-30)
        assert int(found.abs().max()) == 127
        # Half a step, and what float32 takes of it.
        assert float((exact / scale.double()[:, None] - found.double()).abs().max()) <= 0.501
    again = by_quantise(x, before, *norm)
    assert torch.equal(codes, again[0])
    assert torch.equal(scales, again[1])


def test_rows_of_zeros_tiny_numbers_or_nan_do_not_break_others() -> None:
    x = torch.randn(5, 20)
    x[0], x[1], x[2, 3], x[3, 4] = 0, 1e-42, torch.nan, -torch.inf
    codes, scales = by_quantise(x, quantise_rows.PLAIN)
    twin_codes, twin_scales = reference.quantise_rows(x)
    assert torch.equal(codes, twin_codes)
    torch.testing.assert_close(scales, twin_scales, rtol=0, atol=0, equal_nan=True)
    assert not codes[:2].any()
    assert scales[:2].isfinite().all()
    assert (scales[:2] > 0).all()
    assert scales[2].isnan()
    assert scales[3].isinf()
    assert scales[4] == x[4].abs().max() / 127


@pytest.mark.parametrize("shape", [(1, 33, 384), (70, 9, 100), (3, 130, 1), (17, 5, 5000)])
def test_integer_sums_are_exact(shape: tuple[int, int, int]) -> None:
    """Rounded once, to float32, where they pass 2**24; -128 is served too."""
    torch.manual_seed(0)
    rows, channels, columns = shape
    # Of one sign where there are many, so that sums are as large as they can be.
    least = 90 if columns > 1000 else -128
    xq = torch.randint(least, 128, (rows, columns), dtype=torch.int8)
    wq = torch.randint(least, 128, (channels, columns), dtype=torch.int8)
    xq[0], wq[0] = -128, 127
    given = (xq, torch.ones(rows), wq, torch.ones(channels), None, None, None)
    exact = (xq.long() @ wq.long().T).float()
    assert torch.equal(by_int8(given, "none", FULL), exact)
    twin = reference.int8_linear(*given, activation="none", out_dtype=FULL)
    assert torch.equal(twin, exact)


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
@pytest.mark.parametrize(("shape", "rank"), [((1, 70, 384), 0), ((37, 70, 100), 5), ((5, 33, 2100), 20)])
def test_int8_linear(shape: tuple[int, int, int], rank: int, activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = int8_operands(*shape, rank=rank)
    given.x_scale[0] *= 50
    given.xq[-1] = 0
    out, exact = by_int8(given, activation, dtype), exact_int8(given, activation)
    twin = reference.int8_linear(*given, activation=activation, out_dtype=dtype)
    for found in (out, twin):
        assert relative_error(found, exact) <= GATES[dtype]
    # Rounding to dtype may take half a unit of the largest number.
    assert worst_error(out, exact) <= GATES[dtype] * max(1.0, float(exact.abs().max() / exact.square().mean().sqrt()))
    assert torch.equal(out, by_int8(given, activation, dtype))


@pytest.mark.parametrize("rows", [3, 40, 80])
@pytest.mark.parametrize("rank", [0, 3])
def test_int8_linear_under_every_setting(rows: int, rank: int) -> None:
    torch.manual_seed(0)
    given = int8_operands(rows, 150, 272, rank=rank)
    for setting in tiles(int8_linear.candidates(rows, rank)):
        assert relative_error(by_int8(given, "none", FULL, setting), exact_int8(given, "none")) <= GATES[FULL]


def test_a_relu_keeps_nan() -> None:
    given = int8_operands(2, 5, 40)
    given.x_scale[1] = torch.nan
    out = by_int8(given, "relu", FULL)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.sampled_from([0, 1, 7]))
def test_int8_linear_of_odd_sizes(rows: int, channels: int, columns: int, rank: int) -> None:
    torch.manual_seed(rows * channels * columns)
    given = int8_operands(rows, channels, columns, rank=rank)
    assert relative_error(by_int8(given, "none", FULL), exact_int8(given, "none")) <= GATES[FULL]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [32, 128, 300])
def test_weight_only_linear_in_groups(bits: int, zero: bool, group: int) -> None:
    """300 columns: the last group is shorter, and padding begins groups that are not there."""
    torch.manual_seed(0)
    dtype, rank = (HALF, 0) if zero else (FULL, 5)
    weight = packed_operands(70, 300, bits, group, zero=zero, rank=rank, dtype=dtype)
    weight.scale[:, 0] *= 50
    x = torch.randn(3, 300).to(dtype)
    x[:, 7] *= 50
    x[-1] = 0
    out, exact = by_weight_only(x, weight, bits, group), exact_weight_only(x, weight, bits, group)
    twin = reference.weight_only_linear(x, *weight, bits=bits, group=group)
    for found in (out, twin):
        assert relative_error(found, exact) <= GATES[dtype]


@pytest.mark.parametrize("rows", [1, 2, 17, 64, 65])
@pytest.mark.parametrize(("bits", "rank"), [(4, 0), (4, 20), (3, 3)])
def test_weight_only_linear_of_few_and_many_rows(rows: int, bits: int, rank: int) -> None:
    """With 65 the weight is dequantised; 1100 columns are cut into pieces."""
    torch.manual_seed(rows)
    weight = packed_operands(33, 1100, bits, 128, zero=True, rank=rank)
    x = torch.randn(rows, 1100).half()
    assert weight_only_linear.default_setting(rows, 33, 1100, bits)["SPLIT"] > 1
    found = by_weight_only(x, weight, bits, 128)
    assert relative_error(found, exact_weight_only(x, weight, bits, 128)) <= GATES[HALF]
    assert torch.equal(found, by_weight_only(x, weight, bits, 128))


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 128), (3, 32), (2, 400)])
def test_weight_only_linear_under_every_setting(bits: int, group: int) -> None:
    torch.manual_seed(0)
    weight, x = packed_operands(70, 400, bits, group, rank=2, dtype=FULL), torch.randn(3, 400)
    exact = exact_weight_only(x, weight, bits, group)
    for setting in tiles(weight_only_linear.candidates(3, 70, 400, bits)):
        assert relative_error(by_weight_only(x, weight, bits, group, setting), exact) <= GATES[FULL]


def test_pieces_of_columns_without_any_are_zeros() -> None:
    weight, x = packed_operands(9, 40, 4, 64, dtype=FULL), torch.randn(2, 40)
    setting = weight_only_linear.default_setting(2, 9, 40, 4) | {"SPLIT": 16}
    assert relative_error(by_weight_only(x, weight, 4, 64, setting), exact_weight_only(x, weight, 4, 64)) <= GATES[FULL]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 200), st.sampled_from(BITS), st.booleans())
def test_weight_only_linear_of_odd_sizes(rows: int, channels: int, columns: int, bits: int, zero: bool) -> None:
    torch.manual_seed(rows * channels * columns)
    weight, x = packed_operands(channels, columns, bits, 64, zero=zero, dtype=FULL), torch.randn(rows, columns)
    found = by_weight_only(x, weight, bits, 64)
    # An odd sum may nearly cancel, so beside the norm of the terms.
    terms = packed_operands(channels, columns, bits, 64, dtype=FULL).scale.max() * 2**bits * x.norm() * channels**0.5
    error = (found.double() - exact_weight_only(x, weight, bits, 64)).norm()
    assert float(error) <= GATES[FULL] * float(terms)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "rank"), [(32, 0), (128, 5), (300, 20)])
def test_dequantise_weight(bits: int, group: int, rank: int) -> None:
    torch.manual_seed(0)
    dtype = HALF if rank else FULL
    weight = packed_operands(70, 300, bits, group, zero=bits != 4, rank=rank, dtype=dtype)
    out, strayed = poisoned((70, 300), dtype)
    packed, scale, zero, _, down, up = amid_poison(weight)
    dequantise_weight.run_kernel(packed, scale, zero, down, up, out, bits=bits, group=group)
    assert not strayed()
    assert relative_error(out, exact_weight(weight, bits, group, 300)) <= GATES[dtype]


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("shape", [(1, 33, 100), (37, 70, 272)])
def test_fp8_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, channels, columns = shape
    x, bias = torch.randn(rows, columns), torch.randn(channels)
    x[:, 3] *= 50
    x[1:2] = 0
    xq, x_scale = reference.quantise_rows(x, reference.FP8)
    wq, w_scale = reference.quantise_rows(torch.randn(channels, columns), reference.FP8)
    assert float((xq.float() * x_scale[:, None] - x).norm() / x.norm()) <= 0.05
    exact = (xq.double() * x_scale[:, None]) @ (wq.double() * w_scale[:, None]).T + bias
    for setting in tiles(fp8_linear.candidates(rows)):
        out, strayed = poisoned((rows, channels), dtype)
        fp8_linear.run_kernel(xq, x_scale, wq, w_scale, bias, out, setting=setting)
        assert not strayed()
        assert relative_error(out, exact) <= GATES[dtype]
    twin = reference.fp8_linear(xq, x_scale, wq, w_scale, bias, out_dtype=dtype)
    assert relative_error(twin, exact) <= GATES[dtype]


def test_nothing_comes_of_no_rows() -> None:
    assert by_quantise(torch.empty(0, 8), quantise_rows.PLAIN)[0].shape == (0, 8)
    assert by_int8(int8_operands(0, 5, 8, rank=2), "none", HALF).shape == (0, 5)
    assert by_weight_only(torch.empty(0, 40).half(), packed_operands(5, 40, 4, 32, rank=2), 4, 32).shape == (0, 5)
