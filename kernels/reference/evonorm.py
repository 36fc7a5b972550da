"""EvoNorm's B0 and S0, normalisation and activation in one, at inference; and what they cost at least.

Source: Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archfront.kernels.reference.cost import Cost


def evonorm_s0(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    """``x * sigmoid(v * x) / sqrt(var + eps) * weight + bias`` with the variance of each image's group of channels.

    Args:
        x: ``(n, c, h, w)``.
        v, weight, bias: ``(c,)``.
        groups: of neighbouring channels; divides c.
        eps: added to the variance.

    Returns:
        ``(n, c, h, w)`` of x's dtype, computed in at least float32 and rounded once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count, channels, height, width = x.shape
    variance = _variance(wide.reshape(count, groups, channels // groups * height * width), 2)
    deviation = (variance + eps).sqrt().repeat_interleave(channels // groups, 1)[:, :, :, None]
    return _scaled(wide * (wide * _spread(v, wide)).sigmoid() / deviation, weight, bias).to(x.dtype)


def evonorm_b0(x: Tensor, v: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """``x / max(sqrt(running_var + eps), v * x + sqrt(var + eps)) * weight + bias`` with the variance of each plane.

    Args:
        x: ``(n, c, h, w)``.
        v, running_var, weight, bias: ``(c,)``; the running variance is the training batches'.
        eps: added to both variances.

    Returns:
        ``(n, c, h, w)`` of x's dtype, computed in at least float32 and rounded once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    instance = (_variance(wide, (2, 3)) + eps).sqrt()
    batch = (_spread(running_var, wide) + eps).sqrt()
    return _scaled(wide / torch.maximum(batch, wide * _spread(v, wide) + instance), weight, bias).to(x.dtype)


def evonorm_s0_cost(
    shape: tuple[int, int, int, int], *, dtype: torch.dtype, parameters: torch.dtype = torch.float32
) -> Cost:
    """Of each number four operations for the variance and five for the rest, the sigmoid being one; one read and one
    write, and three ``parameters`` a channel."""
    return _cost(shape, 9, 3, dtype, parameters)


def evonorm_b0_cost(
    shape: tuple[int, int, int, int], *, dtype: torch.dtype, parameters: torch.dtype = torch.float32
) -> Cost:
    """Of each number four operations for the variance and six for the rest; one read and one write, and four
    ``parameters`` a channel."""
    return _cost(shape, 10, 4, dtype, parameters)


def _cost(
    shape: tuple[int, int, int, int], operations: int, vectors: int, dtype: torch.dtype, parameters: torch.dtype
) -> Cost:
    count, channels, height, width = shape
    numbers = count * channels * height * width
    return Cost(operations * numbers, 2 * numbers * dtype.itemsize + vectors * channels * parameters.itemsize)


def _variance(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    # Not Tensor.var, which warns where there are no images.
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)


def _scaled(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return y * _spread(weight, y) + _spread(bias, y)


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """``(c,)`` for ``(n, c, h, w)``."""
    return vector.to(x.dtype)[:, None, None]
