"""A linear layer on a weight whose N:M pattern tiles of output channels share: gathered columns, then a dense product.

A program gathers the columns of the input that its tile keeps, once for all channels of its part of the tile, so the
product shrinks to N/M of the dense one. The kernel reads no M and no N: any list of columns a tile will do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.int8_linear import grouped_tile
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.reference import sparse_linear as reference
from archfront.kernels.reference.sparse_linear import ALIGNED, TILES
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("shared_pattern_linear",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 2**24
MAX_COLUMNS = 2**24


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def shared_pattern_kernel(
    x: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    kept: tl.tensor,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One tile of the result, in one tile of the pattern: BLOCK_N divides TILE. ``width`` are x's columns."""
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    has_row, has_channel = row < rows, channel < channels
    # A matrix may hold more than 2**31 numbers.
    x_row = x + row.to(tl.int64)[:, None] * width
    w_place = values + channel.to(tl.int64)[None, :] * kept + step[:, None]
    places = indices + (tile_n * BLOCK_N // TILE).to(tl.int64) * kept + step
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, kept, BLOCK_K):
        has_step = start + step < kept
        # Past the end of x lies what the list was filled up with.
        column = tl.load(places + start, has_step, other=width)
        left = tl.load(x_row + column[None, :], has_row[:, None] & (column < width)[None, :], other=0.0)
        right = tl.load(w_place + start, has_channel[None, :] & has_step[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="tf32x3")
    if BIAS:
        total += tl.load(bias + channel, has_channel, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), has_row[:, None] & has_channel[None, :])


def default_setting(rows: int, channels: int, tile: int, dtype: torch.dtype = torch.float16) -> Setting:
    """Wide tiles of the result, since each gathered number serves as many channels as they are wide; in float32, whose
    three products in the place of one take registers, narrow ones."""
    height = max(16, min(64, bucket(rows)))
    if dtype.itemsize == 4:
        return _setting(height, 64, 32, 8 if height == 64 else 4, 3)
    if rows <= 64 or tile == 64 or rows * channels <= 132 * 64 * 128:
        return _setting(height, 64, 64, 4, 3)
    return _setting(64, 128, 64, 8, 3)


def candidates(rows: int, channels: int, tile: int, dtype: torch.dtype = torch.float16) -> list[Setting]:
    """What tuning measures: other heights and widths, depths of the pipeline and of a step."""
    default = default_setting(rows, channels, tile, dtype)
    found = [default, default | {"num_stages": 2}]
    if dtype.itemsize == 4:
        found += [_setting(32, 64, 32, 4, 3)] if rows > 16 else []
    else:
        found += [default | {"num_stages": 5}, default | {"BLOCK_K": 32}]
        if rows > 64:
            found += [_setting(64, 64, 64, 4, 3), _setting(128, 64, 64, 8, 3)]
            found += [_setting(64, 128, 64, 8, 3), _setting(128, 128, 64, 8, 3)] if tile == 128 else []
        elif tile == 128:
            found += [default | {"BLOCK_N": 128, "num_warps": 8}]
    return [setting for place, setting in enumerate(found) if setting not in found[:place]]


def tuning_key(x: Tensor, channels: int, kept: int, tile: int) -> str:
    sizes = f"m{bucket(x.shape[0])}-n{channels}-k{x.shape[1]}"
    return f"{str(x.dtype).removeprefix('torch.')}-{sizes}-c{kept}-t{tile}"


def run_kernel(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: int,
    setting: Setting | None = None,
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    (rows, width), (channels, kept) = x.shape, values.shape
    if rows == 0:
        return
    if setting is None:
        default = default_setting(rows, channels, tile, x.dtype)
        setting = chosen("shared_pattern_linear", tuning_key(x, channels, kept, tile), default, x.device)
    grid = (triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(channels, setting["BLOCK_N"]),)
    # What is absent is not read.
    operands = (values, indices, values if bias is None else bias, out)
    constants = {"BIAS": bias is not None, "TILE": tile, **setting}
    shared_pattern_kernel[grid](x, *operands, rows, channels, width, kept, **constants)


def check(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, tile: int) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing. What the list holds
    is not looked at: that would wait for the device."""
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise refusal("x.shape", tuple(x.shape), f"(m, k) with k of 1 to {MAX_COLUMNS}")
    check_dtype("x", x, DTYPES)
    if tile not in TILES:
        raise refusal("tile", tile, " or ".join(map(str, TILES)))
    if values.ndim != 2 or not 1 <= values.shape[0] <= MAX_CHANNELS or not 1 <= values.shape[1] <= MAX_COLUMNS:
        limits = f"n of 1 to {MAX_CHANNELS} and 1 to {MAX_COLUMNS} kept columns"
        raise refusal("values.shape", tuple(values.shape), f"(n, kept) with {limits}")
    channels, kept = values.shape
    if kept % ALIGNED:
        raise refusal("values.shape", tuple(values.shape), f"(n, kept) with a multiple of {ALIGNED} kept columns")
    wanted = (-(-channels // tile), kept)
    check_shape("indices", indices, wanted, f"(tiles, kept) = {wanted}, for values of {(channels, kept)},")
    check_dtype("values", values, (x.dtype,))
    check_dtype("indices", indices, (torch.int32,))
    others = {"values": values, "indices": indices}
    if bias is not None:
        check_shape("bias", bias, (channels,), f"(n,) with n = {channels} of values")
        check_dtype("bias", bias, (x.dtype,))
        others["bias"] = bias
    check_together(x, others)


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::shared_pattern_linear", mutates_args=(), device_types="cuda")
def _operator(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, *, tile: int) -> Tensor:
    check(x, values, indices, bias, tile)
    out = x.new_empty((x.shape[0], values.shape[0]))
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_kernel(x, values, indices, bias, out, tile=tile)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, *, tile: int) -> Tensor:
    check(x, values, indices, bias, tile)
    return reference.shared_pattern_linear(x, values, indices, bias, tile=tile)


@_operator.register_fake
def _shape_only(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, *, tile: int) -> Tensor:
    check(x, values, indices, bias, tile)
    return x.new_empty((x.shape[0], values.shape[0]))


def shared_pattern_linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None, *, tile: int
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(m, k)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        values: ``(n, kept)`` of x's dtype, kept a multiple of 16.
        indices: ``(ceil(n / tile), kept)`` int32, as ``pack_shared`` makes it; what it did not make may read
            outside of x.
        bias: ``(n,)`` of x's dtype.
        tile: channels that share a pattern, 64 or 128.

    Returns:
        ``(m, n)`` of x's dtype; sums are float32.

    Raises:
        ValueError: a shape, dtype, tile, layout or device that is not served; names it and what is.
    """
    check_device(x)
    result: Tensor = _operator(x, values, indices, bias, tile=tile)
    return result


def _setting(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Setting:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    return tile | {"num_warps": warps, "num_stages": stages}


def compile_cases() -> list[CompileCase]:
    """Layers of ViT-B, DeiT-S and Llama, half or a quarter of their columns kept, under every setting."""
    layers = [
        (50432, 3072, 768, 384, 128, torch.float16),
        (1576, 1000, 111, 64, 64, torch.bfloat16),
        (50432, 768, 3072, 768, 128, torch.float32),
        (1, 4096, 4096, 1024, 64, torch.float16),
        (64, 4096, 4096, 2048, 128, torch.bfloat16),
    ]
    cases = []
    for rows, channels, width, kept, tile, dtype in layers:
        for setting in candidates(rows, channels, tile, dtype):
            arguments = (dtype, dtype, torch.int32, dtype, dtype, rows, channels, width, kept)
            constants = {"BIAS": True, "TILE": tile, **setting}
            name = f"{(rows, channels, width)} kept {kept} t{tile} {dtype} {setting}"
            cases.append(CompileCase(name, shared_pattern_kernel, arguments, constants, matrix=True))
    return cases
