"""Linear layers whose weight, and perhaps input, are codes of few bits: what the kernels compute, in plain torch.

Int8 codes are symmetric, ``value = code * scale``. Weights of fewer bits have ``value = (code - zero) * scale`` with a
scale, and perhaps a zero point, for each group of neighbouring input columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

from archfront.kernels.packing import unpack

ACTIVATIONS = ("none", "relu", "gelu")
FP8 = torch.float8_e4m3fn

# Sums of so many products of int8 are whole numbers below 2**24, which float32 holds exactly in any order.
_EXACT_COLUMNS = 1024


def quantise_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Each row over its own largest absolute value: symmetric, rounded to the nearest, half to even.

    Args:
        x: ``(m, k)``.
        dtype: of the codes, int8 for -127 to 127 or float8_e4m3fn for -448 to 448.

    Returns:
        Codes ``(m, k)`` and scales ``(m,)`` float32, normal and so never 0: a row of zeros has codes 0. A row with
        NaN or infinity has that as its scale, so that nothing made of the row looks sound.
    """
    return _quantised(x.float(), dtype)


def layer_norm_quantise(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """``quantise_rows(layer_norm(x))`` with the norm in float32 and not rounded to x's dtype between.

    Args:
        x: ``(m, k)``.
        weight, bias: ``(k,)``.
        eps: added to the variance.
    """
    wide = x.float()
    centred = wide - wide.mean(1, keepdim=True)
    y = centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt() * weight.float()
    return _quantised(y if bias is None else y + bias.float(), torch.int8)


def gelu_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """``quantise_rows(gelu(x))`` with the exact GELU, of erf, in float32 and not rounded to x's dtype between."""
    return _quantised(functional.gelu(x.float()), torch.int8)


def int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``activation(x @ w.T + (x @ down.T) @ up.T + bias)`` of ``x = xq * x_scale`` and ``w = wq * w_scale``.

    The sums of codes are exact, in int32; the rest is in float32, rounded to ``out_dtype`` once.

    Source of the correction: Yao et al., "ZeroQuant-V2", 2023 (LoRC).

    Args:
        xq: ``(m, k)`` int8, with ``x_scale`` ``(m,)``.
        wq: ``(n, k)`` int8, with ``w_scale`` ``(n,)``.
        bias: ``(n,)``.
        down, up: ``(r, k)`` and ``(n, r)``, both or neither.
        activation: ``none``, ``relu`` or ``gelu``, that of erf.
        out_dtype: of the result ``(m, n)``.
    """
    total = torch.zeros(len(xq), len(wq), dtype=torch.int32, device=xq.device)
    for start in range(0, xq.shape[1], _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        total += (xq[:, columns].float() @ wq[:, columns].float().T).to(torch.int32)
    y = total.float() * x_scale.float()[:, None] * w_scale.float()
    if down is not None and up is not None:
        y = y + (xq.float() @ down.float().T * x_scale.float()[:, None]) @ up.float().T
    return _finished(y, bias, activation).to(out_dtype)


def fp8_linear(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype
) -> Tensor:
    """``x @ w.T + bias`` of ``x = xq * x_scale`` and ``w = wq * w_scale``, in float32, rounded once.

    Args:
        xq: ``(m, k)`` float8_e4m3fn, with ``x_scale`` ``(m,)``.
        wq: ``(n, k)`` float8_e4m3fn, with ``w_scale`` ``(n,)``.
        bias: ``(n,)``.
        out_dtype: of the result ``(m, n)``.
    """
    y = xq.float() @ wq.float().T * x_scale.float()[:, None] * w_scale.float()
    return _finished(y, bias, "none").to(out_dtype)


def dequantise_weight(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``(n, columns)`` behind packed codes: ``(code - zero) * scale + up @ down``, in float32 at least.

    Args:
        packed: uint8, as ``packing.pack`` makes it: of unsigned codes if there are zero points, else of signed ones.
        scale: ``(groups, n)``, a row for each ``group`` columns; the last group may be shorter.
        zero: ``(groups, n)``, the code of 0.
        down, up: ``(r, columns)`` and ``(n, r)``, both or neither.
        bits: 8, 4, 3 or 2.
        group: columns that share a scale.
        columns: of the weight.
        dtype: of the result.
    """
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack(packed, bits, columns, signed=zero is None).to(wide)
    if zero is not None:
        codes = codes - _spread(zero.to(wide), group, columns)
    weight = codes * _spread(scale.to(wide), group, columns)
    if down is not None and up is not None:
        weight = weight + up.to(wide) @ down.to(wide)
    return weight.to(dtype)


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """``x @ w.T + (x @ down.T) @ up.T + bias`` with w of packed codes, in float32 at least, rounded once.

    Source of the correction: Yao et al., "ZeroQuant-V2", 2023 (LoRC).

    Args:
        x: ``(m, k)``; the result ``(m, n)`` has its dtype.
        bias: ``(n,)``.
        packed, scale, zero, down, up, bits, group: see ``dequantise_weight``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    stored = (packed, scale, zero, None, None)
    weight = dequantise_weight(*stored, bits=bits, group=group, columns=x.shape[1], dtype=wide)
    y = x.to(wide) @ weight.T
    if down is not None and up is not None:
        y = y + (x.to(wide) @ down.to(wide).T) @ up.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # The most of no columns is that of a zero.
    most = functional.pad(x.abs(), (0, 1)).amax(1)
    scale = (most / largest).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (x / scale[:, None]).nan_to_num(nan=0.0).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def _finished(y: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if bias is not None:
        y = y + bias.float()
    if activation == "gelu":
        return functional.gelu(y)
    return y.relu() if activation == "relu" else y


def _spread(values: Tensor, group: int, columns: int) -> Tensor:
    """``(groups, n)`` as ``(n, columns)``."""
    return values.T.repeat_interleave(min(group, columns), 1)[:, :columns]


def group_count(columns: int, group: int) -> int:
    """Groups of a row; the last may be shorter."""
    return math.ceil(columns / group)
