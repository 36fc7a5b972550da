"""einspace's terminals as torch modules. Tensors are (batch, channels, height, width) or (batch, tokens, features)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from archfront.spaces.grammars.assembly import Function

if TYPE_CHECKING:
    from archfront.spaces.grammars.einspace import Features
    from archfront.spaces.grammars.grammar import Operation


class Linear(nn.Module):
    """A linear map of the channels of an image, which a 1x1 convolution is."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(incoming, outgoing, 1)

    def forward(self, features: Tensor) -> Tensor:
        mapped: Tensor = self.map(features)
        return mapped


class PatchLinear(nn.Module):
    """im2col and the linear map behind it as one convolution: (b, c, h, w) to (b, tokens, features)."""

    def __init__(self, incoming: int, outgoing: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        # Strided 1x1 convolutions of few channels corrupt memory in oneDNN's backward (its issue 6035); subsampling
        # is the same function.
        self.subsample = stride if kernel == 1 and not padding else 1
        self.conv = nn.Conv2d(incoming, outgoing, kernel, stride=stride // self.subsample, padding=padding)

    def forward(self, features: Tensor) -> Tensor:
        if self.subsample > 1:
            features = features[..., :: self.subsample, :: self.subsample]
        mapped: Tensor = self.conv(features)
        return mapped.flatten(2).transpose(1, 2)


class Positional(nn.Module):
    """A learnable offset for every element."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(*shape) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.offsets


def identity(_state: Features) -> nn.Module:
    return nn.Identity()


def linear(state: Features, width: Callable[[Features], int | None]) -> nn.Module:
    outgoing = width(state)
    assert outgoing is not None
    return Linear(state.shape[0], outgoing) if state.is_image else nn.Linear(state.shape[1], outgoing)


def norm(state: Features) -> nn.Module:
    return nn.BatchNorm2d(state.shape[0]) if state.is_image else nn.LayerNorm(state.shape[1])


def leaky_relu(_state: Features) -> nn.Module:
    return nn.LeakyReLU()


def softmax(_state: Features) -> nn.Module:
    return nn.Softmax(dim=-1)


def positional(state: Features) -> nn.Module:
    return Positional(state.shape)


def permute(_state: Features, axes: Sequence[int]) -> nn.Module:
    order = (0, *(axis + 1 for axis in axes))
    return Function("permute" + "".join(str(a + 1) for a in axes), lambda features: features.permute(order))


def im2col(_state: Features, kernel: int, stride: int, padding: int) -> nn.Module:
    def unfold(features: Tensor) -> Tensor:
        return functional.unfold(features, kernel, stride=stride, padding=padding).transpose(1, 2)

    return Function(f"im2col{kernel}x{kernel}s{stride}p{padding}", unfold)


def col2im(state: Features) -> nn.Module:
    height, width = state.fold or (1, 1)
    return Function("col2im", lambda features: features.transpose(1, 2).unflatten(2, (height, width)))


def clone(_state: Features, factor: int) -> nn.Module:
    return Function(f"clone{factor}", lambda features: [features] * factor)


def group(_state: Features, factor: int, axis: int) -> nn.Module:
    return Function(f"group{factor}d{axis}", lambda features: features.chunk(factor, dim=axis))


def dot(_states: tuple[Features, ...]) -> nn.Module:
    return Function("dot", lambda parts: parts[0] @ parts[1])


def scaled_dot(states: tuple[Features, ...]) -> nn.Module:
    scale = 1 / math.sqrt(states[0].shape[-1])
    return Function("scaled_dot", lambda parts: parts[0] @ parts[1] * scale)


def add(_states: tuple[Features, ...]) -> nn.Module:
    return Function("add", sum)


def cat(_states: tuple[Features, ...], axis: int) -> nn.Module:
    return Function(f"cat{axis}", lambda parts: torch.cat(parts, dim=axis))


def fuse(steps: Sequence[tuple[Operation, Features]]) -> list[nn.Module]:
    """Each operation's module; im2col and a linear map behind it are one convolution, which is the same function and
    needs no copy of each pixel for each place of the kernel."""
    kept = [(operation, state) for operation, state in steps if not operation.neutral]
    modules: list[nn.Module] = []
    at = 0
    while at < len(kept):
        operation, state = kept[at]
        following = kept[at + 1] if at + 1 < len(kept) else None
        if operation.name.startswith("im2col") and following is not None and following[0].name.startswith("linear"):
            after = following[0].infer(following[1])
            assert after is not None
            modules.append(PatchLinear(state.shape[0], after.shape[1], *_patch(operation.name)))
            at += 2
        else:
            modules.append(operation.build(state))
            at += 1
    return modules


def _patch(name: str) -> tuple[int, int, int]:
    """(kernel, stride, padding) of an im2col's name."""
    kernel, _, rest = name.removeprefix("im2col").partition("x")
    stride, _, padding = rest.partition("s")[2].partition("p")
    return int(kernel), int(stride), int(padding)
