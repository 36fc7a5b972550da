"""Rows to int8 codes and a scale each, alone or in one pass with the layer norm or the GELU before.

A program holds whole rows in registers, so that each number is read once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("quantise_rows", "layer_norm_quantise", "gelu_quantise")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the registers of a program hold of a row; a norm needs more of them.
MAX_COLUMNS = 2**14
MAX_NORM_COLUMNS = 2**13
PLAIN, NORM, GELU = 0, 1, 2


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def quantise_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    BEFORE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some rows; BEFORE is 0, 1 for a layer norm (``weight``, and ``bias`` if BIAS), 2 for a GELU."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    has_row, has_column = row < rows, column < columns
    inside = has_row[:, None] & has_column[None, :]
    # A matrix may hold more than 2**31 numbers.
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(x + place, inside, other=0.0).to(tl.float32)
    if BEFORE == 1:
        count = columns * 1.0
        value = tl.where(has_column[None, :], value - (tl.sum(value, 1) / count)[:, None], 0.0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / count + eps)
        value *= factor[:, None] * tl.load(weight + column, has_column, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            value += tl.load(bias + column, has_column, other=0.0).to(tl.float32)[None, :]
    if BEFORE == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))

    # As integers the bits of absolute values are in their order, with NaN above all: it reaches the scale.
    most = tl.max(tl.abs(value).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, tl.full((ROWS,), 127.0, tl.float32))
    # The least normal number. Written so that NaN stays.
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    code = tl.div_rn(value, tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)))
    code = tl.where(code == code, code, 0.0)
    # Beside 1.5 * 2**23 there is room for whole numbers alone, and sums are rounded half to even.
    code = (code + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, -127.0), 127.0)
    tl.store(codes + place, code.to(tl.int8), inside)
    tl.store(scales + row, scale, has_row)


def default_setting(columns: int) -> Setting:
    """Sixteen numbers a thread where rows are short, and up to 32 warps for one long row."""
    width = int(triton.next_power_of_2(max(columns, 16)))
    rows = max(1, 2048 // width)
    return {"ROWS": rows, "num_warps": min(32, max(4, rows * width // 1024)), "num_stages": 1}


def candidates(columns: int) -> list[Setting]:
    """What tuning measures: fewer rows a program, and half and twice the warps."""
    default, width = default_setting(columns), triton.next_power_of_2(max(columns, 16))
    heights = sorted({default["ROWS"], max(1, default["ROWS"] // 4)})
    others = [(rows, default["num_warps"] * factor // 2) for rows in heights for factor in (1, 4)]
    # More than 32 numbers a thread would spill.
    fitting = [(rows, warps) for rows, warps in others if rows * width <= 32 * 32 * warps and warps <= 32]
    return [default, *({"ROWS": rows, "num_warps": warps, "num_stages": 1} for rows, warps in fitting)]


def tuning_key(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}-m{bucket(x.shape[0])}-k{x.shape[1]}"


def run_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    *,
    before: int = PLAIN,
    eps: float = 0.0,
    setting: Setting | None = None,
) -> None:
    """Launches the kernel, which overwrites all of ``codes`` and ``scales``; the caller has checked the arguments."""
    rows, columns = x.shape
    if rows == 0:
        return
    setting = setting or chosen(OPERATORS[before], tuning_key(x), default_setting(columns), x.device)
    grid = (triton.cdiv(rows, setting["ROWS"]),)
    width = triton.next_power_of_2(max(columns, 16))
    constants = {"BEFORE": before, "BIAS": bias is not None, "COLUMNS": width, **setting}
    # What is absent is not read.
    operands = [x if operand is None else operand for operand in (weight, bias)]
    quantise_kernel[grid](x, *operands, codes, scales, rows, columns, eps, **constants)


def check(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    largest = MAX_COLUMNS if weight is None else MAX_NORM_COLUMNS
    if x.ndim != 2 or not 1 <= x.shape[1] <= largest:
        raise refusal("x.shape", tuple(x.shape), f"(m, k) with k of 1 to {largest}")
    check_dtype("x", x, DTYPES)
    others = {name: vector for name, vector in (("weight", weight), ("bias", bias)) if vector is not None}
    for name, vector in others.items():
        check_shape(name, vector, (x.shape[1],), f"(k,) with k = {x.shape[1]} of x")
        check_dtype(name, vector, DTYPES)
    check_together(x, others)


def _empty_result(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _launched(x: Tensor, weight: Tensor | None, bias: Tensor | None, before: int, eps: float) -> tuple[Tensor, Tensor]:
    check(x, weight, bias)
    codes, scales = _empty_result(x)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_kernel(x, weight, bias, codes, scales, before=before, eps=eps)
    return codes, scales


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::quantise_rows", mutates_args=(), device_types="cuda")
def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launched(x, None, None, PLAIN, 0.0)


@_quantise_rows.register_kernel("cpu")
def _quantise_rows_on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    check(x)
    return reference.quantise_rows(x)


@_quantise_rows.register_fake
def _quantise_rows_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    check(x)
    return _empty_result(x)


@torch.library.custom_op("archfront::layer_norm_quantise", mutates_args=(), device_types="cuda")
def _layer_norm_quantise(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    return _launched(x, weight, bias, NORM, eps)


@_layer_norm_quantise.register_kernel("cpu")
def _layer_norm_quantise_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    check(x, weight, bias)
    return reference.layer_norm_quantise(x, weight, bias, eps=eps)


@_layer_norm_quantise.register_fake
def _layer_norm_quantise_shape(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    check(x, weight, bias)
    return _empty_result(x)


@torch.library.custom_op("archfront::gelu_quantise", mutates_args=(), device_types="cuda")
def _gelu_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launched(x, None, None, GELU, 0.0)


@_gelu_quantise.register_kernel("cpu")
def _gelu_quantise_on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    check(x)
    return reference.gelu_quantise(x)


@_gelu_quantise.register_fake
def _gelu_quantise_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    check(x)
    return _empty_result(x)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference of this name: each row over its largest absolute value.

    Args:
        x: ``(m, k)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU; k at most 16384.

    Returns:
        int8 codes ``(m, k)`` and float32 scales ``(m,)``.

    Raises:
        ValueError: a shape, dtype, layout or device that is not served; names it and what is.
    """
    return _called(_quantise_rows, x)


