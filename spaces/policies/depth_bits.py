"""Bit widths for networks that are searched at the same time: by depth, since no layer is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from archfront.errors import InputError
from archfront.spaces.policies.bits import rising
from archfront.spaces.policies.quantiser import FLOAT, Quantiser
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer

if TYPE_CHECKING:
    from torch import nn


class DepthBits(ProductSpace):
    """A part of a joint space that quantises the network of another part, whatever architecture that has.

    The network's linear and convolutional layers, in the order in which it holds them, are divided into groups as
    equal as can be; each group has one decision. The network then trains with quantised weights, which gradients pass
    straight through, and inputs quantised in the range of each batch: the joint search of SimQ-NAS (Sarah et al., 2023)
    for networks trained on their own.

    Args:
        groups: how many.
        weights: bits to choose from, 2 to 8, or 32 for none; rising.
        activations: ``follow`` gives inputs the weights' bits, ``float`` leaves them.

    Raises:
        InputError: no group, or bits out of range.
    """

    name: ClassVar[str] = "depth-bits"
    has_models = False

    def __init__(
        self, *, groups: int = 4, weights: list[int] | None = None, activations: Literal["follow", "float"] = "follow"
    ) -> None:
        if not 1 <= groups <= 1000:
            raise InputError("space.groups", groups, "is out of range", "Give 1 to 1000.")
        self.groups, self.activations = groups, activations
        self.weight_bits = rising("weights", [4, 8] if weights is None else weights)
        super().__init__([Column(f"depth{i}", self.weight_bits, ordered=True) for i in range(groups)])

    @property
    def config(self) -> Mapping[str, Any]:
        return {"groups": self.groups, "weights": list(self.weight_bits), "activations": self.activations}

    def apply(self, module: nn.Module, genotype: Genotype) -> nn.Module:
        """The network with quantised layers, changed in place."""
        from archfront.spaces.policies.layers import SUPPORTED
        from archfront.spaces.policies.quantised import LayerBits, quantise

        [row] = self.from_json([genotype]).tolist()
        bits = [self.weight_bits[choice] for choice in row]
        paths = [path for path, inner in module.named_modules() if isinstance(inner, SUPPORTED)]
        chosen = [bits[i * self.groups // len(paths)] for i in range(len(paths))]
        follow = self.activations == "follow"
        layers = {
            path: LayerBits(weights=width, activations=width if follow else FLOAT)
            for path, width in zip(paths, chosen, strict=True)
        }
        return quantise(module, layers, lambda width: Quantiser(bits=width))

    def build(self, genotype: Genotype) -> nn.Module:
        raise InputError("space.name", self.name, "has no networks of its own", "Join it with a space of networks.")

    def describe(self, genotype: Genotype) -> list[Layer]:
        return [
            Layer(name=column.name, kind=f"{bits} bits", shape=(), size=float(bits) / 8)
            for column, bits in zip(self.columns, genotype, strict=True)
        ]
