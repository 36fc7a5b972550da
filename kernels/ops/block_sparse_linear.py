"""A linear layer on a block-sparse weight: a program goes through the kept blocks of its output channels alone.

A tile of the result is as wide as a block. With few rows, where weights are all the traffic, a row of blocks is cut
into pieces (split K) whose sums a second kernel adds in order, so the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.int8_linear import grouped_tile
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.ops.weight_only_linear import add_pieces_kernel
from archfront.kernels.reference import sparse_linear as reference
from archfront.kernels.reference.sparse_linear import BLOCKS, block_counts
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("block_sparse_linear",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 2**24
MAX_COLUMNS = 2**24
# Of all kept blocks together, in which the kernel counts in int32.
MAX_NUMBERS = 2**31 - 1

# Programs for which rows of blocks are cut into pieces, about two a multiprocessor of large GPUs.
_PROGRAMS = 264
_REDUCED = 512


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def block_sparse_kernel(
    x: tl.tensor,
    values: tl.tensor,
    columns: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """A tile of one piece, into ``out`` of ``(SPLIT, m, n)``. WHOLE says that BLOCK divides ``width``, x's columns."""
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK), GROUP_M)
    split = tl.program_id(1)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    within = tl.arange(0, BLOCK)
    has_row = row < rows
    first, last = tl.load(offsets + tile_n), tl.load(offsets + tile_n + 1)
    each = tl.cdiv(last - first, SPLIT)
    # A matrix may hold more than 2**31 numbers.
    x_place = x + row.to(tl.int64)[:, None] * width + within[None, :]
    w_place = values + within[None, :] * BLOCK + within[:, None]
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for entry in range(first + split * each, tl.minimum(first + split * each + each, last)):
        column = tl.load(columns + entry) * BLOCK
        mask = has_row[:, None]
        if not WHOLE:
            mask &= (column + within < width)[None, :]
        left = tl.load(x_place + column, mask, other=0.0)
        right = tl.load(w_place + entry * (BLOCK * BLOCK))
        total = tl.dot(left, right, total, input_precision="tf32x3")
    channel = tile_n * BLOCK + within
    has_channel = channel < channels
    if BIAS:
        # Once, with the first piece.
        total += tl.load(bias + channel, has_channel & (split == 0), other=0.0).to(tl.float32)[None, :]
    target = out + (split * rows + row).to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), has_row[:, None] & has_channel[None, :])


def default_setting(rows: int, channels: int, blocks: int, block: int, dtype: torch.dtype = torch.float16) -> Setting:
    """Low tiles and pieces of at least four blocks for few rows; higher tiles for more, as long as programs remain.

    A block is loaded after its column is, so of n stages only (n - 1) / 2 hold blocks: three of seven.
    """
    tiles = triton.cdiv(channels, block)
    highest = _highest(block, dtype)
    if rows <= 64:
        split = 1
        while tiles * split * 2 <= _PROGRAMS and blocks >= tiles * split * 8 and split < 16:
            split *= 2
        return _setting(max(16, min(highest, bucket(rows))), split, block, dtype)
    return _setting(min(highest, 64 if rows * channels <= _PROGRAMS * 128 * block else 128), 1, block, dtype)


