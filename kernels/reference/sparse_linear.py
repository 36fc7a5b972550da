"""Linear layers on weights with zeros in blocks or in a pattern: how the kernels store them and what they compute.

Block-sparse: of the weight ``(n, k)``, cut into square blocks, those that are not all zeros, output row of blocks after
output row, the columns of each ascending. Shared pattern: N of every M neighbouring columns, the same ones for all of
a tile of neighbouring output channels, so that a tile's product is a dense one on gathered columns of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from archfront.kernels.reference.cost import Cost

LAYOUT_VERSION = 1
"""Of both kinds of packed weights; stored beside them, and changed with the order of their numbers."""

BLOCKS = (32, 64)
"""Sides of blocks."""

TILES = (64, 128)
"""Output channels that share a pattern."""


ALIGNED = 16
"""Of what the columns kept of a shared pattern are a multiple, so that all channels begin at even addresses."""


class Blocks(NamedTuple):
    """A block-sparse weight.

    Attributes:
        values: ``(blocks, b, b)``, the kept blocks as they lie in the weight; those at its ends are filled with zeros.
        columns: ``(blocks,)`` int32, of which column of blocks each is.
        offsets: ``(rows of blocks + 1,)`` int32, where each row's blocks begin in these.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor


class Shared(NamedTuple):
    """A weight with a shared pattern.

    Attributes:
        values: ``(n, kept)``, the weight's kept columns, each channel those of its tile.
        indices: ``(tiles, kept)`` int32, which columns these are, ascending. Those past the end of the weight, which
            fill up a last group and the whole list, have values 0.
    """

    values: Tensor
    indices: Tensor


def pack_blocks(weight: Tensor, mask: Tensor | None = None, *, block: int) -> Blocks:
    """The blocks of ``(n, k)`` that hold anything but zeros.

    Args:
        weight: ``(n, k)``.
        mask: ``(n, k)`` bool; what it does not have is taken as zero.
        block: side of a block, 32 or 64.

    Raises:
        ValueError: a side, shape or mask that is not served.
    """
    check_block(block)
    weight = masked(weight, mask)
    rows, across = block_counts(weight.shape, block)
    padded = functional.pad(weight, (0, -weight.shape[1] % block, 0, -weight.shape[0] % block))
    tiles = padded.reshape(rows, block, across, block).transpose(1, 2)
    kept = (tiles != 0).flatten(2).any(2)
    offsets = functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return Blocks(tiles[kept].contiguous(), kept.nonzero()[:, 1].to(torch.int32), offsets.to(torch.int32))


def unpack_blocks(packed: Blocks, shape: tuple[int, int], *, version: int = LAYOUT_VERSION) -> Tensor:
    """The weight of this shape that ``pack_blocks`` was given, zeros where its mask was false.

    Raises:
        ValueError: another layout's version.
    """
    check_version(version)
    values, columns, offsets = packed
    block = values.shape[1]
    rows, across = block_counts(shape, block)
    tiles = values.new_zeros(rows, across, block, block)
    counts = offsets.diff().long()
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), counts, output_size=len(values))
    tiles[row, columns.long()] = values
    dense = tiles.transpose(1, 2).reshape(rows * block, across * block)
    return dense[: shape[0], : shape[1]].contiguous()


def shared_mask(weight: Tensor, n: int, m: int, *, tile: int) -> Tensor:
    """The N of every M columns of each tile of channels with the largest squares: ``(n, k)`` bool, lowest ones first
    where they tie."""
    check_pattern(n, m, tile)
    strength = _tiles(weight.detach().double().square(), m, tile).sum(1)
    order = strength.sort(dim=2, descending=True, stable=True).indices[:, :, :n]
    chosen = torch.zeros_like(strength, dtype=torch.bool).scatter_(2, order, True)
    return chosen.flatten(1).repeat_interleave(tile, 0)[: weight.shape[0], : weight.shape[1]]


def pack_shared(weight: Tensor, mask: Tensor | None = None, *, n: int, m: int, tile: int) -> Shared:
    """The kept columns of ``(n, k)``, of each tile of channels its own.

    Args:
        weight: ``(n, k)``.
        mask: ``(n, k)`` bool; what it does not have is taken as zero.
        n, m: at most n of every m neighbouring columns hold anything but zeros in a tile of channels.
        tile: channels that share a pattern, 64 or 128.

    Raises:
        ValueError: a pattern, shape or mask that is not served, or a weight that does not hold the pattern.
    """
    check_pattern(n, m, tile)
    weight = masked(weight, mask)
    used = (_tiles(weight, m, tile) != 0).any(1)
    counts = used.sum(2)
    if int(counts.max()) > n:
        place = (counts > n).nonzero()[0].tolist()
        found = int(counts[place[0], place[1]])
        where = f"channels from {place[0] * tile} and columns from {place[1] * m}"
        raise ValueError(f"weight: {found} of {m} columns used by {where} is not served; {n} of {m} shared is")
    # Used columns first, then unused ones to fill up.
    order = (~used).to(torch.uint8).sort(dim=2, stable=True).indices[:, :, :n].sort(dim=2).values
    indices = (order + torch.arange(used.shape[1], device=weight.device)[:, None] * m).flatten(1)
    fill = torch.arange(-indices.shape[1] % ALIGNED, device=weight.device) + used.shape[1] * m
    indices = torch.cat((indices, fill.expand(len(indices), -1)), 1)
    padded = functional.pad(weight, (0, -weight.shape[1] % m + len(fill)))
    values = padded.gather(1, indices.repeat_interleave(tile, 0)[: len(weight)])
    return Shared(values.contiguous(), indices.to(torch.int32))


