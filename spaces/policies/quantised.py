"""A network whose layers compute with quantised weights and inputs, as a policy of bits says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from archfront.errors import InputError
from archfront.spaces.policies.quantiser import FLOAT, ActivationQuantiser, Quantiser


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Bits of a layer's weights and of what it reads; 32 leaves it alone."""

    weights: int = FLOAT
    activations: int = FLOAT


class QuantisedWeight(nn.Module):
    """What stands before a layer's float weight: the quantised one, which gradients pass straight through.

    Attributes:
        quantiser: whose grid it lies on.
        fixed: the quantised weight itself where a method has chosen its codes; the float weight then learns no more.
        correction: added to it, of the weight's shape; low-rank factors multiplied out.
        factors, factor_quantiser: what the correction is the product of, before they are quantised themselves; None
            for factors in float16.
        correction_bytes: that they take.
    """

    fixed: Tensor | None
    correction: Tensor | None

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser
        self.factors: tuple[Tensor, Tensor] | None = None
        self.factor_quantiser: Quantiser | None = None
        self.correction_bytes = 0
        self.register_buffer("fixed", None)
        self.register_buffer("correction", None)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta:  # where costs are counted there are no values
            return weight
        quantised = self.quantiser.straight_through(weight) if self.fixed is None else self.fixed
        return quantised if self.correction is None else quantised + self.correction


def quantise(
    model: nn.Module,
    bits: Mapping[str, LayerBits],
    quantiser: Callable[[int], Quantiser],
    activations: Callable[[str, int], nn.Module] | None = None,
) -> nn.Module:
    """Quantise layers in place; with 32 bits everywhere nothing is touched.

    The float weights stay behind the quantised ones, for methods that round them otherwise or train on; ``bake`` drops
    them.

    Args:
        model: to be changed.
        bits: path -> bits.
        quantiser: of weights, for a number of bits.
        activations: module that quantises the input of a path at a number of bits, from calibration; by default
            the range is each batch's own.

    Raises:
        InputError: a layer that has quantised weights or inputs already would get others.
    """
    for path, mine in bits.items():
        layer = model.get_submodule(path)
        twice = mine.weights != FLOAT and _holder(layer) is not None
        if twice or (mine.activations != FLOAT and hasattr(layer, "input_quantiser")):
            raise InputError("policy", path, "is quantised already", "Let one part decide about a layer's bits.")
        if mine.weights != FLOAT:
            parametrize.register_parametrization(layer, "weight", QuantisedWeight(quantiser(mine.weights)))
        if mine.activations != FLOAT:
            made = activations(path, mine.activations) if activations else BatchRange(mine.activations)
            layer.add_module("input_quantiser", made)
            layer.register_forward_pre_hook(_quantise_input)
    return model


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantisedWeight]]:
    """Path, layer and what stands before its weight, of all layers with quantised weights."""
    for path, module in model.named_modules():
        holder = _holder(module)
        if holder is not None:
            yield path, module, holder


def float_weight(layer: nn.Module) -> nn.Parameter | None:
    """The parameter behind a layer's weight; None where it is computed from others."""
    if _holder(layer) is not None:
        return cast(nn.Parameter, layer.parametrizations.weight.original)  # type: ignore[union-attr]
    return layer._parameters.get("weight")


def weight_quantiser(layer: nn.Module) -> Quantiser | None:
    """Of a layer's weight; None where it is float."""
    holder = _holder(layer)
    return None if holder is None else holder.quantiser


def correction_of(layer: nn.Module) -> int:
    """Bytes of the factors that correct a layer's quantised weight."""
    holder = _holder(layer)
    return 0 if holder is None else holder.correction_bytes


def input_bits(layer: nn.Module) -> int:
    """Of what a layer reads; 32 where it is float."""
    made = getattr(layer, "input_quantiser", None)
    return made.bits if isinstance(made, (ActivationQuantiser, BatchRange)) else FLOAT


def bake(model: nn.Module) -> nn.Module:
    """Put the quantised weights in the float ones' places, for good."""
    for _, layer, _ in list(quantised_layers(model)):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        _put(layer, weight)
    return model


def with_float_weights(model: nn.Module) -> nn.Module:
    """Put the float weights back in the quantised ones' places; inputs stay quantised."""
    for _, layer, _ in list(quantised_layers(model)):
        weight = float_weight(layer)
        assert weight is not None
        _put(layer, weight)
    return model


def without_input_quantisers(model: nn.Module) -> nn.Module:
    """Let all layers read what comes, in place."""
    for layer in model.modules():
        if hasattr(layer, "input_quantiser"):
            hooks = layer._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _quantise_input]:
                del hooks[key]
            del layer.input_quantiser
    return model


def _put(layer: nn.Module, weight: Tensor) -> None:
    """A plain weight in place of the quantised one. torch's own way to do so breaks the layers that this one was copied
    from or to: they share a class, from which it takes the weight away."""
    weight = weight.detach().clone()
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    layer.register_parameter("weight", nn.Parameter(weight))


def _holder(layer: nn.Module) -> QuantisedWeight | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    [*_, last] = layer.parametrizations.weight  # type: ignore[misc, union-attr]
    return last if isinstance(last, QuantisedWeight) else None


def _quantise_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    features, *rest = inputs
    return (layer.get_submodule("input_quantiser")(features), *rest)


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
    """Ranges of what layers read, from one pass over calibration data.

    Args:
        model: in evaluation mode.
        widths: path of a layer -> the numbers of bits at which it may be asked for.
        batches: inputs.
        make: an observer for a number of bits.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Mapping[str, Sequence[int]],
        batches: Sequence[Tensor],
        make: Callable[[int], ActivationQuantiser],
    ) -> None:
        self._found = {(path, bits): make(bits) for path, some in widths.items() for bits in some}

        def observe(path: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for bits in widths[path]:
                self._found[path, bits].observe(inputs[0])

        paths = [path for path, some in widths.items() if some]
        hooks = [model.get_submodule(path).register_forward_pre_hook(partial(observe, path)) for path in paths]
        try:
            with torch.no_grad():
                for batch in batches if paths else ():
                    model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        for observer in self._found.values():
            observer.freeze()

    def __call__(self, path: str, bits: int) -> ActivationQuantiser:
        return self._found[path, bits]
