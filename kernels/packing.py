"""Integer weights of 8, 4, 3 or 2 bits as bytes, in the order in which the kernels take them apart.

A plane of 4, 2 or 1 bits is cut along K into blocks in which byte i has the codes i, i + 32, i + 64, ..., the first in
its lowest bits: one shift and one mask turn 32 neighbouring bytes into 32 neighbouring codes, with no exchange between
threads. Three bits are a plane of the lower two and a plane of the highest. The bytes of a block lie channel after
channel, so that a tile of channels is one piece of memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

LAYOUT_VERSION = 1
"""Of everything below; stored beside packed weights, and changed with the order of their bytes."""

SPAN = 32
"""Codes that lie next to each other in each part of a block. Groups that share a scale are multiples of it."""

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a code -> bits of the planes that hold it, the lowest first."""


def block_columns(bits: int) -> int:
    """Columns of a block, to a multiple of which K is padded: 32, 64, 256 and 128 for 8, 4, 3 and 2 bits.

    Raises:
        ValueError: bits other than these.
    """
    if bits not in PLANES:
        raise ValueError(f"bits: {bits} is not served; {', '.join(map(str, PLANES))} are")
    return SPAN * 8 // min(PLANES[bits])


def packed_shape(channels: int, columns: int, bits: int) -> tuple[int, int, int]:
    """Shape of a packed ``(channels, columns)``: slabs of 32 bytes a channel. Of the three slabs that a block of three
    bits has, the lower plane's come first for all blocks, then the highest bits.

    Raises:
        ValueError: bits that are not served.
    """
    block = block_columns(bits)
    return -(-columns // block) * block * bits // (8 * SPAN), channels, SPAN


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Least and largest code: two's complement's, or from 0 on."""
    low = -(1 << (bits - 1)) if signed else 0
    return low, low + (1 << bits) - 1


def pack(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Integers ``(n, k)`` as uint8 of ``packed_shape(n, k, bits)``. The least code is stored as 0.

    Raises:
        ValueError: bits or a shape that is not served, codes that are no integers, or one out of range.
    """
    block, (low, high) = block_columns(bits), code_range(bits, signed)
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes.shape: {tuple(codes.shape)} is not served; (n, k) with n and k of at least 1 is")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes.dtype: {codes.dtype} is not served; an integer type is")
    least, largest = int(codes.min()), int(codes.max())
    if least < low or largest > high:
        signs = "signed" if signed else "unsigned"
        raise ValueError(f"codes: {least} to {largest} is not served; {low} to {high} is, {bits} bits {signs}")
    stored = functional.pad((codes.to(torch.int16) - low).to(torch.uint8), (0, -codes.shape[1] % block))
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_packed_plane((stored >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes)


def unpack(packed: Tensor, bits: int, columns: int, *, signed: bool, version: int = LAYOUT_VERSION) -> Tensor:
    """The codes ``(n, columns)``, int16, that ``pack`` was given.

    Raises:
        ValueError: another layout's version, bits that are not served, or bytes that are no ``(n, columns)``.
    """
    check_version(version)
    block = block_columns(bits)
    channels = packed.shape[1] if packed.ndim == 3 else 0
    shape = packed_shape(channels, columns, bits)
    if tuple(packed.shape) != shape or packed.dtype != torch.uint8:
        found = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"packed: {found} is not served; torch.uint8 {('slabs', 'n', SPAN)} with {shape[0]} slabs is")
    blocks = -(-columns // block)
    codes = torch.zeros(channels, blocks * block, dtype=torch.uint8, device=packed.device)
    first = shift = 0
    for width in PLANES[bits]:
        slabs = blocks * block * width // (8 * SPAN)
        codes |= _unpacked_plane(packed[first : first + slabs], width) << shift
        first, shift = first + slabs, shift + width
    return codes[:, :columns].to(torch.int16) + code_range(bits, signed)[0]


def check_version(version: int) -> None:
    """Raises ValueError for bytes in another order than this file's."""
    if version != LAYOUT_VERSION:
        raise ValueError(f"layout version: {version} is not served; {LAYOUT_VERSION} is. Pack the codes again.")


def _packed_plane(codes: Tensor, width: int) -> Tensor:
    """uint8 codes below ``2^width``, ``(n, whole blocks)``, as ``(blocks, n, 32)``."""
    parts = codes.reshape(len(codes), -1, 8 // width, SPAN)
    found = torch.zeros_like(parts[:, :, 0])
    for part in range(8 // width):
        found |= parts[:, :, part] << (part * width)
    return found.transpose(0, 1)


def _unpacked_plane(slabs: Tensor, width: int) -> Tensor:
    """The inverse: ``(blocks, n, 32)`` as uint8 codes ``(n, columns)``."""
    parts = [(slabs >> (part * width)) & (2**width - 1) for part in range(8 // width)]
    return torch.stack(parts, 2).transpose(0, 1).reshape(slabs.shape[1], -1)
