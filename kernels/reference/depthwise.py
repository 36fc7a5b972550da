"""Depthwise convolution with a folded batch norm and a ReLU: the middle of FBNet's block at inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archfront.kernels.reference.cost import Cost


def depthwise_scale_shift(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, relu: bool
) -> Tensor:
    """``relu(conv(x) * scale + shift)``, padded so that stride 1 keeps the size; computed in at least float32.

    Args:
        x: ``(n, c, h, w)``.
        weight: ``(c, 1, k, k)`` with k odd, as of ``nn.Conv2d(c, c, k, groups=c)``.
        scale, shift: ``(c,)``, see ``fold_batch_norm``.
        stride: of the convolution, in both directions.
        relu: whether to clamp at zero; NaN stays NaN.

    Returns:
        ``(n, c, ceil(h / stride), ceil(w / stride))`` of x's dtype, rounded to it once, at the end.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels, _, kernel, _ = weight.shape
    y = nn.functional.conv2d(x.to(wide), weight.to(wide), None, stride, kernel // 2, groups=channels)
    y = y * scale.to(wide)[:, None, None] + shift.to(wide)[:, None, None]
    return (y.relu() if relu else y).to(x.dtype)


def fold_batch_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale and shift, both ``(c,)`` float32 and detached, by which ``norm`` acts in eval mode.

    Raises:
        ValueError: the norm keeps no running statistics, so what it does depends on the batch.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: track_running_stats=False cannot be folded; a norm with running statistics can")
    # In float64, since a small variance magnifies what rounding takes.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.float(), shift.float()


def depthwise_cost(
    shape: tuple[int, int, int, int], *, kernel: int, stride: int, relu: bool, dtype: torch.dtype
) -> Cost:
    """The least cost of ``depthwise_scale_shift`` on an x of ``shape`` and ``dtype``.

    Taps that fall on the padding count, as is usual for convolutions.
    """
    count, channels, height, width = shape
    read = count * channels * height * width
    written = count * channels * -(-height // stride) * -(-width // stride)
    # Two per tap, then the multiplication and addition of the norm, then the comparison.
    operations = written * (2 * kernel**2 + 2 + relu)
    scale_and_shift = 2 * channels * torch.float32.itemsize
    return Cost(operations, (read + channels * kernel**2 + written) * dtype.itemsize + scale_and_shift)