def layer_norm_quantise(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference of this name: a layer norm over k, then ``quantise_rows``.

    Args:
        x: as of ``quantise_rows``, but k at most 8192.
        weight, bias: ``(k,)`` of one of x's dtypes.
        eps: added to the variance.

    Returns:
        int8 codes ``(m, k)`` and float32 scales ``(m,)``.

    Raises:
        ValueError: a shape, dtype, layout or device that is not served; names it and what is.
    """
    return _called(_layer_norm_quantise, x, weight, bias, eps=eps)


def gelu_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference of this name: the exact GELU, then ``quantise_rows``, with its arguments, result and errors."""
    return _called(_gelu_quantise, x)


def _called(
    operator: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *operands: Tensor | None, **settings: float
) -> tuple[Tensor, Tensor]:
    check_device(x)
    codes, scales = operator(x, *operands, **settings)
    return codes, scales


def compile_cases() -> list[CompileCase]:
    """Rows of DeiT-S, ViT-B and Llama, and the longest that are served, under every setting."""
    cases = []
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    shapes = [
        (half, NORM, 384),
        (brain, GELU, 1536),
        (full, PLAIN, 768),
        (half, GELU, 3072),
        (brain, NORM, 4096),
        (half, PLAIN, 14336),
        (full, NORM, MAX_NORM_COLUMNS),
        (full, GELU, MAX_COLUMNS),
        (half, NORM, 1),
    ]
    for dtype, before, columns in shapes:
        for setting in candidates(columns):
            width = triton.next_power_of_2(max(columns, 16))
            constants = {"BEFORE": before, "BIAS": before == NORM, "COLUMNS": width, **setting}
            arguments = (dtype, dtype, dtype, torch.int8, full, 50432, columns, 1e-6)
            name = f"{dtype} k{columns} before={before} {setting}"
            cases.append(CompileCase(name, quantise_kernel, arguments, constants))
    return cases
