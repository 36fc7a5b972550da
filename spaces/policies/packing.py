"""Codes of 2 to 8 bits as bytes, and how many bytes a quantised weight has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from archfront.errors import InputError
from archfront.spaces.policies.quantiser import BITS, Quantiser

LAYOUT_VERSION = 1
"""Version 1: the last axis is a stream of bits; code i has the bits from ``i * bits`` on, its lowest first, and byte k
has the bits from ``8 * k`` on, in the same order. Bits after the last code are 0."""

_SCALE_BYTES = {"float32": 4, "float16": 2}


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of so many codes along the last axis."""
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int, low: int = 0) -> Tensor:
    """Integers ``(..., n)`` as uint8 ``(..., packed_bytes(n, bits))``.

    Args:
        codes: from ``low`` to ``low + 2^bits - 1``.
        bits: 2 to 8.
        low: the least code, ``Quantiser.low``; it is stored as 0.

    Raises:
        InputError: bits, or a code, out of range.
    """
    _check(bits)
    length = codes.shape[-1]
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= low + 2**bits - 1):
        found = (int(codes.min()), int(codes.max()))
        problem = f"are the least and largest code, and do not fit {bits} bits from {low} on"
        raise InputError("packing.codes", found, problem, "Give the quantiser's own codes.")
    # Eight codes have as many bytes as a code has bits, and fit one integer.
    eights = functional.pad(codes.long() - low, (0, -length % 8))
    eights = eights.reshape(*codes.shape[:-1], -(-length // 8), 8)
    word = torch.zeros_like(eights[..., 0])
    for i in range(8):
        word |= eights[..., i] << (i * bits)
    # The sign of a full integer fills from the left, where the mask drops it.
    pieces = torch.stack([((word >> (8 * k)) & 0xFF).to(torch.uint8) for k in range(bits)], -1)
    return pieces.flatten(-2)[..., : packed_bytes(length, bits)].contiguous()


def unpack(packed: Tensor, bits: int, length: int, low: int = 0) -> Tensor:
    """The codes ``(..., length)``, int16, that ``pack`` was given.

    Raises:
        InputError: bits out of range, or the last axis is not that of so many codes.
    """
    _check(bits)
    if packed.shape[-1] != packed_bytes(length, bits):
        problem = f"is the shape of no {length} codes of {bits} bits"
        remedy = f"The last axis would have {packed_bytes(length, bits)} bytes."
        raise InputError("packing.packed", tuple(packed.shape), problem, remedy)
    pieces = functional.pad(packed, (0, -packed.shape[-1] % bits))
    pieces = pieces.reshape(*packed.shape[:-1], -(-length // 8), bits)
    word = torch.zeros_like(pieces[..., 0], dtype=torch.int64)
    for k in range(bits):
        word |= pieces[..., k].long() << (8 * k)
    codes = torch.stack([((word >> (i * bits)) & (2**bits - 1)).to(torch.int16) for i in range(8)], -1)
    return codes.flatten(-2)[..., :length] + low


def quantised_bytes(shape: Sequence[int], quantiser: Quantiser) -> int:
    """Bytes of a weight ``(channels, ...)``: packed codes, each channel from a byte of its own; scales in the
    quantiser's ``scale_type``; and, where it is asymmetric, a byte for each zero point."""
    channels, columns = shape[0], math.prod(shape[1:])
    groups = {"tensor": 1, "channel": channels, "group": channels * -(-columns // quantiser.group)}
    each = _SCALE_BYTES[quantiser.scale_type] + (0 if quantiser.symmetric else 1)
    return channels * packed_bytes(columns, quantiser.bits) + groups[quantiser.granularity] * each


def _check(bits: int) -> None:
    if bits not in BITS:
        raise InputError("packing.bits", bits, "is no width of codes", f"Give {BITS[0]} to {BITS[-1]}.")
