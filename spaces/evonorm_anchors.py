"""Small image classifiers with open places for a normalisation-activation layer.

EvoNorm judges a layer inside ResNet-50, MobileNetV2 and EfficientNet-B0; these are their plans at a size for small
images and processors: three stages, each after the first with twice the channels at half the resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from archfront.errors import InputError

AnchorKind = Literal["resnet", "mobilenet", "efficientnet"]
STAGES = 3
LEAST_RESOLUTION = 2 ** (STAGES - 1)
_EXPANSION = 4


class NormFactory(Protocol):
    """Makes the layer for one place."""

    def __call__(self, channels: int, *, activation: bool = True, zero_init: bool = False) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Which network, and its size.

    Attributes:
        kind: ``resnet``, pre-activation residual blocks; ``mobilenet``, inverted residuals; ``efficientnet``,
            these with squeeze-and-excitation and 5x5 kernels.
        width: channels of the first stage.
        depth: blocks in a stage.

    Raises:
        InputError: an unknown kind, or a number below 1.
    """

    kind: AnchorKind = "resnet"
    width: int = 16
    depth: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("resnet", "mobilenet", "efficientnet"):
            raise InputError("anchor.kind", self.kind, "is unknown", "Give resnet, mobilenet or efficientnet.")
        for field in ("width", "depth"):
            if getattr(self, field) < 1:
                raise InputError(f"anchor.{field}", getattr(self, field), "is not positive", "Give 1 or more.")


class AnchorNetwork(nn.Module):
    """``(n, in_channels, r, r)`` images to ``(n, classes)`` logits.

    Args:
        anchor: the plan.
        norm: makes the layers under test.
        in_channels: of the images.
        classes: of the output.
    """

    def __init__(self, anchor: Anchor, norm: NormFactory, in_channels: int, classes: int) -> None:
        super().__init__()
        width = anchor.width
        inverted = anchor.kind != "resnet"
        layers: list[nn.Module] = [_conv(in_channels, width)]
        if inverted:
            layers.append(norm(width))
        before = width
        for stage in range(STAGES):
            for block in range(anchor.depth):
                stride = 2 if stage and not block else 1
                after = width * 2**stage
                if inverted:
                    layers.append(_Inverted(before, after, stride, norm, squeezed=anchor.kind == "efficientnet"))
                else:
                    layers.append(_PreActivation(before, after, stride, norm))
                before = after
        if inverted:
            layers.append(_conv(before, 2 * before, 1))
            before *= 2
        layers.append(norm(before))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


class _PreActivation(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.norm1 = norm(before)
        self.conv1 = _conv(before, after, stride=stride)
        self.norm2 = norm(after, zero_init=True)
        self.conv2 = _conv(after, after)
        self.shortcut = _conv(before, after, 1, stride=stride) if stride > 1 or before != after else None

    def forward(self, features: Tensor) -> Tensor:
        active = self.norm1(features)
        kept = features if self.shortcut is None else self.shortcut(active)
        total: Tensor = kept + self.conv2(self.norm2(self.conv1(active)))
        return total


class _Inverted(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: NormFactory, *, squeezed: bool) -> None:
        super().__init__()
        inner = before * _EXPANSION
        self.residual = stride == 1 and before == after
        self.body = nn.Sequential(
            _conv(before, inner, 1),
            norm(inner),
            _conv(inner, inner, 5 if squeezed else 3, stride=stride, depthwise=True),
            norm(inner),
            _Squeeze(inner, max(before // 4, 1)) if squeezed else nn.Identity(),
            _conv(inner, after, 1),
            norm(after, activation=False, zero_init=self.residual),
        )

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.body(features)
        return features + changed if self.residual else changed


class _Squeeze(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        pooled = features.mean(dim=(2, 3), keepdim=True)
        scaled: Tensor = features * self.up(nn.functional.silu(self.down(pooled))).sigmoid()
        return scaled


def _conv(before: int, after: int, kernel: int = 3, *, stride: int = 1, depthwise: bool = False) -> nn.Conv2d:
    groups = before if depthwise else 1
    conv = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    with torch.no_grad():
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv
