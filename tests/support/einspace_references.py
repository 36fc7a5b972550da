"""einspace's seeds written by hand as torch modules, to compare derivations with, and the copying of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = (64, 128, 256, 512)


def _conv(incoming: int, outgoing: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(incoming, outgoing, kernel, stride=stride, padding=kernel // 2)


class BasicBlock(nn.Module):
    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        same = incoming == outgoing and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(
            _conv(incoming, outgoing, 1, stride), nn.BatchNorm2d(outgoing)
        )  # fmt: skip
        self.body = nn.Sequential(
            _conv(incoming, outgoing, 3, stride), nn.BatchNorm2d(outgoing), nn.LeakyReLU(),
            _conv(outgoing, outgoing), nn.BatchNorm2d(outgoing),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return nn.functional.leaky_relu(self.body(x) + shortcut)


def resnet18(*, strided: bool) -> nn.Module:
    """``strided``: a convolution of stride 2 behind the stem."""
    layers: list[nn.Module] = [_conv(3, 64), nn.BatchNorm2d(64), nn.LeakyReLU()]
    if strided:
        layers.append(_conv(64, 64, 3, 2))
    before = 64
    for i, width in enumerate(STAGES):
        layers += [BasicBlock(before, width, 2 if i else 1), BasicBlock(width, width, 1)]
        before = width
    return nn.Sequential(*layers)


class WideBlock(nn.Module):
    """Pre-activation; where the width changes, the shortcut reads the activation too."""

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(incoming), nn.LeakyReLU())
        self.shortcut = _conv(incoming, outgoing, 1, stride) if incoming != outgoing else None
        self.body = nn.Sequential(
            _conv(incoming, outgoing, 3, stride), nn.BatchNorm2d(outgoing), nn.LeakyReLU(), _conv(outgoing, outgoing)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.first(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.body(activated)


def wide_resnet16_4() -> nn.Module:
    layers: list[nn.Module] = [_conv(3, 16)]
    before = 16
    for i, width in enumerate((64, 128, 256)):
        layers += [WideBlock(before, width, 2 if i else 1), WideBlock(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.BatchNorm2d(before), nn.LeakyReLU())


class Patches(nn.Module):
    """4x4 patches, embedded, with learnable positions: (b, 3, 32, 32) to (b, 64, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 512, 4, stride=4)
        # A list: a module's own parameters would come before its children's.
        self.positions = nn.ParameterList([torch.randn(64, 512)])

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2) + self.positions[0]


class Attention(nn.Module):
    def __init__(self, width: int = 512, heads: int = 4, size: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # In the order of a derivation: query, key, value of each head.
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(width, size) for _ in range(3)) for _ in range(heads))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            torch.stack([head[i](normed) for head in self.heads], dim=1)  # type: ignore[index]
            for i in range(3)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.leaky_relu(self.up(self.norm(x))))


def transformer() -> nn.Module:
    return nn.Sequential(Patches(), *(m for _ in range(4) for m in (Attention(), Feedforward())))


class MixerLayer(nn.Module):
    def __init__(self, tokens: int = 64, width: int = 512) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, tokens * 4), nn.LeakyReLU(), nn.Linear(tokens * 4, tokens))
        self.features = nn.Sequential(nn.Linear(width, width // 2), nn.LeakyReLU(), nn.Linear(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.features(mixed)


def mixer() -> nn.Module:
    return nn.Sequential(Patches(), *(MixerLayer() for _ in range(8)))


REFERENCES = {
    "resnet18": lambda: resnet18(strided=False),
    "resnet18_no_maxpool": lambda: resnet18(strided=True),
    "wrn16_4": wide_resnet16_4,
    "transformer": transformer,
    "mixer": mixer,
}


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give the tensors of one model to another that holds as many of the same sizes, in the order of its modules."""
    given, taken = list(source.parameters()), list(target.parameters())
    assert [p.numel() for p in given] == [p.numel() for p in taken]
    with torch.no_grad():
        for a, b in zip(given, taken, strict=True):
            b.copy_(a.reshape(b.shape))
