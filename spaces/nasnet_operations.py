"""Modules of NASNet's and DARTS's cells: the operations, a cell, and the network that stacks cells.

Sources: Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition", CVPR 2018; Liu et al.,
"DARTS: Differentiable Architecture Search", ICLR 2019. All convolutions are without bias and follow ReLU; batch norms
have NASNet's epsilon of 0.001. Strided windows are padded on both sides alike, as in DARTS; TensorFlow's padding, which
NASNet was trained with, is the same wherever the size is odd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NONE = "none"
NASNET = (
    "identity",
    "conv_1x7_7x1",
    "conv_1x3_3x1",
    "avg_pool_3x3",
    "max_pool_3x3",
    "max_pool_5x5",
    "max_pool_7x7",
    "conv_1x1",
    "conv_3x3",
    "dilated_conv_3x3",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
)
DARTS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "identity",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_sep_conv_3x3",
    "dil_sep_conv_5x5",
)
PRESETS = {"nasnet": NASNET, "darts": DARTS, "darts_none": (NONE, *DARTS)}
OPERATIONS = tuple(dict.fromkeys((NONE, *NASNET, *DARTS)))

INPUTS = 2
"""States 0 and 1 of a cell: the output of the cell before the last one, and of the last. Block ``i`` is ``2 + i``."""

Term = tuple[int, str]
"""An operation and the state it is applied to."""

Block = tuple[Term, Term]
"""The sum of two terms."""

_EPSILON = 1e-3


@dataclass(frozen=True)
class CellPlan:
    """A cell as it is built.

    Attributes:
        blocks: in order; a block uses earlier states only.
        outputs: the states that are concatenated.
        live: the states that the outputs depend on, themselves among them.
    """

    blocks: tuple[Block, ...]
    outputs: tuple[int, ...]
    live: frozenset[int]

    @property
    def uses(self) -> tuple[bool, bool]:
        """Whether the cell needs its two inputs. A live block of two ``none`` takes its size from the second."""
        empty = any(
            number in self.live and all(name == NONE for _, name in block)
            for number, block in enumerate(self.blocks, start=INPUTS)
        )
        return 0 in self.live, 1 in self.live or empty


@dataclass(frozen=True)
class Site:
    """A place for a cell in the network.

    Attributes:
        reduction: it halves the size.
        previous, current: what its states 0 and 1 are made of: 0 is the stem's output, ``i + 1`` that of site ``i``.
        width: channels of each of its states.
        raw: state 0 is taken as it is, without a projection, as in the first cell of NASNet's ImageNet stem.
    """

    reduction: bool
    previous: int
    current: int
    width: int
    raw: bool = False


def live_sites(sites: Sequence[Site], normal: tuple[bool, bool], reduction: tuple[bool, bool]) -> list[int]:
    """The sites that the last one depends on, in order.

    Args:
        sites: of the network.
        normal, reduction: whether such a cell depends on its states 0 and 1.
    """
    needed = {len(sites)}
    for i in reversed(range(len(sites))):
        if i + 1 in needed:
            uses = reduction if sites[i].reduction else normal
            needed |= {s for s, used in zip((sites[i].previous, sites[i].current), uses, strict=True) if used}
    return [i for i in range(len(sites)) if i + 1 in needed]


def operation(name: str, before: int, after: int, stride: int) -> nn.Module:
    """The module of an operation from ``before`` to ``after`` channels; ``none`` has no module."""
    if name == "identity":
        if stride > 1:
            return FactorizedReduction(before, after)
        return nn.Identity() if before == after else _conv(before, after, 1)
    kind, _, window = name.rpartition("_")
    size = int(window.partition("x")[0])
    if kind in ("avg_pool", "max_pool"):
        return _pool(kind, size, before, after, stride)
    if kind in ("conv_1x3", "conv_1x7"):
        row = nn.Conv2d(before, after, (1, size), (1, stride), (0, size // 2), bias=False)
        column = nn.Conv2d(after, after, (size, 1), (stride, 1), (size // 2, 0), bias=False)
        return nn.Sequential(nn.ReLU(), row, column, _norm(after))
    if kind in ("conv", "dilated_conv"):
        return _conv(before, after, size, stride, dilation=1 if kind == "conv" else 2)
    if kind == "sep_conv":
        return nn.Sequential(
            *_separable(before, after, size, stride, dilation=1), *_separable(after, after, size, 1, dilation=1)
        )
    if kind == "dil_sep_conv":
        return nn.Sequential(*_separable(before, after, size, stride, dilation=2))
    raise ValueError(f"no such operation: {name}")


class FactorizedReduction(nn.Module):
    """Halves the size: two strided 1x1 convolutions, one a pixel further, whose outputs are concatenated."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(before, after - after // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(before, after // 2, 1, stride=2, bias=False)
        self.norm = _norm(after)

    def forward(self, features: Tensor) -> Tensor:
        active = functional.relu(features)
        moved = functional.pad(active[:, :, 1:, 1:], (0, 1, 0, 1))
        reduced: Tensor = self.norm(torch.cat([self.even(active), self.odd(moved)], dim=1))
        return reduced


