"""A linear layer on float8_e4m3fn codes of weight and input, with a scale a row and a channel in the epilogue.

Hopper's fp8 instructions keep fewer digits of a sum than float32 has, so sums of 128 columns are added in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.int8_linear import ALIGNED, MAX_CHANNELS, MAX_COLUMNS, OUT_DTYPES, grouped_tile
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.ops.unpacking import or_any
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.reference.low_bit_linear import FP8
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("fp8_linear",)
CAPABILITY = (8, 9)
"""The first generation of GPUs that multiplies fp8."""


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def fp8_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    w: tl.tensor,
    w_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    columns: tl.tensor,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One tile; WHOLE says that BLOCK_K divides the columns."""
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    has_row, has_channel = row < rows, channel < channels
    # A matrix may hold more than 2**31 numbers.
    x_place = x + row.to(tl.int64)[:, None] * columns + column[None, :]
    w_place = w + channel.to(tl.int64)[None, :] * columns + column[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, columns, BLOCK_K):
        x_mask, w_mask = has_row[:, None], has_channel[None, :]
        if not WHOLE:
            x_mask &= (start + column < columns)[None, :]
            w_mask &= (start + column < columns)[:, None]
        left = tl.load(x_place, x_mask, other=0.0)
        right = tl.load(w_place, w_mask, other=0.0)
        total = tl.dot(left, right, total, max_num_imprecise_acc=128)
        x_place += BLOCK_K
        w_place += BLOCK_K

    y = total * tl.load(x_scale + row, has_row, other=0.0)[:, None]
    y *= tl.load(w_scale + channel, has_channel, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + channel, has_channel, other=0.0)[None, :]
    target = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(target, y.to(out.dtype.element_ty), has_row[:, None] & has_channel[None, :])


def default_setting(rows: int, channels: int) -> Setting:
    """As that of ``int8_linear``, with smaller tiles: two sums are in registers."""
    if rows <= 16:
        return _setting(16, 64, 256, 4, 4)
    if rows <= 64 or rows * channels <= 132 * 64 * 128:
        return _setting(64, 64, 128, 4, 4)
    return _setting(128, 128, 128, 8, 4)


def candidates(rows: int) -> list[Setting]:
    """What tuning measures: no tiles much higher than the matrix, and none that spill."""
    low = [_setting(16, 32, 256, 4, 4), _setting(16, 64, 256, 4, 4), _setting(16, 128, 128, 4, 5)]
    middle = [_setting(64, 64, 128, 4, 4), _setting(64, 128, 128, 8, 4)]
    high = [_setting(128, 64, 128, 4, 4), _setting(128, 128, 128, 8, 3), _setting(128, 128, 128, 8, 4)]
    return low if rows <= 16 else middle if rows <= 64 else middle + high


def tuning_key(rows: int, channels: int, columns: int, out_dtype: torch.dtype) -> str:
    return f"{str(out_dtype).removeprefix('torch.')}-m{bucket(rows)}-n{channels}-k{columns}"