def unpack_shared(packed: Shared, columns: int, *, tile: int, version: int = LAYOUT_VERSION) -> Tensor:
    """The weight ``(n, columns)`` that ``pack_shared`` was given, zeros where its mask was false.

    Raises:
        ValueError: another layout's version.
    """
    check_version(version)
    values, indices = packed
    places = indices.long().repeat_interleave(tile, 0)[: len(values)]
    # What lies past the end goes into a column that is cut off.
    dense = values.new_zeros(len(values), columns + 1)
    return dense.scatter_(1, places.clamp_max(columns), values)[:, :columns].contiguous()


def block_sparse_linear(
    x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, bias: Tensor | None, *, channels: int
) -> Tensor:
    """``x @ w.T + bias`` of a block-sparse w, in float32 at least, rounded once.

    Args:
        x: ``(m, k)``; the result ``(m, channels)`` has its dtype.
        values, columns, offsets: as ``pack_blocks`` gives them of ``(channels, k)``.
        bias: ``(channels,)``.
        channels: of the result.
    """
    weight = unpack_blocks(Blocks(values, columns, offsets), (channels, x.shape[1]))
    return _linear(x, weight, bias)


def shared_pattern_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, *, tile: int) -> Tensor:
    """``x @ w.T + bias`` of a w with a shared pattern, in float32 at least, rounded once.

    Args:
        x: ``(m, k)``; the result ``(m, n)`` has its dtype.
        values, indices: as ``pack_shared`` gives them of ``(n, k)``.
        bias: ``(n,)``.
        tile: channels that share a pattern.
    """
    return _linear(x, unpack_shared(Shared(values, indices), x.shape[1], tile=tile), bias)


def block_sparse_linear_cost(
    rows: int, channels: int, columns: int, *, blocks: int, block: int, bias: bool, dtype: torch.dtype
) -> Cost:
    """Two operations a row and number of a kept block, padding of blocks at the ends included; all of x read.

    Args:
        rows, channels, columns: of ``(m, k) @ (n, k).T``.
        blocks: kept.
        block: side of one.
        bias: whether there is one.
        dtype: of all but the two lists of int32.
    """
    numbers = blocks * block**2
    places = (blocks + block_counts((channels, columns), block)[0] + 1) * torch.int32.itemsize
    moved = (rows * (columns + channels) + numbers + channels * bias) * dtype.itemsize
    return Cost(2 * rows * numbers + rows * channels * bias, moved + places)


def shared_pattern_linear_cost(
    rows: int, channels: int, columns: int, *, kept: int, tile: int, bias: bool, dtype: torch.dtype
) -> Cost:
    """Two operations a row and kept number; all of x read.

    Args:
        rows, channels, columns: of ``(m, k) @ (n, k).T``.
        kept: columns of a channel.
        tile: channels that share a pattern.
        bias: whether there is one.
        dtype: of all but the list of int32.
    """
    moved = (rows * (columns + channels) + channels * (kept + bias)) * dtype.itemsize
    indices = -(-channels // tile) * kept * torch.int32.itemsize
    return Cost(rows * channels * (2 * kept + bias), moved + indices)


def semi_structured_cost(rows: int, channels: int, columns: int, *, bias: bool, dtype: torch.dtype) -> Cost:
    """Of 2:4 as GPUs store it: half the numbers, and two bits each for their places."""
    kept = channels * columns // 2
    moved = (rows * (columns + channels) + kept + channels * bias) * dtype.itemsize
    return Cost(2 * rows * kept + rows * channels * bias, moved + kept // 4)


def holds_pattern(weight: Tensor, n: int, m: int) -> bool:
    """Whether each row has at most n of every m neighbouring columns that are not zero, a last group too."""
    padded = functional.pad(weight, (0, -weight.shape[1] % m))
    return int((padded != 0).reshape(len(weight), -1, m).sum(2).max()) <= n


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """``(n, k)`` with zeros where a mask is false, detached.

    Raises:
        ValueError: another shape, or a mask of another shape or dtype.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight.shape: {tuple(weight.shape)} is not served; (n, k) with n and k of at least 1 is")
    weight = weight.detach()
    if mask is None:
        return weight
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask: {found} is not served; torch.bool {tuple(weight.shape)}, the weight's shape, is")
    return weight.masked_fill(~mask, 0)


def block_counts(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    """Rows and columns of blocks in ``(n, k)``."""
    return -(-shape[0] // block), -(-shape[1] // block)


def check_version(version: int) -> None:
    """Raises ValueError for numbers in another order than this file's."""
    if version != LAYOUT_VERSION:
        raise ValueError(f"layout version: {version} is not served; {LAYOUT_VERSION} is. Pack the weight again.")


def check_block(block: int) -> None:
    """Raises ValueError for a side of blocks that is not served."""
    if block not in BLOCKS:
        raise ValueError(f"block: {block} is not served; {' or '.join(map(str, BLOCKS))} is")


def check_pattern(n: int, m: int, tile: int) -> None:
    """Raises ValueError for a pattern that is none, or a tile that is not served."""
    if not 1 <= n <= m:
        raise ValueError(f"n, m: {n} of {m} is not served; n of 1 to m is")
    if tile not in TILES:
        raise ValueError(f"tile: {tile} is not served; {' or '.join(map(str, TILES))} is")


def _tiles(weight: Tensor, m: int, tile: int) -> Tensor:
    """``(n, k)``, filled up with zeros, as ``(tiles, channels of a tile, groups, m)``."""
    padded = functional.pad(weight, (0, -weight.shape[1] % m, 0, -weight.shape[0] % tile))
    return padded.reshape(-1, tile, padded.shape[1] // m, m)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
