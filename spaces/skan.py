"""KAN networks with a choice of basis in each layer, in the style of S-KAN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from archfront.errors import InputError, suggestion
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.skan_bases import BASES, LEAST_FUNCTIONS
from archfront.spaces.skan_layers import KanLayer
from archfront.spaces.space import Genotype, Layer

_KERNEL = 3
_STRIDE = 2


class SKan(ProductSpace):
    """A genotype lists the basis of each layer; all genotypes have equally many parameters.

    Args:
        pool: bases to choose from; all by default.
        widths: ``dense``: features of the hidden layers. ``conv``: channels of the convolutional layers, each 3x3 of
            stride 2, before the average over places and a dense layer.
        kind: ``dense`` for a network on the flattened image, ``conv``.
        functions: of each basis, 4 or more.
        resolution, in_channels: of the images.
        classes: of the output.

    Raises:
        InputError: an unknown or repeated basis, or a number out of range.
    """

    name: ClassVar[str] = "skan"

    def __init__(
        self,
        *,
        pool: list[str] | None = None,
        widths: list[int] | None = None,
        kind: Literal["dense", "conv"] = "dense",
        functions: int = 8,
        resolution: int = 32,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        self.pool = tuple(BASES if pool is None else pool)
        self.widths = tuple([32] if widths is None else widths)
        for name in self.pool:
            if name not in BASES:
                raise InputError("space.pool", name, "is not a known basis", suggestion(name, BASES))
        if len(set(self.pool)) < len(self.pool):
            raise InputError("space.pool", list(self.pool), "has a basis twice", "Name each once.")
        numbers = {"resolution": resolution, "in_channels": in_channels, "classes": classes}
        numbers |= {f"widths[{i}]": width for i, width in enumerate(self.widths)}
        for field, number in numbers.items():
            if number < 1:
                raise InputError(f"space.{field}", number, "is not positive", "Give 1 or more.")
        if functions < LEAST_FUNCTIONS:
            raise InputError("space.functions", functions, "are too few", f"Give {LEAST_FUNCTIONS} or more.")
        if kind not in ("dense", "conv"):
            raise InputError("space.kind", kind, "is unknown", "Give dense or conv.")
        super().__init__([Column(f"layer{i}", self.pool) for i in range(len(self.widths) + 1)])
        self.kind, self.functions = kind, functions
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes

    @property
    def config(self) -> Mapping[str, Any]:
        fields = ("kind", "functions", "resolution", "in_channels", "classes")
        return {"pool": list(self.pool), "widths": list(self.widths), **{f: getattr(self, f) for f in fields}}

    def build(self, genotype: Genotype) -> nn.Module:
        """The network: ``(n, in_channels, resolution, resolution)`` images to ``(n, classes)`` logits."""
        self.validate(genotype)
        return self._network([(name,) for name in genotype])

    def build_mixed(self) -> nn.Module:
        """The network whose layers mix the whole pool, as ``evaluators.skan_selection.select`` takes it."""
        return self._network([self.pool] * len(self.columns))

    def describe(self, genotype: Genotype) -> list[Layer]:
        self.validate(genotype)
        rows = []
        size = self.resolution
        for i, (name, width) in enumerate(zip(genotype, (*self.widths, self.classes), strict=True)):
            convolved = self.kind == "conv" and i < len(self.widths)
            size = -(-size // _STRIDE)
            details = {"functions": self.functions, "layer": "conv" if convolved else "dense"}
            shape = (width, size, size) if convolved else (width,)
            rows.append(Layer(name=f"layer{i}", kind=name, shape=shape, details=details))
        return rows

    def _network(self, names: Sequence[Sequence[str]]) -> KanNetwork:
        return KanNetwork(
            names,
            self.widths,
            self.functions,
            convolved=self.kind == "conv",
            inputs=self.in_channels if self.kind == "conv" else self.in_channels * self.resolution**2,
            classes=self.classes,
        )


class KanNetwork(nn.Module):
    """Layers of learned functions, with nothing else between them.

    Args:
        names: the bases of each layer; several are mixed.
        widths: of the layers but the last.
        functions: of each basis.
        convolved: all layers but the last are convolutions of stride 2, and an average over places follows them.
        inputs: features, or channels.
        classes: of the output.
    """

    def __init__(
        self,
        names: Sequence[Sequence[str]],
        widths: Sequence[int],
        functions: int,
        *,
        convolved: bool,
        inputs: int,
        classes: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if convolved else [nn.Flatten()]
        for chosen, width in zip(names, widths, strict=False):
            kernel = _KERNEL if convolved else None
            layers.append(KanLayer(chosen, inputs, width, functions, kernel=kernel, stride=_STRIDE))
            inputs = width
        if convolved:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*layers, KanLayer(names[-1], inputs, classes, functions))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits
