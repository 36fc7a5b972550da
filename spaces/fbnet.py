"""The FBNet space, and its preset for images of 16 x 16 pixels.

Source: Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR
2019; block order of HW-NAS-Bench (Li et al., ICLR 2021). A genotype is the list of its layers' block names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from archfront.errors import InputError
from archfront.spaces.blocks import NO_BLOCK, BlockSpec
from archfront.spaces.fbnet_blocks import (
    SKIP,
    BlockKind,
    BlockShape,
    ConvNorm,
    Head,
    build_block,
    initialise,
    parse_kind,
)
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer, Population

BLOCKS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", SKIP)
STEM_KERNEL = 3
PUBLISHED = {
    "fbnet-a": (
        "skip | k3_e3 k3_e1 skip skip | k5_e6 k3_e3 k5_e1 k3_e3 | k5_e6 k5_e3 k5_e1_g2 k5_e6 | k3_e6 k5_e1_g2 k5_e3 "
        "k3_e1_g2 | k5_e6 k5_e6 k5_e3 k5_e6 | k5_e6"
    ),
    "fbnet-b": (
        "k3_e1 | k3_e6 k5_e1 k3_e1 k3_e1 | k5_e6 k5_e3 k3_e6 k5_e6 | k5_e6 k5_e6 skip k5_e3 | k5_e6 k3_e1 k5_e1 "
        "k5_e3 | k5_e6 k5_e1 k5_e6 k5_e6 | k3_e6"
    ),
    "fbnet-c": (
        "k3_e1 | k3_e6 skip k3_e1 k3_e1 | k5_e6 k5_e3 k5_e6 k3_e6 | k5_e6 k5_e3 k5_e6 k5_e6 | k5_e6 k5_e6 k5_e6 "
        "k5_e3 | k5_e6 k5_e6 k5_e6 k5_e6 | k3_e6"
    ),
}
"""The networks that the paper found; stages stand between bars."""


class FBNet(ProductSpace):
    """Chains of inverted residual blocks, one choice of kernel, expansion and groups for each layer.

    Args:
        resolution: height and width of the input in pixels.
        in_channels: channels of the input.
        classes: outputs of the classifier.
        width: multiplies the channels of stem and stages, rounded to a multiple of 8 (4 below 32 channels); the head
            keeps its own.
        macro: stages ``[channels, blocks, stride]``; the stride is that of a stage's first block.
        blocks: names of the choices, ``k<K>_e<E>[_g<G>]`` or ``skip``.
        stem: ``[channels, stride]`` of the 3x3 conv before the first stage.
        head_channels: of the 1x1 conv before the pool.
        keep_expansion: keep the 1x1 conv of blocks with expansion 1, as timm does; the paper drops it.
        mismatched_skip: where a skip would join unlike shapes, use a strided 1x1 ``conv``, or ``forbid`` it.

    Raises:
        InputError: an argument cannot be used; the message names it.
    """

    name: ClassVar[str] = "fbnet"

    def __init__(
        self,
        *,
        resolution: int = 224,
        in_channels: int = 3,
        classes: int = 1000,
        width: float = 1.0,
        macro: list[list[int]] | None = None,
        blocks: list[str] | None = None,
        stem: list[int] | None = None,
        head_channels: int = 1984,
        keep_expansion: bool = False,
        mismatched_skip: Literal["conv", "forbid"] = "conv",
    ) -> None:
        default = [[16, 1, 1], [24, 4, 2], [32, 4, 2], [64, 4, 2], [112, 4, 1], [184, 4, 2], [352, 1, 1]]
        self.resolution = _positive("resolution", resolution)
        self.in_channels = _positive("in_channels", in_channels)
        self.classes = _positive("classes", classes)
        self.width = float(width)
        if not 0 < self.width <= 16:
            raise InputError("space.width", width, "is out of range", "Give a number above 0, at most 16.")
        stages = default if macro is None else macro
        self.macro = [_row("macro", row, 3, "[channels, blocks, stride]") for row in stages]
        if not self.macro:
            raise InputError("space.macro", macro, "has no stage", "Give rows [channels, blocks, stride].")
        self.stem = _row("stem", [16, 2] if stem is None else stem, 2, "[channels, stride]")
        self.head_channels = _positive("head_channels", head_channels)
        self.blocks = list(BLOCKS if blocks is None else blocks)
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise InputError("space.blocks", self.blocks, "is empty or repeats a name", "Give each block once.")
        self.keep_expansion = bool(keep_expansion)
        if mismatched_skip not in ("conv", "forbid"):
            raise InputError("space.mismatched_skip", mismatched_skip, "is unknown", "Give 'conv' or 'forbid'.")
        self.mismatched_skip = mismatched_skip
        self._kinds = {name: parse_kind(name, f"space.blocks[{i}]") for i, name in enumerate(self.blocks)}
        self._layers = self._layer_shapes()
        super().__init__([self._column(position) for position in range(len(self._layers))])
        self._check_groups()
        self._runs = self._find_runs()
        self._skip = self.blocks.index(SKIP) if SKIP in self.blocks else None

    @property
    def config(self) -> Mapping[str, Any]:
        return {
            "resolution": self.resolution,
            "in_channels": self.in_channels,
            "classes": self.classes,
            "width": self.width,
            "macro": self.macro,
            "blocks": self.blocks,
            "stem": self.stem,
            "head_channels": self.head_channels,
            "keep_expansion": self.keep_expansion,
            "mismatched_skip": self.mismatched_skip,
        }

    @property
    def known(self) -> Mapping[str, Genotype]:
        """The paper's networks ``fbnet-a``, ``fbnet-b`` and ``fbnet-c``, where the space has their layers."""
        return self.members({name: text.replace("|", " ").split() for name, text in PUBLISHED.items()})

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        """Besides its preferences each genotype has a depth of its own, uniform from none to all layers: depth moves a
        network's latency more than any choice of block does, and uniform choices give hardly a shallow one."""
        population = super().sample_spread(rng, count)
        if self._skip is None:
            return population
        dropped = rng.random(population.shape) > rng.random((count, 1))
        can_skip = np.array([SKIP in column.choices for column in self.columns])
        population[dropped & can_skip] = self._skip
        return population

    def canonical(self, population: Population) -> Population:
        """Skips moved to the end of their run.

        Within a maximal run of consecutive shape-preserving layers a skip is the identity, so only the sequence of
        the other blocks matters.
        """
        result: Population = np.array(population, dtype=np.int16)
        if self._skip is None:
            return result
        for start, stop in self._runs:
            # Odd-even transposition: each pass moves every skip one place back where a block follows it.
            for sorted_to in range(stop - 1, start, -1):
                for left in range(start, sorted_to):
                    first, second = result[:, left].copy(), result[:, left + 1]
                    swap = (first == self._skip) & (second != self._skip)
                    result[:, left] = np.where(swap, second, first)
                    result[:, left + 1] = np.where(swap, first, second)
        return result

    def build(self, genotype: Genotype) -> nn.Module:
        """The network: ``(n, in_channels, resolution, resolution)`` images to ``(n, classes)`` logits.

        Identity skips leave no module, so equal canonical forms give equal modules, drawn weights included.
        """
        shapes = self.block_shapes(genotype)
        layers = [build_block(shape) for shape in shapes if not shape.is_identity]
        return initialise(nn.Sequential(self._stem(), *layers, self._head()))

    def describe(self, genotype: Genotype) -> list[Layer]:
        shapes = self.block_shapes(genotype)
        largest = max(shape.macs for shapes in self._table for shape in shapes) or 1
        names = [f"stage{stage}.{i}" for stage, (_, count, _) in enumerate(self.macro, 1) for i in range(count)]
        size = self._stem_size
        rows = [Layer(name="stem", kind="conv3x3", shape=(self._stem_channels, size, size), size=0.2)]
        for name, shape, choice in zip(names, shapes, genotype, strict=True):
            kind = "conv1x1" if shape.kind.is_skip and not shape.is_identity else choice
            extent = 0.0 if shape.is_identity else max(0.05, shape.macs / largest)
            details = {"macs": shape.macs, "weights": shape.weights, "stride": shape.stride}
            rows.append(
                Layer(name=name, kind=kind, shape=(shape.cout, *shape.output_size), size=extent, details=details)
            )
        head = Layer(name="head", kind="conv1x1", shape=(self.head_channels, *shapes[-1].output_size), size=0.3)
        return [*rows, head, Layer(name="classifier", kind="pool+linear", shape=(self.classes,), size=0.1)]

    def block_shapes(self, genotype: Genotype) -> list[BlockShape]:
        """The searchable layers of a genotype, each at its place, stem and head not among them.

        Raises:
            InputError: the genotype is not of this space.
        """
        indices = self.from_json([genotype])[0]
        return [self._table[position][index] for position, index in enumerate(indices)]

    def block_catalogue(self) -> Sequence[BlockSpec]:
        """See ``BlockSpace``; stem and head are the first two."""
        return self._catalogue

    def block_indices(self, population: Population) -> npt.NDArray[np.int64]:
        """See ``BlockSpace``."""
        count = len(population)
        columns = [self._block_numbers[i][population[:, i]] for i in range(len(self.columns))]
        return np.stack([np.zeros(count, np.int64), *columns, np.ones(count, np.int64)], axis=1)

    def build_block(self, descriptor: str) -> nn.Module:
        """See ``BlockSpace``."""
        stem, head = (spec.descriptor for spec in self._catalogue[:2])
        if descriptor == stem:
            return initialise(self._stem())
        if descriptor == head:
            return initialise(self._head())
        for row in self._table:
            for shape in row:
                if shape.descriptor == descriptor:
                    return initialise(build_block(shape))
        raise InputError("descriptor", descriptor, "is not a block of this space", "Take one of block_catalogue().")

    # The macro-architecture.

    def _scaled(self, channels: int) -> int:
        if self.width == 1:
            return channels
        wanted = channels * self.width
        step = 8 if wanted >= 32 else 4
        return max(step, int(wanted + step / 2) // step * step)

    @property
    def _stem_channels(self) -> int:
        return self._scaled(self.stem[0])

    @property
    def _stem_size(self) -> int:
        return -(-self.resolution // self.stem[1])

    def _layer_shapes(self) -> list[BlockShape]:
        """Each searchable layer with a place holder for its kind."""
        layers, cin, size = [], self._stem_channels, self._stem_size
        for channels, count, stride in self.macro:
            for i in range(count):
                cout, step = self._scaled(channels), stride if i == 0 else 1
                layers.append(BlockShape(BlockKind(0, 1), cin, cout, step, size, size, self.keep_expansion))
                cin, size = cout, -(-size // step)
        return layers

    def _column(self, position: int) -> Column:
        forbid = self.mismatched_skip == "forbid" and not self._layers[position].preserves
        return Column(f"layer{position}", tuple(name for name in self.blocks if not (forbid and name == SKIP)))

    def _check_groups(self) -> None:
        for position, row in enumerate(self._table):
            for shape in row:
                groups = shape.kind.groups
                if shape.cin % groups or shape.cout % groups:
                    problem = f"has {groups} groups, which do not divide {shape.cin} -> {shape.cout} channels"
                    remedy = f"Change the macro's channels at layer {position}, the width, or drop the block."
                    raise InputError("space.blocks", shape.descriptor.split("|")[0], problem, remedy)

    def _find_runs(self) -> list[tuple[int, int]]:
        """Bounds of the maximal runs of at least two consecutive shape-preserving layers."""
        breaks = [-1, *(i for i, layer in enumerate(self._layers) if not layer.preserves), len(self._layers)]
        return [(left + 1, right) for left, right in pairwise(breaks) if right - left > 2]

    @cached_property
    def _table(self) -> list[list[BlockShape]]:
        """The shape of each choice of each column."""
        return [
            [
                BlockShape(self._kinds[c], at.cin, at.cout, at.stride, at.height, at.width, at.keep_expansion)
                for c in column.choices
            ]
            for at, column in zip(self._layers, self.columns, strict=True)
        ]

    @cached_property
    def _catalogue(self) -> list[BlockSpec]:
        last = self._layers[-1]
        size = self.resolution
        stem = (self._stem_channels, self._stem_size, self._stem_size)
        features = (last.cout, *last.output_size)
        stem_name = f"stem|in={self.in_channels}x{size}x{size}|out={stem[0]}|stride={self.stem[1]}"
        head_name = f"head|in={features[0]}x{features[1]}x{features[2]}|out={self.head_channels}|classes={self.classes}"
        specs = {
            stem_name: BlockSpec(descriptor=stem_name, input_shape=(self.in_channels, size, size), output_shape=stem),
            head_name: BlockSpec(descriptor=head_name, input_shape=features, output_shape=(self.classes,)),
        }
        for shape in (shape for row in self._table for shape in row if not shape.is_identity):
            specs[shape.descriptor] = BlockSpec(
                descriptor=shape.descriptor,
                input_shape=(shape.cin, shape.height, shape.width),
                output_shape=(shape.cout, *shape.output_size),
            )
        return list(specs.values())

    @cached_property
    def _block_numbers(self) -> list[npt.NDArray[np.int64]]:
        """The catalogue's index of each choice of each column."""
        numbers = {spec.descriptor: i for i, spec in enumerate(self._catalogue)}
        return [
            np.array([NO_BLOCK if shape.is_identity else numbers[shape.descriptor] for shape in row], dtype=np.int64)
            for row in self._table
        ]

    def _stem(self) -> nn.Module:
        return ConvNorm(self.in_channels, self._stem_channels, STEM_KERNEL, self.stem[1])

    def _head(self) -> nn.Module:
        return Head(self._layers[-1].cout, self.head_channels, self.classes)


class FBNetTiny(FBNet):
    """FBNet at the size of scikit-learn's digits: all nine blocks, three stages at 8, 4 and 4 pixels.

    Args:
        layers: searchable layers, spread over the three stages; not together with ``macro``.

    The other arguments are those of ``FBNet`` with defaults for 16 x 16 images of one channel and ten classes. The
    stem halves the resolution, since 8 x 8 digits scaled up to 16 x 16 hold no finer detail.
    """

    name: ClassVar[str] = "fbnet-tiny"

    def __init__(
        self,
        *,
        resolution: int = 16,
        in_channels: int = 1,
        classes: int = 10,
        layers: int | None = None,
        width: float = 1.0,
        macro: list[list[int]] | None = None,
        blocks: list[str] | None = None,
        stem: list[int] | None = None,
        head_channels: int = 128,
        keep_expansion: bool = False,
        mismatched_skip: Literal["conv", "forbid"] = "conv",
    ) -> None:
        if layers is not None and macro is not None:
            raise InputError("space.layers", layers, "is given beside macro", "Give one of the two.")
        super().__init__(
            resolution=resolution,
            in_channels=in_channels,
            classes=classes,
            width=width,
            macro=tiny_macro(12 if layers is None else layers) if macro is None else macro,
            blocks=blocks,
            stem=[16, 2] if stem is None else stem,
            head_channels=head_channels,
            keep_expansion=keep_expansion,
            mismatched_skip=mismatched_skip,
        )


def tiny_macro(layers: int) -> list[list[int]]:
    """``FBNetTiny``'s stages for a number of layers; the first stages get what does not divide evenly.

    Raises:
        InputError: fewer layers than stages.
    """
    stages = [(16, 1), (32, 2), (64, 1)]
    if layers < len(stages):
        raise InputError("space.layers", layers, "is too few", f"Give at least {len(stages)}, one for each stage.")
    each, more = divmod(layers, len(stages))
    return [[channels, each + (i < more), stride] for i, (channels, stride) in enumerate(stages)]


def _positive(field: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"space.{field}", value, "is not a positive whole number", "Give one of 1 or more.")
    return value


def _row(field: str, row: Sequence[int], length: int, form: str) -> list[int]:
    """A row of positive whole numbers, as a list."""
    if len(row) != length or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in row):
        raise InputError(f"space.{field}", row, "is not a row of positive whole numbers", f"Give {form}.")
    return list(row)
