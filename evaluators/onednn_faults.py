"""A fault of oneDNN that corrupts memory, and the way around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_BLOCK = 16
"""Channels of oneDNN's widest block of float32 (AVX-512)."""


def avoid_narrow_strided_pointwise(model: nn.Module) -> nn.Module:
    """Let the model's strided 1x1 convolutions of few channels subsample first and then go on without a stride.

    That is the same function with the same parameters. With channels last, oneDNN's gradient of such a
    convolution's weights writes behind its workspace (oneDNN issue 6035; up to 3.14 at least): whole processes died of
    it, minutes later and elsewhere.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.in_channels // module.groups >= _BLOCK:
            continue
        strided = module.kernel_size == (1, 1) and module.stride != (1, 1)
        if strided and module.padding == (0, 0):
            down, right = module.stride
            module.register_forward_pre_hook(_Subsample(down, right))
            module.stride = (1, 1)
    return model


class _Subsample:
    """A hook that can be pickled and copied with its module."""

    def __init__(self, down: int, right: int) -> None:
        self.down = down
        self.right = right

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        features, *rest = inputs
        return (features[..., :: self.down, :: self.right], *rest)
