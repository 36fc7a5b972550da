"""A linear layer on int8 codes (W8A8): exact int32 sums, with scales, correction, bias and activation in the epilogue.

Both operands lie along K in memory, as integer matrix instructions want them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops import low_rank
from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.low_rank import inner_tile, outer_tile
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.reference.low_bit_linear import ACTIVATIONS
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("int8_linear",)
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The sum of more products of -128 with itself leaves int32.
MAX_COLUMNS = 2**17 - 1
MAX_CHANNELS = 2**24
ALIGNED = 16
"""Columns to a multiple of which a launch pads codes, a copy of both; whoever keeps weights pads them once."""


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def grouped_tile(tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of this program's tile: bands of GROUP_M rows, so that neighbours in time share operands in L2."""
    program = tl.program_id(0)
    band = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - band, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return band + within % height, within // height


@triton.jit  # type: ignore[untyped-decorator]
def int8_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    w: tl.tensor,
    w_scale: tl.tensor,
    bias: tl.tensor,
    inner: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One tile. PIECES of ``inner`` are 0 without a correction; WHOLE says that BLOCK_K divides the columns."""
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    has_row, has_channel = row < rows, channel < channels
    # A matrix may hold more than 2**31 numbers.
    x_place = x + row.to(tl.int64)[:, None] * columns + column[None, :]
    w_place = w + channel.to(tl.int64)[None, :] * columns + column[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, columns, BLOCK_K):
        x_mask, w_mask = has_row[:, None], has_channel[None, :]
        if not WHOLE:
            x_mask &= (start + column < columns)[None, :]
            w_mask &= (start + column < columns)[:, None]
        left = tl.load(x_place, x_mask, other=0)
        right = tl.load(w_place, w_mask, other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        x_place += BLOCK_K
        w_place += BLOCK_K

    y = total.to(tl.float32) * tl.load(x_scale + row, has_row, other=0.0)[:, None]
    y *= tl.load(w_scale + channel, has_channel, other=0.0)[None, :]
    if PIECES > 0:
        for first in tl.range(0, rank, CHUNK, num_stages=1):
            component = first + tl.arange(0, CHUNK)
            hidden = inner_tile(inner, row, rows, component, rank, PIECES)
            factor = outer_tile(up, channel, channels, component, rank)
            y = tl.dot(hidden, tl.trans(factor), y, input_precision="tf32x3")
    if BIAS:
        y += tl.load(bias + channel, has_channel, other=0.0)[None, :]
    if ACTIVATION == "relu":
        # Not tl.maximum, which would turn NaN into zero and hide a broken model.
        y = tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    target = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(target, y.to(out.dtype.element_ty), has_row[:, None] & has_channel[None, :])


def default_setting(rows: int, channels: int, rank: int = 0) -> Setting:
    """Low tiles for few rows, where weights are all the traffic; large ones where arithmetic is the limit; smaller
    ones a warp beside a correction, which takes registers."""
    if rows <= 16:
        return _setting(16, 64, 256, 4, 4)
    if rows <= 64:
        return _setting(64, 64, 128, 4, 4)
    if rows * channels <= 132 * 128 * 128:
        return _setting(64, 64, 128, 4, 4) if rank else _setting(64, 128, 128, 4, 4)
    return _setting(128, 64, 128, 8, 4) if rank else _setting(128, 128, 128, 8, 4)


def candidates(rows: int, rank: int = 0) -> list[Setting]:
    """What tuning measures: no tiles much higher than the matrix, and none that spill, as 128 x 256 do."""
    low = [_setting(16, 32, 512, 4, 3), _setting(16, 64, 256, 4, 4), _setting(16, 128, 128, 4, 5)]
    middle = [_setting(32, 64, 256, 4, 4), _setting(64, 64, 128, 4, 4)]
    high = [_setting(128, 64, 128, 8, 3), _setting(128, 64, 128, 8, 4)]
    if rank == 0:
        middle += [_setting(64, 128, 128, 4, 4)]
        high += [_setting(128, 128, 128, 8, 3), _setting(128, 128, 128, 8, 4), _setting(128, 128, 256, 8, 2)]
    return low + middle[:1] if rows <= 16 else middle if rows <= 64 else middle[1:] + high


def tuning_key(rows: int, channels: int, columns: int, rank: int, out_dtype: torch.dtype) -> str:
    """Also by the correction, which needs registers."""
    sizes = f"m{bucket(rows)}-n{channels}-k{columns}" + (f"-r{bucket(rank)}" if rank else "")
    return f"{str(out_dtype).removeprefix('torch.')}-{sizes}"


def run_kernel(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    *,
    activation: str,
    setting: Setting | None = None,
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    (rows, columns), channels = xq.shape, wq.shape[0]
    if rows == 0:
        return
    rank = 0 if down is None else down.shape[0]
    if setting is None:
        key = tuning_key(rows, channels, columns, rank, out.dtype)
        setting = chosen("int8_linear", key, default_setting(rows, channels, rank), xq.device)
    if columns % ALIGNED:
        # Codes at odd addresses are read byte by byte, which takes more registers than there are.
        columns += -columns % ALIGNED
        xq, wq = (functional.pad(codes, (0, columns - codes.shape[1])) for codes in (xq, wq))
        down = None if down is None else functional.pad(down, (0, columns - down.shape[1]))
    inner = None if down is None else low_rank.project(xq, x_scale, down)
    grid = (triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(channels, setting["BLOCK_N"]),)
    constants = _constants(activation, bias is not None, rank, columns, setting)
    # What is absent is not read.
    operands = [w_scale if operand is None else operand for operand in (bias, inner, up)]
    int8_kernel[grid](xq, x_scale, wq, w_scale, *operands, out, rows, channels, columns, rank, **constants)


def check(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    if xq.ndim != 2 or not 1 <= xq.shape[1] <= MAX_COLUMNS:
        raise refusal("xq.shape", tuple(xq.shape), f"(m, k) with k of 1 to {MAX_COLUMNS}")
    columns = xq.shape[1]
    if wq.ndim != 2 or wq.shape[1] != columns or not 1 <= wq.shape[0] <= MAX_CHANNELS:
        raise refusal("wq.shape", tuple(wq.shape), f"(n, k) with n of 1 to {MAX_CHANNELS} and k = {columns} of xq")
    channels = wq.shape[0]
    check_dtype("xq", xq, (torch.int8,))
    check_dtype("wq", wq, (torch.int8,))
    vectors = {"w_scale": w_scale} | ({} if bias is None else {"bias": bias})
    check_shape("x_scale", x_scale, xq.shape[:1], "(m,) with m of xq")
    for name, vector in vectors.items():
        check_shape(name, vector, (channels,), f"(n,) with n = {channels} of wq")
    for name, vector in {"x_scale": x_scale, **vectors}.items():
        check_dtype(name, vector, (torch.float32,))
    factors = low_rank.check_factors(down, up, channels, columns, None)
    if activation not in ACTIVATIONS:
        raise refusal("activation", activation, " or ".join(ACTIVATIONS))
    if out_dtype not in OUT_DTYPES:
        raise refusal("out_dtype", out_dtype, " or ".join(map(str, OUT_DTYPES)))
    check_together(xq, {"x_scale": x_scale, "wq": wq, **vectors, **factors})


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::int8_linear", mutates_args=(), device_types="cuda")
def _operator(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    check(xq, x_scale, wq, w_scale, bias, down, up, activation, out_dtype)
    out = xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)
    # Triton launches on the current device, which need not be that of the operands.
    with torch.cuda.device(xq.device):
        run_kernel(xq, x_scale, wq, w_scale, bias, down, up, out, activation=activation)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    check(xq, x_scale, wq, w_scale, bias, down, up, activation, out_dtype)
    return reference.int8_linear(xq, x_scale, wq, w_scale, bias, down, up, activation=activation, out_dtype=out_dtype)


@_operator.register_fake
def _shape_only(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    check(xq, x_scale, wq, w_scale, bias, down, up, activation, out_dtype)
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)


def int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        xq: ``(m, k)`` int8, contiguous, on a GPU or a CPU; ``x_scale`` ``(m,)`` float32.
        wq: ``(n, k)`` int8; ``w_scale`` ``(n,)`` float32.
        bias: ``(n,)`` float32.
        down, up: ``(r, k)`` and ``(n, r)`` of one float type, r at most 64: a low-rank correction of the weight, to
            which x in float would go through ``down`` and then ``up``. Both or neither.
        activation: ``none``, ``relu`` (NaN stays NaN) or ``gelu``, that of erf.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``(m, n)`` of ``out_dtype``.

    Raises:
        ValueError: a shape, dtype, activation, layout or device that is not served; names it and what is.
    """
    check_device(xq)
    operands = (xq, x_scale, wq, w_scale, bias, down, up)
    result: Tensor = _operator(*operands, activation=activation, out_dtype=out_dtype)
    return result


