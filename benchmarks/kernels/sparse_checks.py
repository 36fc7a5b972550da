"""What sparse linear layers and EvoNorms must compute: sizes that fill no block, empty rows of blocks, groups of all
sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import normal, short
from correctness import BRAIN, FULL, GATES, HALF, Check, hard, relative, settled
from torch import Tensor

from archfront.kernels.ops.block_sparse_linear import block_sparse_linear
from archfront.kernels.ops.evonorm import evonorm_b0, evonorm_s0
from archfront.kernels.ops.shared_pattern_linear import shared_pattern_linear
from archfront.kernels.reference import evonorm as evonorm_reference
from archfront.kernels.reference import sparse_linear as reference


def checks(device: torch.device) -> Iterator[Check]:
    """Small sizes on a CPU, where the twins are slow and known to be right."""
    small = device.type == "cpu"
    sizes = [(1, 70, 100)] if small else [(1, 4096, 4096), (16, 1536, 384), (333, 1003, 1001), (12608, 768, 3072)]
    planes = [(2, 32, 5, 3)] if small else [(8, 256, 56, 56), (8, 64, 112, 112), (3, 96, 7, 9), (1, 32, 1, 1)]
    for dtype in (BRAIN, HALF, FULL):
        for rows, channels, columns in sizes:
            for block in reference.BLOCKS:
                yield _blocks(rows, channels, columns, block, dtype, device)
            for tile in reference.TILES:
                yield _shared(rows, channels, columns, tile, dtype, device)
        for plane in planes:
            for operator in ("evonorm_s0", "evonorm_b0"):
                yield _evonorm(operator, plane, dtype, device)


def _layer(
    rows: int, channels: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = (normal((count, columns), 50 + place, device, dtype) for place, count in enumerate((rows, channels)))
    return hard(x), w * columns**-0.5, normal((channels,), 52, device, dtype)


def _linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x.double() @ w.double().T + bias.double()


def _blocks(rows: int, channels: int, columns: int, block: int, dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        x, w, bias = _layer(rows, channels, columns, dtype, device)
        down, across = reference.block_counts((channels, columns), block)
        kept = normal((down, across), 53, device, FULL) > 0.5
        # Some channels have nothing.
        kept[0] = False
        w = w * kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:channels, :columns]
        packed = reference.pack_blocks(w, block=block)
        found = settled(lambda: block_sparse_linear(x, *packed, bias, channels=channels))
        return relative(found, _linear(x, w, bias))

    what = f"{rows} x {channels} x {columns} block {block} {short(dtype)}"
    return Check("block_sparse_linear", what, GATES[dtype], run)


def _shared(rows: int, channels: int, columns: int, tile: int, dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        x, w, bias = _layer(rows, channels, columns, dtype, device)
        w = w * reference.shared_mask(w, 1, 4, tile=tile)
        packed = reference.pack_shared(w, n=1, m=4, tile=tile)
        found = settled(lambda: shared_pattern_linear(x, *packed, bias, tile=tile))
        return relative(found, _linear(x, w, bias))

    what = f"{rows} x {channels} x {columns} 1:4 by {tile} channels {short(dtype)}"
    return Check("shared_pattern_linear", what, GATES[dtype], run)


def _evonorm(operator: str, plane: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        # Far from zero, where variances of one pass would be wrong.
        x = 3 + hard(normal(plane, 60, device, dtype))
        v, variance, weight, bias = (normal((plane[1],), 61 + place, device, FULL) for place in range(4))
        wide = [part.double() for part in (x, v, 0.5 + variance.square(), weight, bias)]
        rest: dict[str, Any] = {"eps": 1e-5}
        if operator == "evonorm_s0":
            found = settled(lambda: evonorm_s0(x, v, weight, bias, groups=32, **rest))
            return relative(found, evonorm_reference.evonorm_s0(wide[0], wide[1], *wide[3:], groups=32, **rest))
        found = settled(lambda: evonorm_b0(x, v, 0.5 + variance.square(), weight, bias, **rest))
        return relative(found, evonorm_reference.evonorm_b0(*wide, **rest))

    return Check(operator, f"{' x '.join(map(str, plane))} {short(dtype)}", GATES[dtype], run)