class Cell(nn.Module):
    """A cell: ``(n, c, h, w)`` and ``(n, c', h', w')`` to its concatenated output states.

    Args:
        plan: what it computes; what its outputs do not depend on gets no module.
        site: where it stands.
        channels: of the two inputs.
        shrink: the first input has twice the size of the second.
    """

    def __init__(self, plan: CellPlan, site: Site, channels: tuple[int, int], *, shrink: bool) -> None:
        super().__init__()
        self.plan = plan
        states = [channels[0] if site.raw else site.width, site.width]
        self.inputs = nn.ModuleList([nn.Identity(), nn.Identity()])
        if 0 in plan.live and not site.raw:
            make = FactorizedReduction if shrink else _projection
            self.inputs[0] = make(channels[0], site.width)
        if 1 in plan.live:
            self.inputs[1] = _projection(channels[1], site.width)
        self.terms = nn.ModuleList()
        for number, block in enumerate(plan.blocks, start=INPUTS):
            for state, name in block:
                absent = number not in plan.live or name == NONE
                before = states[state] if state < INPUTS else site.width
                stride = 2 if site.reduction and state < INPUTS else 1
                self.terms.append(nn.Identity() if absent else operation(name, before, site.width, stride))
        self.carried = nn.ModuleDict(
            {str(s): FactorizedReduction(states[s], site.width) for s in plan.outputs if s < INPUTS and site.reduction}
        )
        self.stride = 2 if site.reduction else 1
        self.width = site.width

    def forward(self, previous: Tensor | None, current: Tensor | None) -> Tensor:
        states: dict[int, Tensor] = {}
        for state, features in enumerate((previous, current)):
            if state in self.plan.live and features is not None:
                states[state] = self.inputs[state](features)
        for i, block in enumerate(self.plan.blocks):
            if INPUTS + i in self.plan.live:
                terms = [self.terms[2 * i + j](states[state]) for j, (state, name) in enumerate(block) if name != NONE]
                states[INPUTS + i] = sum(terms[1:], terms[0]) if terms else self._zeros(current)
        carried = {int(state): shrink(states[int(state)]) for state, shrink in self.carried.items()}
        return torch.cat([carried.get(state, states[state]) for state in self.plan.outputs], dim=1)

    def _zeros(self, current: Tensor | None) -> Tensor:
        """What a block of two ``none`` gives."""
        assert current is not None, "a cell of such a block needs its second input"
        height, width = (-(-size // self.stride) for size in current.shape[2:])
        return current.new_zeros(len(current), self.width, height, width)


class Network(nn.Module):
    """Stem, cells, ReLU, global average and classifier: images to ``(n, classes)`` logits.

    Args:
        stem: the first module.
        stem_channels: of its output.
        sites: places of the cells, in order.
        plans: of the normal and of the reduction cell.
        classes: of the output.
    """

    def __init__(
        self, stem: nn.Module, stem_channels: int, sites: Sequence[Site], plans: tuple[CellPlan, CellPlan], classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        channels, halvings = [stem_channels], [0]
        for site in sites:
            channels.append(len(plans[site.reduction].outputs) * site.width)
            halvings.append(halvings[site.current] + site.reduction)
        self.sites = {i: sites[i] for i in live_sites(sites, plans[0].uses, plans[1].uses)}
        self.cells = nn.ModuleDict()
        for i, site in self.sites.items():
            shrink = halvings[site.previous] < halvings[site.current]
            pair = (channels[site.previous], channels[site.current])
            self.cells[str(i)] = Cell(plans[site.reduction], site, pair, shrink=shrink)
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        last_use = {state: i for i, site in self.sites.items() for state in (site.previous, site.current)}
        outputs: dict[int, Tensor] = {0: self.stem(images)}
        features = outputs[0]
        for i, site in self.sites.items():
            features = self.cells[str(i)](outputs.get(site.previous), outputs.get(site.current))
            outputs[i + 1] = features
            for state in {site.previous, site.current}:
                if last_use[state] == i:
                    outputs.pop(state, None)
        logits: Tensor = self.classifier(functional.relu(features).mean(dim=(2, 3)))
        return logits


def stem_conv(in_channels: int, channels: int, *, strided: bool) -> nn.Sequential:
    """The 3x3 convolution before the cells; strided, it has no padding, as NASNet's for ImageNet."""
    conv = nn.Conv2d(in_channels, channels, 3, stride=2 if strided else 1, padding=0 if strided else 1, bias=False)
    return nn.Sequential(conv, _norm(channels))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def _conv(before: int, after: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (size // 2)
    conv = nn.Conv2d(before, after, size, stride=stride, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(nn.ReLU(), conv, _norm(after))


def _projection(before: int, after: int) -> nn.Sequential:
    return _conv(before, after, 1)


def _separable(before: int, after: int, size: int, stride: int, *, dilation: int) -> list[nn.Module]:
    padding = dilation * (size // 2)
    depthwise = nn.Conv2d(before, before, size, stride, padding, dilation, groups=before, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(before, after, 1, bias=False), _norm(after)]


def _pool(kind: str, size: int, before: int, after: int, stride: int) -> nn.Module:
    pool: nn.Module = nn.MaxPool2d(size, stride, size // 2)
    if kind == "avg_pool":
        pool = nn.AvgPool2d(size, stride, size // 2, count_include_pad=False)
    if before == after:
        return pool
    return nn.Sequential(pool, nn.Conv2d(before, after, 1, bias=False), _norm(after))