def _setting(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Setting:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    return tile | {"num_warps": warps, "num_stages": stages}


def _constants(activation: str, bias: bool, rank: int, columns: int, setting: Setting) -> dict[str, int | bool | str]:
    correction = {"PIECES": low_rank.pieces(columns) if rank else 0, "CHUNK": low_rank.CHUNK}
    whole = columns % setting["BLOCK_K"] == 0
    return {"ACTIVATION": activation, "BIAS": bias, "WHOLE": whole, **correction, **setting}


def compile_cases() -> list[CompileCase]:
    """Layers of DeiT-S, ViT-B and Llama under every setting, with an epilogue each; and what a correction adds."""
    layers = [
        (1, 4096, 14336, torch.bfloat16, "none", 0),
        (64, 4096, 4096, torch.float16, "none", 8),
        (197, 1536, 384, torch.bfloat16, "gelu", 0),
        (50432, 3072, 768, torch.float16, "gelu", 0),
        (1576, 1152, 384, torch.float32, "relu", 64),
        (50432, 768, 3072, torch.bfloat16, "none", 8),
        (50432, 2304, 768, torch.bfloat16, "none", 0),
        (1576, 1000, 112, torch.float16, "relu", 0),
    ]
    cases = []
    full, code = torch.float32, torch.int8
    for rows, channels, columns, dtype, activation, rank in layers:
        default = default_setting(rows, channels, rank)
        for setting in [default, *(other for other in candidates(rows, rank) if other != default)]:
            tensors = (code, full, code, full, full, full, torch.float16, dtype)
            name = f"{(rows, channels, columns)} {dtype} {activation} r{rank} {setting}"
            constants = _constants(activation, True, rank, columns, setting)
            arguments = (*tensors, rows, channels, columns, rank)
            cases.append(CompileCase(name, int8_kernel, arguments, constants, matrix=True))
    return cases + low_rank.compile_cases()