def candidates(rows: int, channels: int, blocks: int, block: int, dtype: torch.dtype = torch.float16) -> list[Setting]:
    """What tuning measures: half and twice the pieces, other heights, other depths of the pipeline."""
    default = default_setting(rows, channels, blocks, block, dtype)
    split, stages = default["SPLIT"], default["num_stages"]
    found = [default | {"num_stages": depth} for depth in (stages, 3, stages + 2)]
    if rows <= 64:
        found += [default | {"SPLIT": pieces} for pieces in sorted({max(1, split // 2), split * 2})]
    else:
        highest = _highest(block, dtype)
        found += [_setting(height, 1, block, dtype) for height in (highest // 2, highest)]
        found += [default | {"num_warps": 8}] if highest == 128 else []
    return [setting for place, setting in enumerate(found) if setting not in found[:place]]


def tuning_key(x: Tensor, channels: int, blocks: int, block: int) -> str:
    """Also by the kept blocks, to a power of two."""
    sizes = f"m{bucket(x.shape[0])}-n{channels}-k{x.shape[1]}"
    return f"{str(x.dtype).removeprefix('torch.')}-{sizes}-b{block}-c{bucket(blocks)}"


def run_kernel(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    setting: Setting | None = None,
) -> None:
    """Launches the kernels, which overwrite all of ``out``; the caller has checked the arguments."""
    (rows, width), channels = x.shape, out.shape[1]
    blocks, block = values.shape[:2]
    if rows == 0:
        return
    if setting is None:
        default = default_setting(rows, channels, blocks, block, x.dtype)
        setting = chosen("block_sparse_linear", tuning_key(x, channels, blocks, block), default, x.device)
    constants = _constants(width, block, bias is not None, setting)
    split = setting["SPLIT"]
    target = out if split == 1 else x.new_empty((split, rows, channels), dtype=torch.float32)
    grid = (triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(channels, block), split)
    # What is absent is not read.
    operands = (values, columns, offsets, x if bias is None else bias, target)
    block_sparse_kernel[grid](x, *operands, rows, channels, width, **constants)
    if split > 1:
        pieces = (triton.cdiv(out.numel(), _REDUCED),)
        add_pieces_kernel[pieces](target, out, out.numel(), SPLIT=split, BLOCK=_REDUCED, num_warps=4)


def check(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None, channels: int) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing. What the lists hold
    is not looked at: that would wait for the device."""
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise refusal("x.shape", tuple(x.shape), f"(m, k) with k of 1 to {MAX_COLUMNS}")
    check_dtype("x", x, DTYPES)
    if not 1 <= channels <= MAX_CHANNELS:
        raise refusal("channels", channels, f"1 to {MAX_CHANNELS}")
    if values.ndim != 3 or tuple(values.shape[1:]) not in [(b, b) for b in BLOCKS] or values.numel() > MAX_NUMBERS:
        sides = " or ".join(map(str, BLOCKS))
        limit = f"(blocks, b, b) with b of {sides} and at most {MAX_NUMBERS} numbers"
        raise refusal("values.shape", tuple(values.shape), limit)
    blocks, block = values.shape[:2]
    lists = block_counts((channels, x.shape[1]), block)[0] + 1
    check_shape("columns", columns, (blocks,), f"(blocks,) with {blocks} blocks of values")
    check_shape("offsets", offsets, (lists,), f"({lists},), for {channels} channels in blocks of {block},")
    check_dtype("values", values, (x.dtype,))
    check_dtype("columns", columns, (torch.int32,))
    check_dtype("offsets", offsets, (torch.int32,))
    others = {"values": values, "columns": columns, "offsets": offsets}
    if bias is not None:
        check_shape("bias", bias, (channels,), f"(n,) with n = {channels} channels")
        check_dtype("bias", bias, (x.dtype,))
        others["bias"] = bias
    check_together(x, others)


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::block_sparse_linear", mutates_args=(), device_types="cuda")
def _operator(
    x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None, *, channels: int
) -> Tensor:
    check(x, values, columns, offsets, bias, channels)
    out = x.new_empty((x.shape[0], channels))
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_kernel(x, values, columns, offsets, bias, out)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None, *, channels: int
) -> Tensor:
    check(x, values, columns, offsets, bias, channels)
    return reference.block_sparse_linear(x, values, columns, offsets, bias, channels=channels)


@_operator.register_fake
def _shape_only(
    x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None, *, channels: int
) -> Tensor:
    check(x, values, columns, offsets, bias, channels)
    return x.new_empty((x.shape[0], channels))


def block_sparse_linear(
    x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None = None, *, channels: int
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(m, k)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        values: ``(blocks, b, b)`` of x's dtype, b 32 or 64.
        columns: ``(blocks,)`` int32; offsets: ``(ceil(channels / b) + 1,)`` int32. All three as ``pack_blocks`` makes
            them of ``(channels, k)``; lists that it did not make may read outside of x.
        bias: ``(channels,)`` of x's dtype.
        channels: of the result.

    Returns:
        ``(m, channels)`` of x's dtype; sums are float32.

    Raises:
        ValueError: a shape, dtype, layout or device that is not served; names it and what is.
    """
    check_device(x)
    result: Tensor = _operator(x, values, columns, offsets, bias, channels=channels)
    return result


def _highest(block: int, dtype: torch.dtype) -> int:
    """Rows of a tile. Of float32, three products in the place of one take registers."""
    return 128 if dtype.itemsize == 2 else 2048 // block


def _setting(block_m: int, split: int, block: int, dtype: torch.dtype) -> Setting:
    if dtype.itemsize == 4:
        warps, stages = 4, 5
    else:
        # On Blackwell 128 x 32 spills with four.
        warps, stages = (8 if block_m > 2 * block else 4), 7
    return {"BLOCK_M": block_m, "SPLIT": split, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


def _constants(width: int, block: int, bias: bool, setting: Setting) -> dict[str, int]:
    return {"BIAS": bias, "WHOLE": width % block == 0, "BLOCK": block, **setting}


def compile_cases() -> list[CompileCase]:
    """Layers of Llama, ViT-B and DeiT-S, a quarter of their blocks kept, under every setting."""
    layers = [
        (50432, 3072, 768, 64, torch.bfloat16),
        (1576, 1000, 400, 32, torch.float16),
        (50432, 768, 3072, 64, torch.float32),
        (1, 4096, 4096, 64, torch.float16),
        (64, 1000, 112, 32, torch.float32),
    ]
    cases = []
    for rows, channels, width, block, dtype in layers:
        down, across = block_counts((channels, width), block)
        for setting in candidates(rows, channels, down * across // 4, block, dtype):
            constants = _constants(width, block, True, setting)
            target = dtype if setting["SPLIT"] == 1 else torch.float32
            arguments = (dtype, dtype, torch.int32, torch.int32, dtype, target, rows, channels, width)
            name = f"{(rows, channels, width)} b{block} {dtype} {setting}"
            cases.append(CompileCase(name, block_sparse_kernel, arguments, constants, matrix=True))
    return cases
