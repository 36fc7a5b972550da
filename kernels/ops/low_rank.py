"""The low-rank correction of a linear layer: x through the inner factor, for a kernel that adds the outer one.

Part of the operators that take ``down`` and ``up``, none of its own. Columns are cut into pieces whose sums stay apart,
so that few rows still occupy a GPU and the order of addition is fixed.

Source of the correction: Yao et al., "ZeroQuant-V2", 2023 (LoRC).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_dtype, check_shape, refusal

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 64
MAX_PIECES = 8
CHUNK = 16
"""Components that an epilogue adds at a time; more would spill."""


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def project_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    down: tl.tensor,
    inner: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    PIECES: tl.constexpr,
    SCALED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """``inner[piece] = x[:, piece] @ down[:, piece].T``, times ``x_scale`` if SCALED."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    piece = tl.program_id(1)
    component = tl.arange(0, RANK)
    has_row, has_component = row < rows, component < rank
    source = x + row.to(tl.int64)[:, None] * columns
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for step in range(piece, tl.cdiv(columns, BLOCK_K), PIECES):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        has_column = column < columns
        value = tl.load(source + column[None, :], has_row[:, None] & has_column[None, :], other=0)
        place = component[None, :] * columns + column[:, None]
        factor = tl.load(down + place, has_component[None, :] & has_column[:, None], other=0.0)
        total = tl.dot(value.to(down.dtype.element_ty), factor, total, input_precision="tf32x3")
    if SCALED:
        total *= tl.load(x_scale + row, has_row, other=0.0)[:, None]
    target = inner + (piece * rows + row).to(tl.int64)[:, None] * rank + component[None, :]
    tl.store(target, total, has_row[:, None] & has_component[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def inner_tile(
    inner: tl.tensor, row: tl.tensor, rows: tl.tensor, component: tl.tensor, rank: tl.tensor, PIECES: tl.constexpr
) -> tl.tensor:
    """``(rows, components)`` of a tile, float32: the pieces of what ``project`` gave, added in order."""
    inside = (row < rows)[:, None] & (component < rank)[None, :]
    place = row.to(tl.int64)[:, None] * rank + component[None, :]
    total = tl.load(inner + place, inside, other=0.0)
    for piece in tl.static_range(1, PIECES):
        place = (piece * rows + row).to(tl.int64)[:, None] * rank + component[None, :]
        total += tl.load(inner + place, inside, other=0.0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def outer_tile(
    up: tl.tensor, channel: tl.tensor, channels: tl.tensor, component: tl.tensor, rank: tl.tensor
) -> tl.tensor:
    """``(channels, components)`` of a tile, float32."""
    inside = (channel < channels)[:, None] & (component < rank)[None, :]
    return tl.load(up + channel[:, None] * rank + component[None, :], inside, other=0.0).to(tl.float32)


def pieces(columns: int) -> int:
    """Into how many the columns are cut, a power of two: about a thousand columns each."""
    return min(MAX_PIECES, int(triton.next_power_of_2(max(1, columns // 1024))))


def _sizes(rows: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    # More columns at once would spill.
    block_k = 128 if rows <= 16 else 64
    return {
        "RANK": int(triton.next_power_of_2(max(rank, 16))),
        "BLOCK_M": 16 if rows <= 16 else 64,
        "BLOCK_K": block_k if dtype.itemsize == 2 else 32,
        "num_warps": 4,
        "num_stages": 2,
    }


def project(x: Tensor, x_scale: Tensor | None, down: Tensor) -> Tensor:
    """``x @ down.T`` with x of float or of codes with ``x_scale``: ``(pieces, m, r)`` float32, to be summed."""
    (rows, columns), rank = x.shape, down.shape[0]
    inner = x.new_empty((pieces(columns), rows, rank), dtype=torch.float32)
    sizes = _sizes(rows, rank, down.dtype)
    grid = (triton.cdiv(rows, sizes["BLOCK_M"]), len(inner))
    scale, scaled = (inner, False) if x_scale is None else (x_scale, True)
    constants = {"PIECES": len(inner), "SCALED": scaled, **sizes}
    project_kernel[grid](x, scale, down, inner, rows, columns, rank, **constants)
    return inner


def check_factors(
    down: Tensor | None, up: Tensor | None, channels: int, columns: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The factors by their names, if any.

    Args:
        down, up: ``(r, k)`` and ``(n, r)``.
        channels, columns: n and k.
        dtype: of both; None for any that is served.

    Raises:
        ValueError: one without the other, or a shape or dtype that is not served.
    """
    if down is None or up is None:
        if down is not up:
            raise refusal("down, up", "one alone", "both or neither")
        return {}
    if down.ndim != 2 or down.shape[1] != columns or not 1 <= down.shape[0] <= MAX_RANK:
        raise refusal("down.shape", tuple(down.shape), f"(r, k) with r of 1 to {MAX_RANK} and k = {columns} of x")
    check_shape("up", up, (channels, down.shape[0]), f"(n, r) with n = {channels} and r = {down.shape[0]} of down")
    check_dtype("down", down, DTYPES if dtype is None else (dtype,))
    check_dtype("up", up, (down.dtype,))
    return {"down": down, "up": up}


def compile_cases() -> list[CompileCase]:
    """Few and many rows of each type of input that is served."""
    cases = []
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    pairs = [(torch.int8, half), (torch.int8, brain), (half, half), (brain, brain), (torch.int8, full), (full, full)]
    for dtype, factors in pairs:
        for rows, rank in ((1, 8), (1576, 8), (1576, MAX_RANK)):
            arguments = (dtype, full, factors, full, rows, 4096, rank)
            constants = {"PIECES": 4, "SCALED": dtype == torch.int8, **_sizes(rows, rank, factors)}
            name = f"low rank {dtype} {factors} r{rank} {rows} rows"
            cases.append(CompileCase(name, project_kernel, arguments, constants, matrix=True))
    return cases
