"""A network whose layers compute with quantised weights and inputs, as a policy of bits says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from archfront.spaces.policies.quantiser import FLOAT, ActivationQuantiser, Quantiser


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Bits of a layer's weights and of what it reads; 32 leaves it alone."""

    weights: int = FLOAT
    activations: int = FLOAT


def quantise(
    model: nn.Module,
    bits: Mapping[str, LayerBits],
    quantiser: Callable[[int], Quantiser],
    activations: Callable[[str, int], nn.Module] | None = None,
    *,
    trainable: bool = False,
) -> nn.Module:
    """Quantise layers in place; with 32 bits everywhere nothing is touched.

    Args:
        model: to be changed.
        bits: path -> bits.
        quantiser: of weights, for a number of bits.
        activations: module that quantises the input of a path at a number of bits, from calibration; by default
            the range is each batch's own.
        trainable: keep the float weights behind the quantised ones, which gradients reach straight through.
    """
    for path, mine in bits.items():
        layer = model.get_submodule(path)
        if mine.weights != FLOAT:
            if trainable:
                parametrize.register_parametrization(layer, "weight", _FakeWeight(quantiser(mine.weights)))
            else:
                weight = layer.weight
                assert isinstance(weight, Tensor)
                with torch.no_grad():
                    weight.copy_(quantiser(mine.weights).fake(weight))
        if mine.activations != FLOAT:
            made = activations(path, mine.activations) if activations else BatchRange(mine.activations)
            layer.add_module("input_quantiser", made)
            layer.register_forward_pre_hook(_quantise_input)
    return model


def _quantise_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    features, *rest = inputs
    return (layer.get_submodule("input_quantiser")(features), *rest)


class _FakeWeight(nn.Module):
    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantiser.straight_through(weight)


class BatchRange(nn.Module):
    """Quantises what passes in its own range, asymmetrically; the gradient passes as if nothing had been done."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, features: Tensor) -> Tensor:
        low, high = features.detach().amin().clamp(max=0), features.detach().amax().clamp(min=0)
        steps = 2**self.bits - 1
        scale = ((high - low) / steps).clamp(min=torch.finfo(features.dtype).tiny)
        zero = torch.round(-low / scale)
        codes = torch.clamp(torch.round(features.detach() / scale) + zero, 0, steps)
        quantised: Tensor = features + ((codes - zero) * scale - features).detach()
        return quantised

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class Calibration:
    """Ranges of what each layer reads, from one pass over calibration data, at any number of bits.

    Args:
        model: in evaluation mode.
        paths: of the layers.
        batches: inputs.
        make: an observer for a number of bits.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: list[str],
        batches: list[Tensor],
        widths: tuple[int, ...],
        make: Callable[[int], ActivationQuantiser],
    ) -> None:
        self._found = {(path, bits): make(bits) for path in paths for bits in widths}

        def observe(path: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for bits in widths:
                self._found[path, bits].observe(inputs[0])

        hooks = [model.get_submodule(path).register_forward_pre_hook(partial(observe, path)) for path in paths]
        try:
            with torch.no_grad():
                for batch in batches:
                    model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        for observer in self._found.values():
            observer.freeze()

    def __call__(self, path: str, bits: int) -> ActivationQuantiser:
        return self._found[path, bits]
