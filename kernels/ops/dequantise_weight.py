"""A packed weight back in float, with its low-rank correction: for products with so many rows that arithmetic is the
limit, and that are done on float weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops import low_rank
from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.low_rank import outer_tile
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
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
from archfront.kernels.packing import PLANES, SPAN, packed_shape
from archfront.kernels.reference import low_bit_linear as reference

OPERATORS = ("dequantise_weight",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kernels count packed bytes in int32.
MAX_BYTES = 2**31 - 2**16


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def dequantise_kernel(
    packed: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    channels: tl.tensor,
    columns: tl.tensor,
    slabs: tl.tensor,
    rank: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    CORRECTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A slab of some channels. GROUP is 0 where a row has one scale; ``slabs`` are the lower plane's."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    slab = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, 32)
    slabs_of_bytes = slab + tl.zeros((32,), tl.int32)
    has_channel = channel < channels
    low, high = load_bytes(packed, slabs_of_bytes, byte, channel, channels, slabs, BITS)
    for part in tl.static_range(8 // WIDTH):
        first = (slab * (8 // WIDTH) + part) * 32
        column = first + byte
        group = first // GROUP if GROUP > 0 else 0
        # Padding may begin a group that is not there.
        inside = has_channel & (first < columns)
        middle = load_zero(zero, group, channel, channels, inside, HAS_ZERO, BITS)
        codes = part_codes(low, high, slabs_of_bytes, part, BITS)
        factor = tl.load(scale + group * channels + channel, inside, other=0.0).to(tl.float32)
        value = centred(codes, middle[:, None], BITS, tl.float32) * factor[:, None]
        if CORRECTED:
            for start in tl.range(0, rank, CHUNK, num_stages=1):
                component = start + tl.arange(0, CHUNK)
                place = component.to(tl.int64)[:, None] * columns + column[None, :]
                has_both = (component < rank)[:, None] & (column < columns)[None, :]
                right = tl.load(down + place, has_both, other=0.0).to(tl.float32)
                left = outer_tile(up, channel, channels, component, rank)
                value = tl.dot(left, right, value, input_precision="tf32x3")
        target = out + channel.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, value.to(out.dtype.element_ty), has_channel[:, None] & (column < columns)[None, :])


def run_kernel(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    *,
    bits: int,
    group: int,
) -> None:
    """Launches the kernel, which overwrites all of ``out`` ``(n, k)``; the caller has checked the arguments."""
    (channels, columns), rank = out.shape, 0 if down is None else down.shape[0]
    slabs = low_slabs(columns, bits)
    constants = _constants(bits, shared_scale(group, columns), zero is not None, rank)
    grid = (triton.cdiv(columns, columns_of_slab(bits)), triton.cdiv(channels, constants["BLOCK_N"]))
    operands = (packed, scale, or_any(zero, packed), or_any(down, scale), or_any(up, scale))
    dequantise_kernel[grid](*operands, out, channels, columns, slabs, rank, **constants)


def check(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Raises ValueError where a kernel on packed weights would compute something else than its twin, or nothing.

    Args:
        packed, scale, zero, down, up, bits, group, columns: of the weight.
        dtype: of scales and factors.
        others: more tensors that must be contiguous and where the weight is.
    """
    if bits not in PLANES:
        raise refusal("bits", bits, " or ".join(map(str, PLANES)))
    if columns < 1:
        raise refusal("columns", columns, "1 or more")
    if group < 1 or (group < columns and group % SPAN):
        raise refusal("group", group, f"a multiple of {SPAN}, or k = {columns} or more for one scale a channel,")
    channels = packed.shape[1] if packed.ndim == 3 else 0
    shape = packed_shape(channels, columns, bits)
    if channels == 0 or tuple(packed.shape) != shape or packed.numel() > MAX_BYTES:
        where = f"(slabs, n, {SPAN}) with {shape[0]} slabs for {bits} bits and k = {columns}, below {MAX_BYTES} bytes,"
        raise refusal("packed.shape", tuple(packed.shape), where)
    check_dtype("packed", packed, (torch.uint8,))
    if dtype not in DTYPES:
        raise refusal("dtype", dtype, " or ".join(map(str, DTYPES)))
    groups = (reference.group_count(columns, group), channels)
    tensors = {"scale": scale} | ({} if zero is None else {"zero": zero})
    for name, tensor in tensors.items():
        check_shape(name, tensor, groups, f"(groups, n) with {groups[0]} groups and n = {channels} of packed")
    check_dtype("scale", scale, (dtype,))
    if zero is not None:
        check_dtype("zero", zero, (torch.uint8,))
    tensors |= low_rank.check_factors(down, up, channels, columns, dtype)
    check_together(packed, {**tensors, **(others or {})})


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::dequantise_weight", mutates_args=(), device_types="cuda")
def _operator(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    check(packed, scale, zero, down, up, bits=bits, group=group, columns=columns, dtype=scale.dtype)
    out = scale.new_empty((packed.shape[1], columns))
    # Triton launches on the current device, which need not be that of the operands.
    with torch.cuda.device(packed.device):
        run_kernel(packed, scale, zero, down, up, out, bits=bits, group=group)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    check(packed, scale, zero, down, up, bits=bits, group=group, columns=columns, dtype=scale.dtype)
    weight = (packed, scale, zero, down, up)
    return reference.dequantise_weight(*weight, bits=bits, group=group, columns=columns, dtype=scale.dtype)


@_operator.register_fake
def _shape_only(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    check(packed, scale, zero, down, up, bits=bits, group=group, columns=columns, dtype=scale.dtype)
    return scale.new_empty((packed.shape[1], columns))


def dequantise_weight(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """As the reference of this name, in the scale's dtype.

    Args:
        packed: as ``packing.pack`` makes it of ``(n, columns)``, on a GPU or a CPU.
        scale: ``(groups, n)``, float32, float16 or bfloat16, contiguous.
        zero: ``(groups, n)`` uint8, the code of 0.
        down, up: ``(r, columns)`` and ``(n, r)`` of the scale's dtype, r at most 64, both or neither.
        bits: 8, 4, 3 or 2.
        group: columns that share a scale, a multiple of 32; ``columns`` or more for one scale a channel.
        columns: of the weight.

    Returns:
        ``(n, columns)``, rounded once.

    Raises:
        ValueError: a shape, dtype, number of bits, group, layout or device that is not served; names it and what is.
    """
    check_device(packed)
    weight = (packed, scale, zero, down, up)
    result: Tensor = _operator(*weight, bits=bits, group=group, columns=columns)
    return result


def _constants(bits: int, group: int, zero: bool, rank: int) -> dict[str, int]:
    kind = {"BITS": bits, "GROUP": group, "HAS_ZERO": zero, "CORRECTED": rank > 0, "CHUNK": low_rank.CHUNK}
    return kind | {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1}


def compile_cases() -> list[CompileCase]:
    """A weight of DeiT-S and one of Llama, in each number of bits, with and without zero points and a correction."""
    cases = []
    half, brain, byte = torch.float16, torch.bfloat16, torch.uint8
    kinds = [(8, half, 0, 0), (4, half, 128, 0), (4, brain, 32, 8), (3, half, 64, 64), (2, brain, 128, 0)]
    for columns, channels in ((1536, 384), (4096, 14336)):
        for bits, dtype, group, rank in [*kinds, (4, torch.float32, 64, 8)]:
            constants = _constants(bits, group, group == 32 or bits == 2, rank)
            arguments = (byte, dtype, byte, dtype, dtype, dtype, channels, columns, low_slabs(columns, bits), rank)
            name = f"{(channels, columns)} {bits} bits {dtype} g{group} r{rank}"
            cases.append(CompileCase(name, dequantise_kernel, arguments, constants, matrix=rank > 0))
    return cases
