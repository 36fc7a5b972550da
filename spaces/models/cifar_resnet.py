"""The residual networks of the CIFAR-10 experiments of He et al. (2016), with parameter-free shortcuts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from archfront.errors import InputError
from archfront.spaces.models.source import ModelSource, Normalisation, positive

_WIDTHS = (16, 32, 64)


class CifarResNet(ModelSource):
    """ResNet-20, -32, -44, -56, -110 on 32x32 images; names of tensors as in akamaster/pytorch_resnet_cifar10.

    Args:
        depth: 6n + 2 layers.
        classes: of the output.
        weights: a checkpoint; fresh ones by default.
        seed: of fresh weights.
        normalisation: of the images, as its weights were trained with: ``data``, ``imagenet`` or ``half``.

    Raises:
        InputError: no such depth, or no such file.
    """

    name: ClassVar[str] = "cifar-resnet"
    resolution = 32
    in_channels = 3

    def __init__(
        self,
        *,
        depth: int = 20,
        classes: int = 10,
        weights: str | None = None,
        seed: int = 0,
        normalisation: Normalisation = "data",
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise InputError("model.depth", depth, "is not 6n + 2", "Give 8, 14, 20, 32, 44, 56 or 110.")
        positive(classes=classes)
        super().__init__(weights, seed, normalisation)
        self.depth, self.classes = depth, classes

    @property
    def config(self) -> Mapping[str, Any]:
        return {"depth": self.depth, "classes": self.classes}

    def architecture(self) -> nn.Module:
        return ResNet((self.depth - 2) // 6, self.classes)


class ResNet(nn.Module):
    """``(n, 3, 32, 32)`` images to ``(n, classes)`` logits; three stages of ``blocks`` blocks."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        incoming = _WIDTHS[0]
        for number, width in enumerate(_WIDTHS, start=1):
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(BasicBlock(incoming, width, stride=2 if i == 0 and number > 1 else 1))
                incoming = width
            self.add_module(f"layer{number}", stage)
        self.linear = nn.Linear(incoming, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.bn1(self.conv1(images)))
        for number in range(1, len(_WIDTHS) + 1):
            features = self.get_submodule(f"layer{number}")(features)
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; where the shape changes that takes every second place and pads the
    channels with zeros on both sides (option A of the paper)."""

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(incoming, outgoing, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outgoing)
        self.conv2 = nn.Conv2d(outgoing, outgoing, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outgoing)
        self.stride = stride
        self.padded = (outgoing - incoming) // 2

    def forward(self, features: Tensor) -> Tensor:
        changed = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(features)))))
        if self.stride > 1 or self.padded:
            features = functional.pad(features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *[self.padded] * 2))
        return functional.relu(changed + features)
