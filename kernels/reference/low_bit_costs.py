"""The least cost of the low-bit linear layers, for floors of their time. Rows are m, channels n, columns k."""

from __future__ import annotations

import torch

from archfront.kernels.packing import packed_shape
from archfront.kernels.reference.cost import Cost

_FLOAT = torch.float32.itemsize


def quantise_rows_cost(rows: int, columns: int, *, dtype: torch.dtype) -> Cost:
    """Absolute value, comparison, division and rounding of each number; 8-bit codes and a scale a row written."""
    return Cost(4 * rows * columns, rows * columns * (dtype.itemsize + 1) + rows * _FLOAT)


def layer_norm_quantise_cost(rows: int, columns: int, *, dtype: torch.dtype, bias: bool) -> Cost:
    """Of each number an operation for the mean, one to centre it, two for the variance, two factors and perhaps a bias,
    beside those of ``quantise_rows_cost``."""
    plain = quantise_rows_cost(rows, columns, dtype=dtype)
    parameters = columns * dtype.itemsize * (1 + bias)
    return Cost(plain.operations + (6 + bias) * rows * columns, plain.bytes + parameters)


def gelu_quantise_cost(rows: int, columns: int, *, dtype: torch.dtype) -> Cost:
    """Four multiplications and additions of the GELU, and its erf as one operation more."""
    plain = quantise_rows_cost(rows, columns, dtype=dtype)
    return Cost(plain.operations + 5 * rows * columns, plain.bytes)


def quantised_linear_cost(
    rows: int, channels: int, columns: int, *, bias: bool, out_dtype: torch.dtype, rank: int = 0, factor_bytes: int = 2
) -> Cost:
    """Of ``int8_linear`` and ``fp8_linear``: codes of a byte, a scale a row and a channel.

    Args:
        rows, channels, columns: of ``(m, k) @ (n, k).T``.
        bias: whether there is one; float32.
        out_dtype: of the result.
        rank: of the correction.
        factor_bytes: of a number of its factors.
    """
    operations = rows * channels * (2 * columns + 2 + bias) + 2 * rows * rank * (columns + channels)
    read = rows * columns + channels * columns + _FLOAT * (rows + channels * (1 + bias))
    return Cost(
        operations, read + _factors(channels, columns, rank, factor_bytes) + rows * channels * out_dtype.itemsize
    )


def weight_only_linear_cost(
    rows: int,
    channels: int,
    columns: int,
    *,
    bits: int,
    group: int,
    zero: bool,
    bias: bool,
    dtype: torch.dtype,
    rank: int = 0,
) -> Cost:
    """Two operations a weight and row; codes, scales and zero points read once.

    Args:
        rows, channels, columns: of ``(m, k) @ (n, k).T``.
        bits: of a code; padding of K to whole blocks counts as bytes.
        group: columns that share a scale, of ``dtype``.
        zero: whether there are zero points, of one byte.
        bias: whether there is one, of ``dtype``.
        dtype: of input and result.
        rank: of the correction, in ``dtype``.
    """
    slabs, _, span = packed_shape(channels, columns, bits)
    groups = -(-columns // group) * channels
    operations = rows * channels * (2 * columns + bias) + 2 * rows * rank * (columns + channels)
    read = slabs * channels * span + groups * (dtype.itemsize + zero) + channels * bias * dtype.itemsize
    read += _factors(channels, columns, rank, dtype.itemsize)
    return Cost(operations, read + rows * (columns + channels) * dtype.itemsize)


def _factors(channels: int, columns: int, rank: int, itemsize: int) -> int:
    return rank * (channels + columns) * itemsize
