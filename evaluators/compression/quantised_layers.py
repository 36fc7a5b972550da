"""Layers computed at any bits, with weights and ranges of inputs that are prepared once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.quantised import LayerBits
from archfront.spaces.policies.quantiser import FLOAT


class QuantisedLayers:
    """What ``SharedPrefixes`` runs for policies of bits.

    Args:
        space: of the policies.
        model: the network.
        calibration: batches that the ranges of what layers read are observed on.
    """

    def __init__(self, space: Bits, model: nn.Module, calibration: Sequence[Tensor]) -> None:
        self._space = space
        self.paths = [layer.path for layer in space.layers.found]
        self._weights: dict[tuple[str, int], Tensor] = {}
        self._ranges = space.calibrated(model, dict.fromkeys(self.paths, space.activation_widths), calibration)

    def __call__(self, path: str, layer: nn.Module, bits: LayerBits, features: Tensor) -> Tensor:
        if bits.activations != FLOAT:
            features = self._ranges(path, bits.activations)(features)
        # The class's own forward: layers may pad or standardise as they like. The weight is put in its place meanwhile.
        kept = layer._parameters["weight"]
        layer._parameters["weight"] = self._weight(path, layer, bits.weights)  # type: ignore[assignment]
        try:
            output: Tensor = type(layer).forward(layer, features)
        finally:
            layer._parameters["weight"] = kept
        return output

    def _weight(self, path: str, layer: nn.Module, bits: int) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if bits == FLOAT:
            return weight
        if (path, bits) not in self._weights:
            self._weights[path, bits] = self._space.quantiser(bits).fake(weight)
        return self._weights[path, bits]
