"""Linear layers on packed weights of few bits, beside cuBLAS on the same weight in bf16 and torch's int4 product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from case import Case, Tuning, Variant, generator, normal, some_rows
from int8_cases import CUBLAS
from torch import Tensor

from archfront.kernels.ops import weight_only_linear as module
from archfront.kernels.ops.dequantise_weight import dequantise_weight
from archfront.kernels.ops.unpacking import shared_scale
from archfront.kernels.ops.weight_only_linear import weight_only_linear
from archfront.kernels.packing import packed_shape, unpack
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.reference.cost import Cost
from archfront.kernels.reference.low_bit_costs import weight_only_linear_cost

OPERATOR = "weight_only_linear"
_DTYPE = torch.bfloat16
_LLAMA = [(14336, 4096), (4096, 14336), (4096, 4096), (6144, 4096)]
_DEIT_S = [(1536, 384), (384, 1536)]
_PIECES = 8
"""Factor of K that a tile of torch's int4 product has."""


class Values(NamedTuple):
    """Random bytes are random codes."""

    x: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None


def cases(device: torch.device) -> Iterator[Case]:
    """Llama's layers in 4 bits first, then 3 and 2, zero points, more rows than the kernel takes, and DeiT-S."""
    if device.type == "cpu":
        yield _case(1, 48, 256, 4, 128, False, 0, device)
        yield _case(65, 48, 256, 3, 64, True, 0, device)
        yield _dequantised(48, 256, 4, 128, device)
        return
    for rows in (1, 16, 64):
        for channels, columns in _LLAMA:
            yield _case(rows, channels, columns, 4, 128, False, 0 if rows < 64 else 1, device)
    for channels, columns in _LLAMA[:2]:
        for bits, group in ((4, 128), (3, 128), (2, 64)):
            for rows in (1, 16):
                yield _case(rows, channels, columns, bits, group, True, 2, device)
        for rows in (256, 2048):
            yield _case(rows, channels, columns, 4, 128, False, 2, device)
        yield _dequantised(channels, columns, 4, 128, device)
    for channels, columns in _DEIT_S:
        yield _case(197, channels, columns, 4, 128, False, 3, device)


def int4_arguments(given: Values, columns: int, group: int) -> tuple[Any, ...]:
    """The same weight as ``torch._weight_int4pack_mm`` takes it: ``(code - 8) * scale + zero``, even codes high.

    Raises:
        RuntimeError: on a CPU, for which torch has another operator.
    """
    if given.x.device.type != "cuda":
        raise RuntimeError("torch._weight_int4pack_mm serves GPUs alone")
    codes = unpack(given.packed, 4, columns, signed=False).to(torch.uint8)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    scale = given.scale.float()
    offset = torch.zeros_like(scale) if given.zero is None else (8 - given.zero.float()) * scale
    both = torch.stack((scale, offset), 2).to(_DTYPE).contiguous()
    return given.x, torch._convert_weight_to_int4pack(pairs, _PIECES), group, both


def _values(rows: int, channels: int, columns: int, bits: int, group: int, zero: bool, device: torch.device) -> Any:
    def values(seed: int) -> Values:
        random = generator(3 * seed, device)
        shape = packed_shape(channels, columns, bits)
        packed = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8, device=device)
        groups = (reference.group_count(columns, group), channels)
        scale = torch.rand(groups, generator=random, device=device) + 0.5
        scale = (scale / (2 ** (bits - 1) * columns**0.5)).to(_DTYPE)
        points = torch.randint(0, 2**bits, groups, generator=random, dtype=torch.uint8, device=device)
        return Values(normal((rows, columns), 3 * seed + 1, device), packed, scale, points if zero else None)

    return values


