"""Linear layers on sparse weights, by blocks and by patterns that channels share, beside cuBLAS and torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from case import Case, Tuning, Variant, generator, normal, some_rows
from int8_cases import CUBLAS
from torch import Tensor

from archfront.kernels.ops import block_sparse_linear as block_module
from archfront.kernels.ops import shared_pattern_linear as shared_module
from archfront.kernels.ops.block_sparse_linear import block_sparse_linear
from archfront.kernels.ops.shared_pattern_linear import shared_pattern_linear
from archfront.kernels.reference import sparse_linear as reference
from archfront.kernels.reference.cost import Cost

BLOCKS, SHARED = "block_sparse_linear", "shared_pattern_linear"
_DTYPE = torch.bfloat16
_BLOCK, _TILE = 64, 128
_VIT_B = [(197 * 64, 3072, 768), (197 * 64, 768, 3072)]
_LLAMA = [(2048, 4096, 4096), (2048, 14336, 4096)]
_FEW = [(1, 4096, 4096), (16, 14336, 4096)]


class Values(NamedTuple):
    """The weight has zeros where it is sparse."""

    x: Tensor
    w: Tensor
    bias: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """75 % sparsity at many rows first, then 90 and 50 %, and few rows."""
    if device.type == "cpu":
        yield _blocks(9, 128, 192, 0.75, 0, device)
        yield _shared(9, 128, 192, 2, 4, 0, device)
        return
    for rows, channels, columns in _VIT_B + _LLAMA:
        yield _blocks(rows, channels, columns, 0.75, 0, device)
        for sparsity in (0.9, 0.5):
            yield _blocks(rows, channels, columns, sparsity, 2, device)
        for n, m in ((2, 4), (1, 4)):
            yield _shared(rows, channels, columns, n, m, 2, device)
    for rows, channels, columns in _FEW:
        yield _blocks(rows, channels, columns, 0.75, 2, device)
        yield _shared(rows, channels, columns, 2, 4, 3, device)


def _exact(given: Values) -> Tensor:
    return some_rows(given.x).double() @ given.w.double().T + given.bias.double()


def _dense(rows: int, channels: int, columns: int) -> Variant:
    size = 2 * (rows * columns + channels * columns + rows * channels + channels)
    cost = Cost(rows * channels * (2 * columns + 1), size)
    return Variant(CUBLAS, tuple, functional.linear, _exact, cost, "bf16", some_rows)


def _blocks(rows: int, channels: int, columns: int, sparsity: float, priority: int, device: torch.device) -> Case:
    down, across = reference.block_counts((channels, columns), _BLOCK)
    kept = round(down * across * (1 - sparsity))

    def values(seed: int) -> Values:
        """Random blocks, of the whole weight the same number with every seed."""
        order = torch.randperm(down * across, generator=generator(4 * seed, device), device=device)
        mask = (order < kept).reshape(down, across).repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
        w = normal((channels, columns), 4 * seed + 1, device, scale=columns**-0.5) * mask[:channels, :columns]
        return Values(normal((rows, columns), 4 * seed + 2, device), w, normal((channels,), 4 * seed + 3, device))

    def packed(given: Values) -> tuple[Any, ...]:
        return given.x, *reference.pack_blocks(given.w, block=_BLOCK), given.bias

    def bsr(given: Values) -> tuple[Any, ...]:
        return given.x, given.w.to_sparse_bsr((_BLOCK, _BLOCK)), given.bias

    sizes: dict[str, Any] = {"blocks": kept, "block": _BLOCK, "bias": True, "dtype": _DTYPE}
    cost = reference.block_sparse_linear_cost(rows, channels, columns, **sizes)
    variants = [
        Variant(
            BLOCKS,
            packed,
            lambda *given: block_sparse_linear(*given, channels=channels),
            _exact,
            cost,
            "bf16",
            some_rows,
            ours=True,
        ),
        _dense(rows, channels, columns),
        # Its table of settings has one other GPU alone, so this is not the best that it could do.
        Variant("torch BSR, not tuned", bsr, functional.linear, _exact, cost, "bf16", some_rows),
    ]

    def launched(given: Values) -> tuple[Any, ...]:
        return *packed(given), given.x.new_empty(rows, channels)

    x = torch.empty(rows, columns, dtype=_DTYPE, device="meta")
    tuning = Tuning(
        BLOCKS,
        block_module.tuning_key(x, channels, kept, _BLOCK),
        block_module.default_setting(rows, channels, kept, _BLOCK),
        block_module.candidates(rows, channels, kept, _BLOCK),
        launched,
        lambda *given: block_module.run_kernel(*given[:-1], setting=given[-1]),
    )
    facts = {"m": rows, "n": channels, "k": columns, "sparsity": sparsity, "block": _BLOCK}
    name = f"{rows} x {channels} x {columns}, {sparsity:.0%} of {_BLOCK}-blocks zero"
    return Case(BLOCKS, name, _DTYPE, facts, values, variants, CUBLAS, priority, [tuning])


def _shared(rows: int, channels: int, columns: int, n: int, m: int, priority: int, device: torch.device) -> Case:
    kept = -(-columns // m) * n

    def values(seed: int) -> Values:
        w = normal((channels, columns), 4 * seed + 1, device, scale=columns**-0.5)
        w = w * reference.shared_mask(w, n, m, tile=_TILE)
        return Values(normal((rows, columns), 4 * seed + 2, device), w, normal((channels,), 4 * seed + 3, device))

    def packed(given: Values) -> tuple[Any, ...]:
        return given.x, *reference.pack_shared(given.w, n=n, m=m, tile=_TILE), given.bias

    def semi_structured(given: Values) -> tuple[Any, ...]:
        return given.x, torch.sparse.to_sparse_semi_structured(given.w), given.bias

    cost = reference.shared_pattern_linear_cost(rows, channels, columns, kept=kept, tile=_TILE, bias=True, dtype=_DTYPE)
    variants = [
        Variant(
            SHARED,
            packed,
            lambda *given: shared_pattern_linear(*given, tile=_TILE),
            _exact,
            cost,
            "bf16",
            some_rows,
            ours=True,
        ),
        _dense(rows, channels, columns),
    ]
    if (n, m) == (2, 4):
        half = reference.semi_structured_cost(rows, channels, columns, bias=True, dtype=_DTYPE)
        variants.append(Variant("torch 2:4", semi_structured, functional.linear, _exact, half, "bf16", some_rows))

    def launched(given: Values) -> tuple[Any, ...]:
        return *packed(given), given.x.new_empty(rows, channels)

    x = torch.empty(rows, columns, dtype=_DTYPE, device="meta")
    tuning = Tuning(
        SHARED,
        shared_module.tuning_key(x, channels, kept, _TILE),
        shared_module.default_setting(rows, channels, _TILE, _DTYPE),
        shared_module.candidates(rows, channels, _TILE, _DTYPE),
        launched,
        lambda *given: shared_module.run_kernel(*given[:-1], tile=_TILE, setting=given[-1]),
    )
    facts = {"m": rows, "n": channels, "k": columns, "pattern": f"{n}:{m}", "tile": _TILE}
    name = f"{rows} x {channels} x {columns}, {n}:{m} by {_TILE} channels"
    return Case(SHARED, name, _DTYPE, facts, values, variants, CUBLAS, priority, [tuning])
