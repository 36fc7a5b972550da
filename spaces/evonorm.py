"""EvoNorm's space: which tensor programme stands in the place of normalisation and activation.

Source: Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import nn

from archfront.errors import InputError
from archfront.spaces.evonorm_anchors import LEAST_RESOLUTION, Anchor, AnchorKind, AnchorNetwork
from archfront.spaces.evonorm_programmes import (
    BINARY,
    COMMUTATIVE,
    INITIAL,
    NAMED,
    OPERATIONS,
    Node,
    Programme,
    ProgrammeLayer,
)
from archfront.spaces.product import Column, ProductSpace, mix
from archfront.spaces.space import Genotype, Layer, Population

_FIRST = len(INITIAL)
_PARTS = 3
_COMMUTES = np.array([operation in COMMUTATIVE for operation in OPERATIONS])


class EvoNorm(ProductSpace):
    """Programmes of a fixed number of nodes; a genotype lists operation, first and second input of each node.

    A second input that the operation does not take is without meaning, as are nodes that do not reach the last one.

    Args:
        nodes: after the four initial values.
        anchor: the network that ``build`` puts a programme into: ``resnet``, ``mobilenet`` or ``efficientnet``.
        width: channels of its first stage.
        depth: blocks in each of its three stages.
        groups: of channels for the group moments, lowered until they divide the channels. Networks of few channels
            need fewer: with 32 groups of 32 channels a group moment is that of a single channel.
        epsilon: below the square root of moments. timm has 1e-3 in EvoNorm-B0 and 1e-5 in EvoNorm-S0.
        momentum: weight of a batch in the moving averages of batch moments.
        resolution, in_channels: of the images.
        classes: of the output.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "evonorm"

    def __init__(
        self,
        *,
        nodes: int = 10,
        anchor: AnchorKind = "resnet",
        width: int = 16,
        depth: int = 1,
        groups: int = 32,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        resolution: int = 32,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        for field, number in {"nodes": nodes, "groups": groups, "in_channels": in_channels, "classes": classes}.items():
            if number < 1:
                raise InputError(f"space.{field}", number, "is not positive", "Give 1 or more.")
        if resolution < LEAST_RESOLUTION:
            raise InputError("space.resolution", resolution, "is too small", f"Give {LEAST_RESOLUTION} or more.")
        if not 0 < epsilon < math.inf:
            raise InputError("space.epsilon", epsilon, "is not positive", "Give one such as 1e-5.")
        if not 0 < momentum <= 1:
            raise InputError("space.momentum", momentum, "is not a weight", "Give a number above 0, at most 1.")
        columns = []
        for i in range(nodes):
            inputs = (*INITIAL, *(f"n{j}" for j in range(i)))
            columns += [Column(f"n{i}.operation", OPERATIONS), Column(f"n{i}.first", inputs)]
            columns.append(Column(f"n{i}.second", inputs))
        super().__init__(columns)
        self.anchor = Anchor(kind=anchor, width=width, depth=depth)
        self.nodes, self.groups, self.epsilon, self.momentum = nodes, groups, epsilon, momentum
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes

    @property
    def config(self) -> Mapping[str, Any]:
        fields = ("nodes", "groups", "epsilon", "momentum", "resolution", "in_channels", "classes")
        network = {"anchor": self.anchor.kind, "width": self.anchor.width, "depth": self.anchor.depth}
        return {**network, **{field: getattr(self, field) for field in fields}}

    @property
    def known(self) -> Mapping[str, Genotype]:
        """Published layers that have no more nodes than the space: ``bn-relu``, ``evonorm-b0``, ``evonorm-s0``, ..."""
        return {name: self.genotype(p) for name, p in NAMED.items() if len(p.live().nodes) <= self.nodes}

    def genotype(self, programme: Programme) -> Genotype:
        """A programme as a canonical genotype.

        Raises:
            InputError: it has more nodes than this space.
        """
        live = programme.live().nodes
        unused = self.nodes - len(live)
        if unused < 0:
            raise InputError("space.nodes", self.nodes, "are too few", f"The programme has {len(live)} nodes.")
        row = np.zeros((1, _PARTS * self.nodes), dtype=np.int16)
        for i, node in enumerate(live, start=unused):
            inputs = [k if k < _FIRST else k + unused for k in (node.first, node.second or 0)]
            row[0, _PARTS * i : _PARTS * (i + 1)] = [OPERATIONS.index(node.operation), *inputs]
        [genotype] = self.to_json(self.canonical(row))
        return genotype

    def programme(self, genotype: Genotype) -> Programme:
        """The programme of a genotype, without dead nodes.

        Raises:
            InputError: the genotype is not of this space.
        """
        [row] = self.canonical(self.from_json([genotype])).tolist()
        nodes = []
        for i in range(self.nodes):
            operation, first, second = row[_PARTS * i : _PARTS * (i + 1)]
            nodes.append(Node(OPERATIONS[operation], first, second if operation < len(BINARY) else None))
        return Programme(tuple(nodes)).live()

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        """Programmes of all lengths: each has its own share of nodes whose first input is the node before.

        Where all inputs are drawn evenly, as ``sample`` does, the last node reaches about two of ten nodes.
        """
        population = self.sample(rng, count)
        chained = rng.random((count, self.nodes - 1)) < rng.random((count, 1))
        before = np.arange(_FIRST, _FIRST + self.nodes - 1)
        firsts = population[:, _PARTS + 1 :: _PARTS]
        population[:, _PARTS + 1 :: _PARTS] = np.where(chained, before, firsts)
        return population

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        """Operation and inputs of nodes are drawn anew: of one node, as in the paper, or of each by ``rate``."""
        children: Population = np.array(parents, dtype=np.int16)
        if not len(children):
            return children
        drawn = self.sample(rng, len(children))
        chosen = rng.random((len(children), self.nodes)) < (0.0 if rate is None else rate)
        chosen[np.arange(len(children)), rng.integers(self.nodes, size=len(children))] = True
        children = np.where(np.repeat(chosen, _PARTS, axis=1), drawn, children)
        same = np.flatnonzero((children == parents).all(axis=1))
        children[same] = super().mutate(rng, children[same])
        return children

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        """Each node whole from one of the parents."""
        take_first = rng.random((len(first), self.nodes)) < 0.5
        return np.where(np.repeat(take_first, _PARTS, axis=1), first, second)

    def canonical(self, population: Population) -> Population:
        """Equal nodes merged, dead ones removed, the others in an order of their own, at the end.

        The order is by height above the initial values, then by a 64-bit hash of the expression. Two expressions of
        one programme are taken for equal by that hash: once in 10^17 programmes by mistake.
        """
        count = len(population)
        rows = np.arange(count)
        operations, first, second = (population[:, part::_PARTS].astype(np.int64) for part in range(_PARTS))
        binary = operations < len(BINARY)
        second = np.where(binary, second, first)
        hashes, heights = _expressions(operations, first, second)
        # The first of equal values stands for all of them.
        values = np.argmax(hashes[:, :, None] == hashes[:, None, :], axis=2)
        first, second = (np.take_along_axis(values, inputs, axis=1) for inputs in (first, second))
        live = np.zeros(hashes.shape, dtype=bool)
        live[rows, values[:, -1]] = True
        for i in range(self.nodes - 1, -1, -1):
            for inputs in (first, second):
                live[rows, inputs[:, i]] |= live[:, _FIRST + i]
        alive = live[:, _FIRST:]
        order = np.lexsort((hashes[:, _FIRST:], np.where(alive, heights[:, _FIRST:], -1)), axis=1)
        places = np.tile(np.arange(_FIRST + self.nodes), (count, 1))
        np.put_along_axis(places, _FIRST + order, np.arange(_FIRST, _FIRST + self.nodes)[None], axis=1)
        operations, binary, alive = (np.take_along_axis(a, order, axis=1) for a in (operations, binary, alive))
        ordered = [np.take_along_axis(inputs, order, axis=1) for inputs in (first, second)]
        first, second = (np.take_along_axis(places, inputs, axis=1) for inputs in ordered)
        swapped = _COMMUTES[operations] & (first > second)
        first, second = np.where(swapped, second, first), np.where(swapped, first, second)
        columns = np.stack([operations, first, np.where(binary, second, 0)], axis=2)
        canonical: Population = np.where(alive[:, :, None], columns, 0).reshape(population.shape).astype(np.int16)
        return canonical

    def build(self, genotype: Genotype) -> nn.Module:
        """The anchor network: ``(n, in_channels, resolution, resolution)`` images to ``(n, classes)`` logits."""
        return self.build_anchor(genotype, self.anchor)

    def build_anchor(self, genotype: Genotype, anchor: Anchor, *, zero_init: bool = True) -> nn.Module:
        """Another anchor network around a genotype; ``zero_init=False``: no residual branch begins at 0."""
        programme = self.programme(genotype)
        allowed = zero_init

        def norm(channels: int, *, activation: bool = True, zero_init: bool = False) -> nn.Module:
            return ProgrammeLayer(
                programme,
                channels,
                activation=activation,
                zero_init=zero_init and allowed,
                groups=self.groups,
                epsilon=self.epsilon,
                momentum=self.momentum,
            )

        return AnchorNetwork(anchor, norm, self.in_channels, self.classes)

    def describe(self, genotype: Genotype) -> list[Layer]:
        programme = self.programme(genotype)
        shape = (self.anchor.width, self.resolution, self.resolution)
        names = [*INITIAL, *(f"n{i}" for i in range(len(programme.nodes)))]
        layers = []
        for i, node in enumerate(programme.nodes):
            inputs = [names[k] for k in (node.first, node.second) if k is not None]
            size = 1.0 if "_" in node.operation else 0.4
            kind = f"{node.operation}({', '.join(inputs)})"
            layers.append(Layer(name=f"n{i}", kind=kind, shape=shape, size=size, details={"inputs": inputs}))
        formula = {"formula": programme.expression()}
        return [*layers, Layer(name="affine", kind="gamma * value + beta", shape=shape, size=0.2, details=formula)]


def _expressions(
    operations: npt.NDArray[np.int64], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Hash and height of every value, the initial ones included, ``(n, 4 + nodes)``; numbering plays no part in them.

    Args:
        operations, first, second: ``(n, nodes)``; the second input of unary operations repeats the first.
    """
    count, nodes = operations.shape
    rows = np.arange(count)
    hashes = np.empty((count, _FIRST + nodes), dtype=np.uint64)
    hashes[:, :_FIRST] = mix(np.arange(1, _FIRST + 1, dtype=np.uint64))
    heights = np.zeros((count, _FIRST + nodes), dtype=np.int64)
    for i in range(nodes):
        one, other = hashes[rows, first[:, i]], hashes[rows, second[:, i]]
        swapped = _COMMUTES[operations[:, i]] & (one > other)
        one, other = np.where(swapped, other, one), np.where(swapped, one, other)
        kind = mix(operations[:, i].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        hashes[:, _FIRST + i] = mix(mix(one ^ kind) + mix(other + kind))
        heights[:, _FIRST + i] = 1 + np.maximum(heights[rows, first[:, i]], heights[rows, second[:, i]])
    return hashes, heights
