"""An inverted residual with its batch norms folded: FBNet's block at inference, in plain torch, and its least cost.

Source: Sandler et al., "MobileNetV2", CVPR 2018; Wu et al., "FBNet", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archfront.kernels.reference.cost import Cost
from archfront.kernels.reference.depthwise import fold_batch_norm


def inverted_residual(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    *,
    stride: int,
    residual: bool,
) -> Tensor:
    """``project(relu(depthwise(relu(expand(x)))))``, each with its shift, plus x if ``residual``.

    Args:
        x: ``(n, c, h, w)``.
        expand: ``(e, c)``, with ``expand_shift`` ``(e,)``; neither for an expansion of 1, where e is c and the
            depthwise convolution takes x as it is.
        depthwise: ``(e, 1, k, k)``, k odd, padded so that stride 1 keeps the size; ``depthwise_shift`` ``(e,)``.
        project: ``(o, e)``; ``project_shift`` ``(o,)``.
        stride: of the depthwise convolution, in both directions.
        residual: whether to add x; needs stride 1 and o = c.

    Returns:
        ``(n, o, ceil(h / stride), ceil(w / stride))`` of x's dtype, computed in at least float32 and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if expand is not None and expand_shift is not None:
        y = nn.functional.conv2d(y, expand.to(wide)[:, :, None, None], expand_shift.to(wide)).relu()
    hidden, kernel = depthwise.shape[0], depthwise.shape[-1]
    shift = depthwise_shift.to(wide)
    y = nn.functional.conv2d(y, depthwise.to(wide), shift, stride, kernel // 2, groups=hidden).relu()
    y = nn.functional.conv2d(y, project.to(wide)[:, :, None, None], project_shift.to(wide))
    return (y + x.to(wide) if residual else y).to(x.dtype)


def fold_convolution(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The weight, of the convolution's shape and dtype, and the float32 shift by which both act in eval mode; detached.

    Raises:
        ValueError: the norm keeps no running statistics.
    """
    scale, shift = fold_batch_norm(norm)
    weight = convolution.weight.detach()
    if convolution.bias is not None:
        shift = (shift.double() + convolution.bias.detach().double() * scale.double()).float()
    return (weight.double() * scale.double()[:, None, None, None]).to(weight.dtype), shift


def inverted_residual_cost(
    shape: tuple[int, int, int, int],
    *,
    hidden: int,
    channels: int,
    kernel: int,
    stride: int,
    expand: bool,
    residual: bool,
    dtype: torch.dtype,
) -> Cost:
    """The least cost on an x of ``shape``: nothing of the hidden channels goes through memory or is computed twice.

    Taps that fall on the padding count, as is usual for convolutions.

    Args:
        shape: of x.
        hidden, channels: of the depthwise convolution and of the result.
        kernel, stride: of the depthwise convolution.
        expand: whether there is a first convolution.
        residual: whether x is added.
        dtype: of x, weights and result; shifts are float32.
    """
    count, channels_in, height, width = shape
    pixels = count * height * width
    out_pixels = count * -(-height // stride) * -(-width // stride)
    # After each convolution its shift, then the comparison.
    operations = out_pixels * (hidden * (2 * kernel**2 + 2) + channels * (2 * hidden + 1 + residual))
    weights, shifts = hidden * (kernel**2 + channels), hidden + channels
    if expand:
        operations += pixels * hidden * (2 * channels_in + 2)
        weights, shifts = weights + hidden * channels_in, shifts + hidden
    numbers = pixels * channels_in + out_pixels * channels + weights
    return Cost(operations, numbers * dtype.itemsize + shifts * torch.float32.itemsize)