def run_kernel(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    setting: Setting | None = None,
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    (rows, columns), channels = xq.shape, wq.shape[0]
    if rows == 0:
        return
    if setting is None:
        key = tuning_key(rows, channels, columns, out.dtype)
        setting = chosen("fp8_linear", key, default_setting(rows, channels), xq.device)
    if columns % ALIGNED:
        # Codes at odd addresses are read byte by byte, which takes more registers than there are.
        columns += -columns % ALIGNED
        xq, wq = (_padded(codes, columns) for codes in (xq, wq))
    grid = (triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(channels, setting["BLOCK_N"]),)
    constants = {"BIAS": bias is not None, "WHOLE": columns % setting["BLOCK_K"] == 0, **setting}
    sizes = (rows, channels, columns)
    fp8_kernel[grid](xq, x_scale, wq, w_scale, or_any(bias, w_scale), out, *sizes, **constants)


def check(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    if xq.ndim != 2 or not 1 <= xq.shape[1] <= MAX_COLUMNS:
        raise refusal("xq.shape", tuple(xq.shape), f"(m, k) with k of 1 to {MAX_COLUMNS}")
    columns = xq.shape[1]
    if wq.ndim != 2 or wq.shape[1] != columns or not 1 <= wq.shape[0] <= MAX_CHANNELS:
        raise refusal("wq.shape", tuple(wq.shape), f"(n, k) with n of 1 to {MAX_CHANNELS} and k = {columns} of xq")
    check_dtype("xq", xq, (FP8,))
    check_dtype("wq", wq, (FP8,))
    vectors = {"w_scale": w_scale} | ({} if bias is None else {"bias": bias})
    check_shape("x_scale", x_scale, xq.shape[:1], "(m,) with m of xq")
    for name, vector in vectors.items():
        check_shape(name, vector, (wq.shape[0],), f"(n,) with n = {wq.shape[0]} of wq")
    for name, vector in {"x_scale": x_scale, **vectors}.items():
        check_dtype(name, vector, (torch.float32,))
    if out_dtype not in OUT_DTYPES:
        raise refusal("out_dtype", out_dtype, " or ".join(map(str, OUT_DTYPES)))
    check_together(xq, {"x_scale": x_scale, "wq": wq, **vectors})


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::fp8_linear", mutates_args=(), device_types="cuda")
def _operator(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype
) -> Tensor:
    check(xq, x_scale, wq, w_scale, bias, out_dtype)
    capability = torch.cuda.get_device_capability(xq.device)
    if capability < CAPABILITY:
        raise refusal("xq.device", f"a GPU of compute capability {capability}", f"{CAPABILITY} or later")
    out = xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)
    # Triton launches on the current device, which need not be that of the operands.
    with torch.cuda.device(xq.device):
        run_kernel(xq, x_scale, wq, w_scale, bias, out)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype
) -> Tensor:
    check(xq, x_scale, wq, w_scale, bias, out_dtype)
    return reference.fp8_linear(xq, x_scale, wq, w_scale, bias, out_dtype=out_dtype)


@_operator.register_fake
def _shape_only(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype
) -> Tensor:
    check(xq, x_scale, wq, w_scale, bias, out_dtype)
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)


def fp8_linear(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        xq: ``(m, k)`` float8_e4m3fn, contiguous, on a GPU of compute capability 8.9 or later, or a CPU; ``x_scale``
            ``(m,)`` float32.
        wq: ``(n, k)`` float8_e4m3fn; ``w_scale`` ``(n,)`` float32.
        bias: ``(n,)`` float32.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``(m, n)`` of ``out_dtype``.

    Raises:
        ValueError: a shape, dtype, layout or device that is not served; names it and what is.
    """
    check_device(xq)
    result: Tensor = _operator(xq, x_scale, wq, w_scale, bias, out_dtype=out_dtype)
    return result


def _padded(codes: Tensor, columns: int) -> Tensor:
    """With zeros, as bytes: torch pads no fp8."""
    return functional.pad(codes.view(torch.uint8), (0, columns - codes.shape[1])).view(FP8)


def _setting(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Setting:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    return tile | {"num_warps": warps, "num_stages": stages}


def compile_cases() -> list[CompileCase]:
    """Layers of DeiT-S, ViT-B and Llama under every setting, for GPUs from Hopper on."""
    layers = [
        (1, 4096, 14336, torch.bfloat16),
        (64, 4096, 4096, torch.float16),
        (197, 1536, 384, torch.float32),
        (50432, 3072, 768, torch.bfloat16),
        (1576, 1000, 112, torch.float16),
    ]
    cases = []
    for rows, channels, columns, dtype in layers:
        default = default_setting(rows, channels)
        for setting in [default, *(other for other in candidates(rows) if other != default)]:
            constants = {"BIAS": True, "WHOLE": columns % setting["BLOCK_K"] == 0, **setting}
            tensors = (FP8, torch.float32, FP8, torch.float32, torch.float32, dtype)
            name = f"{(rows, channels, columns)} {dtype} {setting}"
            arguments = (*tensors, rows, channels, columns)
            cases.append(CompileCase(name, fp8_kernel, arguments, constants, matrix=True, since=90))
    return cases
