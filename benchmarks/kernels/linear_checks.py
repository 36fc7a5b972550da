"""What the linear layers and quantisers must compute: one row, odd sizes, outliers, rows of zeros, every bit width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from case import generator, normal, short
from correctness import BRAIN, FULL, GATES, HALF, Check, hard, relative, settled
from torch import Tensor

from archfront.kernels.ops.dequantise_weight import dequantise_weight
from archfront.kernels.ops.fp8_linear import fp8_linear
from archfront.kernels.ops.int8_linear import int8_linear
from archfront.kernels.ops.quantise_rows import gelu_quantise, layer_norm_quantise, quantise_rows
from archfront.kernels.ops.weight_only_linear import weight_only_linear
from archfront.kernels.packing import packed_shape
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.reference.low_bit_linear import FP8

_EPS = 1e-6
# fp8 products are summed with fewer digits than float32 has, so that its gate is tf32's.
_FP8_GATE = 1e-3
_CODES_APART = 1e-3
"""Share of codes that may be one off, where the norm before them was rounded another way; one of few."""


def checks(device: torch.device) -> Iterator[Check]:
    """Small sizes on a CPU, where the twins are slow and known to be right."""
    small = device.type == "cpu"
    sizes = [(1, 40, 96), (33, 9, 41)] if small else [(1, 4096, 14336), (197, 1536, 384), (1000, 1003, 333)]
    for rows, channels, columns in sizes:
        yield _sums(rows, channels, columns, device)
        for dtype, activation, rank in ((HALF, "gelu", 0), (BRAIN, "none", 8), (FULL, "relu", 0)):
            yield _int8(rows, channels, columns, dtype, activation, rank, device)
        for dtype in (BRAIN, HALF, FULL):
            yield _fp8(rows, channels, columns, dtype, device)
    for dtype in (BRAIN, HALF, FULL):
        for rows, columns in [(1, 48), (7, 41)] if small else [(197, 384), (1, 4096), (1001, 1537), (50, 8192)]:
            yield _quantised(rows, columns, dtype, device)
            yield _norm(rows, columns, dtype, device)
            yield _gelu(rows, columns, dtype, device)
    channels, columns = (24, 257) if small else (1003, 1088)
    for bits in (4, 3, 2, 8):
        for group, zero, dtype in ((128, False, BRAIN), (32, True, HALF), (64, False, HALF), (10**6, True, FULL)):
            for rows in (1, 16, 33, 64, 65):
                # A correction with some of them.
                yield _weight_only(rows, channels, columns, bits, group, zero, dtype, 8 * (rows == 16), device)
            yield _weight(channels, columns, bits, group, zero, dtype, device)
    if not small:
        yield _weight_only(1, 14336, 4096, 4, 128, False, BRAIN, 0, device)
        yield _weight_only(16, 4096, 14336, 4, 128, False, BRAIN, 0, device)


def _integers(shape: tuple[int, int], largest: int, seed: int, device: torch.device) -> Tensor:
    random = generator(seed, device)
    return torch.randint(-largest, largest + 1, shape, generator=random, device=device, dtype=torch.int8)


def _sums(rows: int, channels: int, columns: int, device: torch.device) -> Check:
    def run() -> float:
        # So large that sums still are whole numbers of float32.
        largest = min(127, int((2**24 / columns) ** 0.5))
        x, w = _integers((rows, columns), largest, 1, device), _integers((channels, columns), largest, 2, device)
        ones = torch.ones(max(rows, channels), device=device)
        found = settled(lambda: int8_linear(x, ones[:rows], w, ones[:channels], out_dtype=FULL))
        return float((found.double() - x.double() @ w.double().T).abs().max())

    return Check("int8_linear", f"int32 sums {rows} x {channels} x {columns}", 0.0, run)


def _int8(
    rows: int, channels: int, columns: int, dtype: torch.dtype, activation: str, rank: int, device: torch.device
) -> Check:
    def run() -> float:
        codes = reference.quantise_rows(hard(normal((rows, columns), 3, device, FULL)))
        weight = reference.quantise_rows(normal((channels, columns), 4, device, FULL))
        bias = normal((channels,), 5, device, FULL)
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if rank:
            factors = normal((rank, columns), 6, device, HALF, 0.1), normal((channels, rank), 7, device, HALF, 0.1)
        found = settled(lambda: int8_linear(*codes, *weight, bias, *factors, activation=activation, out_dtype=dtype))
        x, w = (part.double() * scale.double()[:, None] for part, scale in (codes, weight))
        if factors[0] is not None and factors[1] is not None:
            w = w + factors[1].double() @ factors[0].double()
        y = x @ w.T + bias.double()
        y = functional.gelu(y) if activation == "gelu" else y.relu() if activation == "relu" else y
        return relative(found, y)

    what = f"{rows} x {channels} x {columns} {short(dtype)} {activation} rank {rank}"
    return Check("int8_linear", what, GATES[dtype], run)


def _fp8(rows: int, channels: int, columns: int, dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        codes = reference.quantise_rows(hard(normal((rows, columns), 3, device, FULL)), FP8)
        weight = reference.quantise_rows(normal((channels, columns), 4, device, FULL), FP8)
        bias = normal((channels,), 5, device, FULL)
        found = settled(lambda: fp8_linear(*codes, *weight, bias, out_dtype=dtype))
        x, w = (part.float().double() * scale.double()[:, None] for part, scale in (codes, weight))
        return relative(found, x @ w.T + bias.double())

    gate = max(_FP8_GATE, GATES[dtype])
    return Check("fp8_linear", f"{rows} x {channels} x {columns} {short(dtype)}", gate, run)


def _compared(found: tuple[Tensor, Tensor], exact: Tensor) -> float:
    """Share of codes that differ from those of ``exact``; infinity where one is two off or a scale is wrong."""
    codes, scale = found
    exact_scale = (exact.abs().amax(1) / 127).clamp_min(torch.finfo(FULL).tiny)
    exact_codes = (exact / exact_scale[:, None]).round().clamp(-127, 127)
    apart = (codes.double() - exact_codes).abs()
    if relative(scale, exact_scale) > GATES[FULL] or not bool((apart <= 1).all()):
        return float("inf")
    return float((apart > 0).double().mean())


def _rows_check(
    operator: str, rows: int, columns: int, dtype: torch.dtype, run: Callable[[], float], gate: float
) -> Check:
    allowed = max(gate, 1 / (rows * columns)) if gate else 0.0
    return Check(operator, f"{rows} x {columns} {short(dtype)}", allowed, run)


def _quantised(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        x = hard(normal((rows, columns), 8, device, dtype))
        codes, scale = settled(lambda: quantise_rows(x))
        expected = reference.quantise_rows(x.cpu())
        same = torch.equal(codes.cpu(), expected[0]) and torch.equal(scale.cpu(), expected[1])
        return 0.0 if same else 1.0

    return _rows_check("quantise_rows", rows, columns, dtype, run, 0.0)


def _norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        x = hard(normal((rows, columns), 9, device, dtype))
        weight, bias = (normal((columns,), seed, device, dtype) for seed in (10, 11))
        found = settled(lambda: layer_norm_quantise(x, weight, bias, eps=_EPS))
        exact = functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), _EPS)
        return _compared(found, exact)

    return _rows_check("layer_norm_quantise", rows, columns, dtype, run, _CODES_APART)


def _gelu(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Check:
    def run() -> float:
        x = hard(normal((rows, columns), 12, device, dtype))
        return _compared(settled(lambda: gelu_quantise(x)), functional.gelu(x.double()))

    return _rows_check("gelu_quantise", rows, columns, dtype, run, _CODES_APART)


def _stored(
    channels: int, columns: int, bits: int, group: int, zero: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    random = generator(bits, device)
    packed = torch.randint(
        0, 256, packed_shape(channels, columns, bits), generator=random, dtype=torch.uint8, device=device
    )
    groups = (reference.group_count(columns, group), channels)
    scale = ((torch.rand(groups, generator=random, device=device) + 0.5) / 2**bits).to(dtype)
    points = torch.randint(0, 2**bits, groups, generator=random, dtype=torch.uint8, device=device)
    return packed, scale, points if zero else None


def _weight_only(
    rows: int,
    channels: int,
    columns: int,
    bits: int,
    group: int,
    zero: bool,
    dtype: torch.dtype,
    rank: int,
    device: torch.device,
) -> Check:
    def run() -> float:
        stored = _stored(channels, columns, bits, group, zero, dtype, device)
        x, bias = hard(normal((rows, columns), 13, device, dtype)), normal((channels,), 14, device, dtype)
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if rank:
            factors = normal((rank, columns), 15, device, dtype, 0.1), normal((channels, rank), 16, device, dtype, 0.1)
        found = settled(lambda: weight_only_linear(x, *stored, bias, *factors, bits=bits, group=group))
        kind: dict[str, Any] = {"bits": bits, "group": group, "columns": columns, "dtype": torch.float64}
        weight = reference.dequantise_weight(*stored, *factors, **kind)
        return relative(found, x.double() @ weight.T + bias.double())

    size = f"{rows} x {channels} x {columns} {short(dtype)} rank {rank}"
    return Check("weight_only_linear", f"W{bits} g{group}{' zero' * zero} {size}", GATES[dtype], run)


def _weight(
    channels: int, columns: int, bits: int, group: int, zero: bool, dtype: torch.dtype, device: torch.device
) -> Check:
    def run() -> float:
        stored = _stored(channels, columns, bits, group, zero, dtype, device)
        kind: dict[str, Any] = {"bits": bits, "group": group, "columns": columns}
        found = settled(lambda: dequantise_weight(*stored, **kind))
        return relative(found, reference.dequantise_weight(*stored, None, None, **kind, dtype=torch.float64))

    what = f"W{bits} g{group}{' zero' * zero} {channels} x {columns} {short(dtype)}"
    return Check("dequantise_weight", what, GATES[dtype], run)
