"""FBNet's blocks as torch modules and as plain shapes with closed-form costs.

Source: Wu et al., "FBNet", CVPR 2019, figure 3 and table 2, in the reading of facebookresearch/mobile-vision.
A block is 1x1 conv (groups g, then a channel shuffle if g > 1), ReLU, k x k depthwise conv, ReLU, 1x1 conv (groups g),
each conv followed by a batch norm, and a residual where stride is 1 and the channels are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from archfront.errors import InputError

SKIP = "skip"
PATTERN = re.compile(r"k(?P<kernel>[1-9]\d?)_e(?P<expansion>[1-9]\d?)(?:_g(?P<groups>[1-9]\d?))?")


@dataclass(frozen=True)
class BlockKind:
    """What a block's name says: depthwise kernel, expansion, groups of the 1x1 convs; kernel 0 is ``skip``."""

    kernel: int
    expansion: int
    groups: int = 1

    @property
    def is_skip(self) -> bool:
        return self.kernel == 0


def parse_kind(name: str, field: str) -> BlockKind:
    """The kind behind ``k<K>_e<E>[_g<G>]`` or ``skip``.

    Raises:
        InputError: neither, or an even kernel (whose padding could not keep the shape).
    """
    if name == SKIP:
        return BlockKind(0, 1)
    match = PATTERN.fullmatch(name)
    if match is None:
        remedy = "Give 'skip' or k<kernel>_e<expansion>[_g<groups>], e.g. 'k5_e6' or 'k3_e1_g2'."
        raise InputError(field, name, "is not a block name", remedy)
    kernel = int(match["kernel"])
    if kernel % 2 == 0:
        raise InputError(field, name, "has an even kernel", "Give an odd one, e.g. 3 or 5.")
    return BlockKind(kernel, int(match["expansion"]), int(match["groups"] or 1))


@dataclass(frozen=True)
class BlockShape:
    """A block at its place: all that fixes its cost.

    Attributes:
        kind: kernel, expansion and groups.
        cin, cout: channels in and out.
        stride: of the depthwise conv, or of the 1x1 conv that stands for a skip between unlike shapes.
        height, width: of the input, in pixels.
        keep_expansion: whether an expansion of 1 still has its 1x1 conv, as in timm.
    """

    kind: BlockKind
    cin: int
    cout: int
    stride: int
    height: int
    width: int
    keep_expansion: bool = False

    @property
    def preserves(self) -> bool:
        return self.stride == 1 and self.cin == self.cout

    @property
    def is_identity(self) -> bool:
        return self.kind.is_skip and self.preserves

    @property
    def hidden(self) -> int:
        """Channels of the depthwise conv."""
        return self.cin * self.kind.expansion

    @property
    def expands(self) -> bool:
        return self.kind.expansion != 1 or self.keep_expansion

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output: same padding, so the ceiling of the division by the stride."""
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @cached_property
    def descriptor(self) -> str:
        k = self.kind
        name = (
            "skip"
            if k.is_skip
            else f"k{k.kernel}_e{k.expansion}_g{k.groups}" + "_keep" * (self.keep_expansion and k.expansion == 1)
        )
        return f"{name}|in={self.cin}x{self.height}x{self.width}|out={self.cout}|stride={self.stride}"

    @property
    def weights(self) -> int:
        """Conv weights, without batch norms."""
        if self.is_identity:
            return 0
        if self.kind.is_skip:
            return self.cin * self.cout
        groups, hidden = self.kind.groups, self.hidden
        expansion = self.cin * hidden // groups if self.expands else 0
        return expansion + self.kind.kernel**2 * hidden + hidden * self.cout // groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convs, for one input."""
        if self.is_identity:
            return 0
        height, width = self.output_size
        if self.kind.is_skip:
            return self.cin * self.cout * height * width
        groups, hidden = self.kind.groups, self.hidden
        expansion = self.cin * hidden // groups * self.height * self.width if self.expands else 0
        return expansion + (self.kind.kernel**2 * hidden + hidden * self.cout // groups) * height * width


class ConvNorm(nn.Sequential):
    """Conv without bias, batch norm, and a ReLU unless ``activate`` is false."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, activate: bool = True
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(cout),
        ]
        if activate:
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class ChannelShuffle(nn.Module):
    """Interleaves the groups, so that the next grouped conv sees channels of all of them: ``(n, c, h, w)`` kept."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        grouped = x.reshape(count, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).reshape(count, channels, height, width)


class FBNetBlock(nn.Module):
    """One searchable block: ``(n, cin, h, w)`` to ``(n, cout, h / stride, w / stride)``.

    In the paper's mode an expansion of 1 has no first conv. A grouped block then shuffles its input, so that its one
    grouped 1x1 conv still mixes channels that the previous block kept apart.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        kind = shape.kind
        layers: list[nn.Module] = []
        if shape.expands:
            layers.append(ConvNorm(shape.cin, shape.hidden, groups=kind.groups))
        if kind.groups > 1:
            layers.append(ChannelShuffle(kind.groups))
        layers.append(ConvNorm(shape.hidden, shape.hidden, kind.kernel, shape.stride, shape.hidden))
        layers.append(ConvNorm(shape.hidden, shape.cout, groups=kind.groups, activate=False))
        self.body = nn.Sequential(*layers)
        self.residual = shape.preserves

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class Head(nn.Module):
    """1x1 conv, global average pool, classifier: ``(n, cin, h, w)`` to ``(n, classes)``."""

    def __init__(self, cin: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = ConvNorm(cin, channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.conv(x).mean((2, 3)))
        return logits


def build_block(shape: BlockShape) -> nn.Module:
    """The module of a shape; a skip between unlike shapes is a strided 1x1 conv with a batch norm."""
    if shape.is_identity:
        return nn.Identity()
    if shape.kind.is_skip:
        return ConvNorm(shape.cin, shape.cout, 1, shape.stride, activate=False)
    return FBNetBlock(shape)


def initialise(model: nn.Module) -> nn.Module:
    """He initialisation by fan-out of convs, 0.01 normal of classifiers; draws from torch's global generator."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # A depthwise conv's fan-out counts the filters of one group, not of all.
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            with torch.no_grad():
                module.weight.normal_(0, (2 / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.normal_(0, 0.01)
                module.bias.zero_()
    return model
