"""Operands of the low-bit linear operators, and their results in float64 from the same codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archfront.kernels.packing import code_range, pack, unpack


class Packed(NamedTuple):
    """What ``weight_only_linear`` takes after x, in order; ``(n, k)`` codes packed."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None


class Codes(NamedTuple):
    """What ``int8_linear`` takes, in order."""

    xq: Tensor
    x_scale: Tensor
    wq: Tensor
    w_scale: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None


def packed_operands(
    channels: int,
    columns: int,
    bits: int,
    group: int,
    *,
    zero: bool = False,
    rank: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Packed:
    low, high = code_range(bits, not zero)
    groups = -(-columns // group)
    return Packed(
        pack(torch.randint(low, high + 1, (channels, columns)), bits, signed=not zero),
        ((torch.rand(groups, channels) + 0.1) / 2**bits).to(dtype),
        torch.randint(0, 2**bits, (groups, channels), dtype=torch.uint8) if zero else None,
        torch.randn(channels).to(dtype),
        (torch.randn(rank, columns) / 10).to(dtype) if rank else None,
        torch.randn(channels, rank).to(dtype) if rank else None,
    )


def exact_weight(given: Packed, bits: int, group: int, columns: int) -> Tensor:
    """float64, correction included; written with loops in the place of broadcasting."""
    codes = unpack(given.packed, bits, columns, signed=given.zero is None).double()
    weight = torch.empty_like(codes)
    for column in range(columns):
        place = column // group
        middle = 0 if given.zero is None else given.zero[place].double()
        weight[:, column] = (codes[:, column] - middle) * given.scale[place].double()
    if given.down is not None and given.up is not None:
        weight += given.up.double() @ given.down.double()
    return weight


def exact_weight_only(x: Tensor, given: Packed, bits: int, group: int) -> Tensor:
    y = x.double() @ exact_weight(given, bits, group, x.shape[1]).T
    return y if given.bias is None else y + given.bias.double()


def int8_operands(rows: int, channels: int, columns: int, *, rank: int = 0, bias: bool = True) -> Codes:
    return Codes(
        torch.randint(-127, 128, (rows, columns), dtype=torch.int8),
        (torch.rand(rows) + 0.1) / 127,
        torch.randint(-127, 128, (channels, columns), dtype=torch.int8),
        (torch.rand(channels) + 0.1) / 127,
        torch.randn(channels) if bias else None,
        (torch.randn(rank, columns) / 10).half() if rank else None,
        torch.randn(channels, rank).half() if rank else None,
    )


def exact_int8(given: Codes, activation: str) -> Tensor:
    x = given.xq.double() * given.x_scale.double()[:, None]
    y = x @ (given.wq.double() * given.w_scale.double()[:, None]).T
    if given.down is not None and given.up is not None:
        y += x @ given.down.double().T @ given.up.double().T
    if given.bias is not None:
        y += given.bias.double()
    if activation == "gelu":
        return 0.5 * y * (1 + torch.erf(y * 0.5**0.5))
    return y.clamp_min(0) if activation == "relu" else y
