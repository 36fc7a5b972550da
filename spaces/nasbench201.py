"""NAS-Bench-201's cells: four nodes, an operation on each of six edges, stacked in a fixed macro-architecture.

Source: Dong and Yang, "NAS-Bench-201", ICLR 2020, in the reading of D-X-Y/NATS-Bench.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer, Population

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
NODES = 4
_NONE, _SKIP, _CONV1, _CONV3 = 0, 1, 2, 3
_ZERO = "#"


class NasBench201(ProductSpace):
    """Cells of four nodes; a genotype lists the operations of the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3.

    Args:
        channels: of the first stage; each further one has twice as many at half the resolution.
        cells: in each stage.
        stages: of cells, with a residual block of stride 2 between two.
        classes: of the output.
        in_channels, resolution: of the images.
        prune: treat the cells of one published class (6,466 for 15,625 cells), which compute the same, as one, and
            build the smallest of them. False builds every cell as it is written, as the published counts do.

    Raises:
        InputError: a number below 1, or more stages than the resolution has halves.
    """

    name: ClassVar[str] = "nasbench201"

    def __init__(
        self,
        *,
        channels: int = 16,
        cells: int = 5,
        stages: int = 3,
        classes: int = 10,
        in_channels: int = 3,
        resolution: int = 32,
        prune: bool = True,
    ) -> None:
        numbers = {"channels": channels, "cells": cells, "stages": stages, "classes": classes}
        for field, number in {**numbers, "in_channels": in_channels, "resolution": resolution}.items():
            if number < 1:
                raise InputError(f"space.{field}", number, "is not positive", "Give 1 or more.")
        if resolution < 2 ** (stages - 1):
            remedy = f"Give at most {resolution.bit_length()} at {resolution} pixels."
            raise InputError("space.stages", stages, "halves the images too often", remedy)
        super().__init__([Column(f"{i}-{j}", OPERATIONS) for i, j in EDGES])
        self.channels, self.cells, self.stages, self.classes = channels, cells, stages, classes
        self.in_channels, self.resolution, self.prune = in_channels, resolution, prune

    @property
    def config(self) -> Mapping[str, Any]:
        fields = ("channels", "cells", "stages", "classes", "in_channels", "resolution", "prune")
        return {field: getattr(self, field) for field in fields}

    def canonical(self, population: Population) -> Population:
        """The smallest cell of the same function: fewest 3x3 convolutions, then 1x1, then pools, then skips."""
        if not self.prune:
            return population
        representatives: Population = _representatives()[population.astype(np.int64) @ _PLACES]
        return representatives

    def build(self, genotype: Genotype) -> nn.Module:
        """The network: ``(n, in_channels, resolution, resolution)`` images to ``(n, classes)`` logits."""
        [operations] = self.canonical(self.from_json([genotype])).tolist()
        return Network(operations, self.in_channels, self.channels, self.cells, self.stages, self.classes)

    def describe(self, genotype: Genotype) -> list[Layer]:
        [operations] = self.canonical(self.from_json([genotype])).tolist()
        extents = {_NONE: 0.0, _SKIP: 0.05, _CONV1: 0.4, _CONV3: 1.0}
        shape = (self.channels, self.resolution, self.resolution)
        return [
            Layer(name=f"{i}-{j}", kind=OPERATIONS[op], shape=shape, size=extents.get(op, 0.15))
            for (i, j), op in zip(EDGES, operations, strict=True)
        ]

    def costs(self, population: Population) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Parameters and multiply-adds of one image in closed form, of the networks that ``build`` makes: ``(n,)``."""
        built = self.canonical(population)
        convs3, convs1 = (built == _CONV3).sum(axis=1), (built == _CONV1).sum(axis=1)
        params = macs = 0
        each = np.zeros((2, 2), dtype=np.int64)  # (3x3, 1x1) by (parameters, multiply-adds)
        size, width = self.resolution, self.channels
        params += self.in_channels * width * 9 + 2 * width
        macs += self.in_channels * width * 9 * size**2
        for stage in range(self.stages):
            if stage:
                size, before, width = -(-size // 2), width, 2 * width
                weights = before * width * 9 + width * width * 9 + before * width
                params += weights + 4 * width
                macs += weights * size**2
            for row, taps in enumerate((9, 1)):
                each[row] += self.cells * np.array([width * width * taps + 2 * width, width * width * taps * size**2])
        params += 2 * width + width * self.classes + self.classes
        macs += width * self.classes
        return (
            np.asarray(params + each[0, 0] * convs3 + each[1, 0] * convs1, dtype=np.int64),
            np.asarray(macs + each[0, 1] * convs3 + each[1, 1] * convs1, dtype=np.int64),
        )


_PLACES = np.array([len(OPERATIONS) ** (len(EDGES) - 1 - i) for i in range(len(EDGES))], dtype=np.int64)


def cell_function(operations: Sequence[int]) -> str:
    """What a cell computes, as an expression of its input: equal for cells of one published class.

    A node is the sum of its edges; a skip is its source, and what comes from nothing is nothing. It is the published
    expression to the letter, since the classes depend on it: a sum keeps count of the nothings in it (without them
    there would be 5,390 classes), and the order of the terms is that of their text.
    """
    nodes = ["0"]
    for node in range(1, NODES):
        terms = []
        for (source, target), operation in zip(EDGES, operations, strict=True):
            if target != node:
                continue
            if operation == _NONE or nodes[source] == _ZERO:
                terms.append(_ZERO)
            else:
                terms.append(nodes[source] if operation == _SKIP else f"({nodes[source]})@{OPERATIONS[operation]}")
        nodes.append("+".join(sorted(terms)))
    return nodes[-1]


@lru_cache(maxsize=1)
def _representatives() -> npt.NDArray[np.int16]:
    """``(15625, 6)``: for each cell, by its number in base five, the cheapest cell of the same function."""
    count = len(OPERATIONS) ** len(EDGES)
    every = (np.arange(count)[:, None] // _PLACES) % len(OPERATIONS)
    kinds = [(every == op).sum(axis=1) for op in (_CONV3, _CONV1, 4, _SKIP)]
    best: dict[str, int] = {}
    functions = [cell_function(cell) for cell in every.tolist()]
    for number in np.lexsort((np.arange(count), *reversed(kinds))).tolist():
        best.setdefault(functions[number], number)
    found: npt.NDArray[np.int16] = every[[best[function] for function in functions]].astype(np.int16)
    return found


class Network(nn.Module):
    """The macro-architecture around one cell."""

    def __init__(
        self, operations: Sequence[int], in_channels: int, channels: int, cells: int, stages: int, classes: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        layers: list[nn.Module] = []
        for stage in range(stages):
            if stage:
                layers.append(_Reduction(channels, 2 * channels))
                channels *= 2
            layers += [Cell(operations, channels) for _ in range(cells)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.layers(self.stem(images)))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class Cell(nn.Module):
    """Each node is the sum of what its edges make of earlier nodes; the last one is the output."""

    def __init__(self, operations: Sequence[int], channels: int) -> None:
        super().__init__()
        self._kinds = list(operations)
        self.edges = nn.ModuleList([_operation(kind, channels) for kind in operations])

    def forward(self, features: Tensor) -> Tensor:
        nodes = [features]
        for node in range(1, NODES):
            terms = [
                edge(nodes[source])
                for (source, target), kind, edge in zip(EDGES, self._kinds, self.edges, strict=True)
                if target == node and kind != _NONE
            ]
            total = terms[0] if terms else features * 0
            for term in terms[1:]:
                total = total + term
            nodes.append(total)
        return nodes[-1]


def _operation(kind: int, channels: int) -> nn.Module:
    if kind in (_CONV1, _CONV3):
        return _conv(channels, channels, 1 if kind == _CONV1 else 3)
    if OPERATIONS[kind] == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.Identity()


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(after))


class _Reduction(nn.Module):
    """The residual block between two stages."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(before, after, 3, stride=2), _conv(after, after, 3))
        pool = nn.AvgPool2d(2, stride=2, ceil_mode=True)
        self.shortcut = nn.Sequential(pool, nn.Conv2d(before, after, 1, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        total: Tensor = self.body(features) + self.shortcut(features)
        return total
