"""Packed codes to numbers inside kernels; the layout is ``packing``'s. No operator of its own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.packing import PLANES, SPAN, block_columns


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def load_bytes(
    packed: tl.tensor,
    slab: tl.tensor,
    byte: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    low_slabs: tl.tensor,
    BITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Bytes ``(channels, bytes)`` of the lower plane, and of three bits' higher one, else the lower again.

    ``slab`` and ``byte``, below 32, are vectors of one length; slabs past ``low_slabs`` are read as 0.
    """
    place = channel[:, None] * 32 + byte[None, :]
    inside = (channel < channels)[:, None] & (slab < low_slabs)[None, :]
    low = tl.load(packed + place + (slab * channels * 32)[None, :], inside, other=0)
    high = low
    if BITS == 3:
        high = tl.load(packed + place + ((low_slabs + slab // 2) * channels * 32)[None, :], inside, other=0)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def part_codes(low: tl.tensor, high: tl.tensor, slab: tl.tensor, PART: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """uint8 codes of a part of what ``load_bytes`` gave, one for each byte."""
    if BITS == 8:
        codes = low
    elif BITS == 3:
        # A block of the higher plane has the parts of two of the lower.
        shift = (slab % 2 * 4 + PART).to(tl.uint8)
        codes = ((low >> (2 * PART)) & 3) | (((high >> shift[None, :]) & 1) << 2)
    else:
        codes = (low >> (BITS * PART)) & (2**BITS - 1)
    return codes


@triton.jit  # type: ignore[untyped-decorator]
def centred(codes: tl.tensor, zero: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """``codes - zero`` as DTYPE, exactly; both are uint8 and are broadcast.

    A code in the lowest bits of the mantissa of 1024 (of 128 in bfloat16) is that number plus the code: no conversion.
    """
    if DTYPE.is_fp16():
        left = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        value = left - (zero.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif DTYPE.is_bf16() and (BITS < 8):
        left = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        value = left - (zero.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        value = (codes.to(tl.int32) - zero.to(tl.int32)).to(DTYPE)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def load_zero(
    zero: tl.tensor,
    group: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    inside: tl.tensor,
    HAS_ZERO: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """uint8 ``(channels,)`` of a group; the middle of the codes where they are symmetric."""
    if HAS_ZERO:
        return tl.load(zero + group * channels + channel, inside, other=0)
    return tl.full(channel.shape, 2 ** (BITS - 1), tl.uint8)


def columns_of_slab(bits: int) -> int:
    """Columns that 32 bytes of a channel have in the lower plane: 32, 64, 128 and 128 for 8, 4, 3 and 2 bits."""
    return SPAN * 8 // PLANES[bits][0]


def low_slabs(columns: int, bits: int) -> int:
    """Slabs of the lower plane."""
    block = block_columns(bits)
    return -(-columns // block) * block // columns_of_slab(bits)


def shared_scale(group: int, columns: int) -> int:
    """GROUP of the kernels: 0 where a row has one scale."""
    return 0 if group >= columns else group


def or_any(operand: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel gets in the place of an operand that is absent, and that it does not read."""
    return other if operand is None else operand
