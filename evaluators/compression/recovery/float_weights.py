"""The float weights behind quantised ones, for recoveries that change these before any code is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize

from archfront.errors import InputError
from archfront.spaces.policies.quantised import float_weight, quantised_layers


@contextmanager
def float_weights(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers have their float weights in place meanwhile: what is done to these in place stays, and is then quantised.

    Args:
        layers: of any kind; those without quantised weights are left alone.
    """
    kept: list[tuple[nn.Module, type[nn.Module], nn.Module]] = []
    for layer in layers:
        weight = float_weight(layer)
        if not parametrize.is_parametrized(layer, "weight") or weight is None:
            continue
        # By hand: torch's own way breaks the layers that this one was copied from, which share its class.
        parametrizations = layer.get_submodule("parametrizations")
        kept.append((layer, type(layer), parametrizations))
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer._modules["parametrizations"]
        layer.register_parameter("weight", weight)
    try:
        yield
    finally:
        for layer, quantised, parametrizations in kept:
            del layer._parameters["weight"]
            layer._modules["parametrizations"] = parametrizations
            layer.__class__ = quantised


def check_no_codes(student: nn.Module, step: str) -> None:
    """Refuse a student whose codes or corrections were chosen for float weights that are about to change.

    Args:
        step: name of who is to change them.

    Raises:
        InputError: names the layer.
    """
    for path, _, holder in quantised_layers(student):
        if holder.fixed is not None or holder.correction is not None:
            problem = f"finds codes or a correction in {path}, which a step before it chose for other weights"
            raise InputError("recovery", step, problem, "Put it before steps that round or correct weights.")