def _case(
    rows: int, channels: int, columns: int, bits: int, group: int, zero: bool, priority: int, device: torch.device
) -> Case:
    def weight(given: Values, dtype: torch.dtype) -> Tensor:
        stored = (given.packed, given.scale, given.zero, None, None)
        return reference.dequantise_weight(*stored, bits=bits, group=group, columns=columns, dtype=dtype)

    def exact(given: Values, dtype: torch.dtype = torch.float64) -> Tensor:
        return some_rows(given.x).double() @ weight(given, dtype).double().T

    dense = Cost(2 * rows * channels * columns, 2 * (rows * columns + channels * columns + rows * channels))
    cost = weight_only_linear_cost(rows, channels, columns, bits=bits, group=group, zero=zero, bias=False, dtype=_DTYPE)
    variants = [
        Variant(
            f"weight_only_linear W{bits}",
            tuple,
            lambda *given: weight_only_linear(*given, bits=bits, group=group),
            exact,
            cost,
            "bf16",
            some_rows,
            ours=True,
        ),
        Variant(
            CUBLAS,
            lambda given: (given.x, weight(given, _DTYPE)),
            functional.linear,
            lambda given: exact(given, _DTYPE),
            dense,
            "bf16",
            some_rows,
        ),
    ]
    if bits == 4:
        variants.append(
            Variant(
                "_weight_int4pack_mm",
                lambda given: int4_arguments(given, columns, group),
                torch._weight_int4pack_mm,
                exact,
                cost,
                "bf16",
                some_rows,
            )
        )
    facts = {"m": rows, "n": channels, "k": columns, "bits": bits, "group": group, "zero": zero}
    name = f"W{bits} g{group}{' zero' * zero} {rows} x {channels} x {columns}"
    tunings = [_tuning(rows, channels, columns, bits, group)] if rows <= module.MAX_ROWS else []
    values = _values(rows, channels, columns, bits, group, zero, device)
    return Case(OPERATOR, name, _DTYPE, facts, values, variants, CUBLAS, priority, tunings)


def _tuning(rows: int, channels: int, columns: int, bits: int, group: int) -> Tuning:
    def prepare(given: Values) -> tuple[Any, ...]:
        return *given, None, None, None, given.x.new_empty(rows, channels)

    def run(*arguments: Any) -> None:
        module.run_kernel(*arguments[:-1], bits=bits, group=group, setting=arguments[-1])

    x = torch.empty(rows, columns, dtype=_DTYPE, device="meta")
    key = module.tuning_key(x, channels, bits, shared_scale(group, columns))
    default = module.default_setting(rows, channels, columns, bits, _DTYPE)
    found = module.candidates(rows, channels, columns, bits, _DTYPE)
    return Tuning("weight_only_linear", key, default, found, prepare, run)


def _dequantised(channels: int, columns: int, bits: int, group: int, device: torch.device) -> Case:
    """The weight alone, which products of many rows begin with."""
    settings: dict[str, Any] = {"bits": bits, "group": group, "columns": columns}

    def twin(packed: Tensor, scale: Tensor) -> Tensor:
        return reference.dequantise_weight(packed, scale, None, None, None, **settings, dtype=_DTYPE)

    def exact(given: Values) -> Tensor:
        stored = (given.packed, given.scale, None, None, None)
        return some_rows(reference.dequantise_weight(*stored, **settings, dtype=torch.float64))

    groups = reference.group_count(columns, group) * channels
    read = channels * columns * bits // 8 + 2 * groups
    cost = Cost(2 * channels * columns, read + 2 * channels * columns)
    variants = [
        Variant(
            f"dequantise_weight W{bits}",
            lambda given: given[1:3],
            lambda packed, scale: dequantise_weight(packed, scale, **settings),
            exact,
            cost,
            "float32",
            some_rows,
            ours=True,
        ),
        Variant("torch, eager", lambda given: given[1:3], twin, exact, cost, "float32", some_rows),
        Variant("torch, compiled", lambda given: given[1:3], twin, exact, cost, "float32", some_rows, compiled=True),
    ]
    name = f"weight W{bits} g{group} {channels} x {columns}"
    facts = {"n": channels, "k": columns, "bits": bits, "group": group}
    values = _values(1, channels, columns, bits, group, False, device)
    return Case("dequantise_weight", name, _DTYPE, facts, values, variants, "torch, compiled", 2)
