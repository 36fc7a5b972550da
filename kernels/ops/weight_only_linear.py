"""A linear layer on packed weights of 8, 4, 3 or 2 bits and a float input, for the few rows of decoding.

The weight is the left operand of the product, which so gives the transposed result: Hopper's matrix instructions take
the left one from registers, where codes become numbers. Codes enter exact, and each group's sum is scaled in float32.
Columns are cut into pieces (split K) whose sums a second kernel adds in order, so the same inputs give the same bits.
With more than 64 rows the weight is dequantised once, for a dense product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops import dequantise_weight, low_rank
from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.low_rank import inner_tile, outer_tile
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, refusal
from archfront.kernels.ops.unpacking import (
    centred,
    columns_of_slab,
    load_bytes,
    load_zero,
    low_slabs,
    or_any,
    part_codes,
    shared_scale,
)
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("weight_only_linear",)
DTYPES = dequantise_weight.DTYPES
MAX_ROWS = 64
"""Of the kernel on packed weights; with more, a weight is dequantised once."""

# Programs for which columns are cut into pieces, about two a multiprocessor of large GPUs.
_PROGRAMS = 264
_REDUCED = 512


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def weight_only_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    bias: tl.tensor,
    inner: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    slabs: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLABS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """A tile of one piece of the columns, into ``out`` of ``(SPLIT, m, n)``. GROUP is 0 where a row has one scale;
    ``slabs`` are the lower plane's; SLABS of them are read at a time and lie in one group unless SLABS is 1."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PARTS: tl.constexpr = 8 // WIDTH
    TILE: tl.constexpr = SLABS * PARTS * 32
    # Whether all columns of a tile have the same scale.
    ONE_SCALE: tl.constexpr = GROUP % TILE == 0
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_channel, has_row = channel < channels, row < rows
    index = tl.arange(0, SLABS * 32)
    byte = index % 32
    tiles = tl.cdiv(slabs, SLABS)
    each = tl.cdiv(tiles, SPLIT)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        slab = tile * SLABS + index // 32
        low, high = load_bytes(packed, slab, byte, channel, channels, slabs, BITS)
        same = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for part in tl.static_range(PARTS):
            first = (tile * SLABS * PARTS + part) * 32
            group = first // GROUP if GROUP > 0 else 0
            # Padding may begin a group that is not there.
            inside = has_channel & (first < columns)
            middle = load_zero(zero, group, channel, channels, inside, HAS_ZERO, BITS)
            weight = centred(part_codes(low, high, slab, part, BITS), middle[:, None], BITS, x.dtype.element_ty)
            column = (slab * PARTS + part) * 32 + byte
            place = row[None, :] * columns + column[:, None]
            value = tl.load(x + place, has_row[None, :] & (column < columns)[:, None], other=0.0)
            if ONE_SCALE:
                same = tl.dot(weight, value, same, input_precision="ieee")
            else:
                factor = tl.load(scale + group * channels + channel, inside, other=0.0).to(tl.float32)
                total += tl.dot(weight, value, input_precision="ieee") * factor[:, None]
        if ONE_SCALE:
            if GROUP > 0:
                place = scale + tile * TILE // GROUP * channels + channel
                same *= tl.load(place, has_channel & (tile * TILE < columns), other=0.0).to(tl.float32)[:, None]
            total += same
    if GROUP == 0:
        total *= tl.load(scale + channel, has_channel, other=0.0).to(tl.float32)[:, None]
    if split == 0:
        if PIECES > 0:
            for start in tl.range(0, rank, CHUNK, num_stages=1):
                component = start + tl.arange(0, CHUNK)
                hidden = inner_tile(inner, row, rows, component, rank, PIECES)
                factors = outer_tile(up, channel, channels, component, rank)
                total = tl.dot(factors, tl.trans(hidden), total, input_precision="tf32x3")
        if BIAS:
            total += tl.load(bias + channel, has_channel, other=0.0).to(tl.float32)[:, None]
    target = out + (split * rows + row)[None, :] * channels + channel[:, None]
    tl.store(target, total.to(out.dtype.element_ty), has_channel[:, None] & has_row[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def add_pieces_kernel(
    pieces: tl.tensor, out: tl.tensor, numbers: tl.tensor, SPLIT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The sum over the first axis of ``(SPLIT, numbers)``, in order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    total = tl.load(pieces + place, inside, other=0.0)
    for piece in tl.static_range(1, SPLIT):
        total += tl.load(pieces + piece * numbers + place, inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def default_setting(rows: int, channels: int, columns: int, bits: int, dtype: torch.dtype = torch.float16) -> Setting:
    """128 columns at a time, and pieces of at least four times as many, until the programs fill a large GPU."""
    # More rows of float32, whose products matrix instructions do not do, would spill.
    block_m = max(16, int(triton.next_power_of_2(min(rows, 32 if dtype.itemsize == 4 else MAX_ROWS))))
    split, tiles = 1, triton.cdiv(channels, 64)
    while tiles * split * 2 <= _PROGRAMS and columns >= 512 * split * 2 and split < 16:
        split *= 2
    return _setting(block_m, 64, 128 // columns_of_slab(bits), split, 4, 4)


def candidates(rows: int, channels: int, columns: int, bits: int, dtype: torch.dtype = torch.float16) -> list[Setting]:
    """What tuning measures: half and twice the pieces, taller tiles, other depths of the pipeline."""
    default = default_setting(rows, channels, columns, bits, dtype)
    block_m, slabs, split = default["BLOCK_M"], default["SLABS"], default["SPLIT"]
    found = [_setting(block_m, 64, slabs, pieces, 4, 4) for pieces in sorted({max(1, split // 2), split, split * 2})]
    found += [_setting(block_m, 64, slabs, split, 4, stages) for stages in (2, 6)]
    found += [_setting(block_m, 128, slabs, split, 8, 4), _setting(block_m, 64, 1, split, 4, 4)]
    found += [_setting(block_m, 32, slabs, split, 4, 4)] if block_m < 64 else []
    return [setting for place, setting in enumerate(found) if setting not in found[:place]]


def tuning_key(x: Tensor, channels: int, bits: int, group: int) -> str:
    """``group`` as the kernel has it, 0 for one scale a channel."""
    sizes = f"m{bucket(x.shape[0])}-n{channels}-k{x.shape[1]}"
    return f"{str(x.dtype).removeprefix('torch.')}-{sizes}-b{bits}-g{group}"


def run_kernel(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    *,
    bits: int,
    group: int,
    setting: Setting | None = None,
) -> None:
    """Launches the kernels, which overwrite all of ``out``; the caller has checked the arguments."""
    (rows, columns), channels = x.shape, packed.shape[1]
    if rows == 0:
        return
    if rows > MAX_ROWS:
        weight = x.new_empty((channels, columns))
        dequantise_weight.run_kernel(packed, scale, zero, down, up, weight, bits=bits, group=group)
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)
        return
    group = shared_scale(group, columns)
    if setting is None:
        key = tuning_key(x, channels, bits, group)
        default = default_setting(rows, channels, columns, bits, x.dtype)
        setting = chosen("weight_only_linear", key, default, x.device)
    rank = 0 if down is None else down.shape[0]
    inner = None if down is None else low_rank.project(x, None, down)
    constants = _constants(bits, group, zero is not None, bias is not None, rank, columns, setting)
    split = constants["SPLIT"]
    target = out if split == 1 else x.new_empty((split, rows, channels), dtype=torch.float32)
    grid = (triton.cdiv(channels, constants["BLOCK_N"]), split, triton.cdiv(rows, constants["BLOCK_M"]))
    operands = (or_any(zero, packed), or_any(bias, scale), or_any(inner, scale), or_any(up, scale), target)
    sizes = (rows, channels, columns, rank, low_slabs(columns, bits))
    weight_only_kernel[grid](x, packed, scale, *operands, *sizes, **constants)
    if split > 1:
        pieces = (triton.cdiv(out.numel(), _REDUCED),)
        add_pieces_kernel[pieces](target, out, out.numel(), SPLIT=split, BLOCK=_REDUCED, num_warps=4)


def check(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bits: int,
    group: int,
) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    if x.ndim != 2 or x.shape[1] < 1:
        raise refusal("x.shape", tuple(x.shape), "(m, k) with k of at least 1")
    check_dtype("x", x, DTYPES)
    others = {"x": x} if bias is None else {"x": x, "bias": bias}
    weight = (packed, scale, zero, down, up)
    dequantise_weight.check(*weight, bits=bits, group=group, columns=x.shape[1], dtype=x.dtype, others=others)
    if bias is not None:
        check_shape("bias", bias, packed.shape[1:2], f"(n,) with n = {packed.shape[1]} of packed")
        check_dtype("bias", bias, (x.dtype,))


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::weight_only_linear", mutates_args=(), device_types="cuda")
def _operator(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    check(x, packed, scale, zero, bias, down, up, bits, group)
    out = x.new_empty((x.shape[0], packed.shape[1]))
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_kernel(x, packed, scale, zero, bias, down, up, out, bits=bits, group=group)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    check(x, packed, scale, zero, bias, down, up, bits, group)
    return reference.weight_only_linear(x, packed, scale, zero, bias, down, up, bits=bits, group=group)


@_operator.register_fake
def _shape_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    check(x, packed, scale, zero, bias, down, up, bits, group)
    return x.new_empty((x.shape[0], packed.shape[1]))


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(m, k)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        packed: as ``packing.pack`` makes it of ``(n, k)``: of unsigned codes beside zero points, else of signed ones.
        scale: ``(groups, n)`` of x's dtype.
        zero: ``(groups, n)`` uint8, the code of 0.
        bias: ``(n,)`` of x's dtype.
        down, up: ``(r, k)`` and ``(n, r)`` of x's dtype, r at most 64: a low-rank correction of the weight. Both or
            neither.
        bits: 8, 4, 3 or 2.
        group: columns that share a scale, a multiple of 32; k or more for one scale a channel.

    Returns:
        ``(m, n)`` of x's dtype.

    Raises:
        ValueError: a shape, dtype, number of bits, group, layout or device that is not served; names it and what is.
    """
    check_device(x)
    operands = (x, packed, scale, zero, bias, down, up)
    result: Tensor = _operator(*operands, bits=bits, group=group)
    return result


def _setting(block_m: int, block_n: int, slabs: int, split: int, warps: int, stages: int) -> Setting:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SLABS": slabs, "SPLIT": split}
    return tile | {"num_warps": warps, "num_stages": stages}


def _constants(
    bits: int, group: int, zero: bool, bias: bool, rank: int, columns: int, setting: Setting
) -> dict[str, int]:
    kind = {"BITS": bits, "GROUP": group, "HAS_ZERO": zero, "BIAS": bias}
    correction = {"PIECES": low_rank.pieces(columns) if rank else 0, "CHUNK": low_rank.CHUNK}
    slabs = setting["SLABS"]
    while slabs > 1 and group % (slabs * columns_of_slab(bits)):
        slabs //= 2
    return {**kind, **correction, **setting, "SLABS": slabs}


def compile_cases() -> list[CompileCase]:
    """Layers of Llama and DeiT-S under every setting, and every number of bits with groups of each kind."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    layers = [(1, 4096, 4096, half), (16, 14336, 4096, brain), (64, 4096, 14336, half), (64, 384, 1536, brain)]
    cases = [
        _case(rows, channels, columns, 4, 128, dtype, 0, setting)
        for rows, channels, columns, dtype in layers
        for setting in candidates(rows, channels, columns, 4)
    ]
    kinds = [(8, 0, half), (8, 128, brain), (8, 32, half), (4, 0, brain), (4, 32, half), (4, 64, brain), (3, 32, half)]
    kinds += [(3, 128, brain), (2, 64, half), (2, 128, brain), (4, 64, full), (8, 0, full), (4, 128, full)]
    kinds += [(3, 32, full), (2, 128, full)]
    for bits, group, dtype in kinds:
        for rows, rank in ((1, 8), (64, 0)):
            setting = default_setting(rows, 4096, 4096, bits, dtype)
            cases.append(_case(rows, 4096, 4096, bits, group, dtype, rank, setting))
    return [*cases, CompileCase("pieces", add_pieces_kernel, (full, half, 65536), {"SPLIT": 4, "BLOCK": _REDUCED})]


def _case(
    rows: int, channels: int, columns: int, bits: int, group: int, dtype: torch.dtype, rank: int, setting: Setting
) -> CompileCase:
    constants = _constants(bits, group, group != 128, True, rank, columns, setting)
    tensors = (dtype, torch.uint8, dtype, torch.uint8, dtype, torch.float32, dtype)
    target = dtype if setting["SPLIT"] == 1 else torch.float32
    sizes = (rows, channels, columns, rank, low_slabs(columns, bits))
    name = f"{(rows, channels, columns)} {bits} bits {dtype} g{group} r{rank} {setting}"
    # Exact products of float32 are not those of matrix instructions.
    matrix = dtype != torch.float32
    return CompileCase(name, weight_only_kernel, (*tensors, target, *sizes), constants, matrix=matrix)
