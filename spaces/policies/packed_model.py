"""A compressed network as it is stored and shipped: packed codes in place of quantised weights in float."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from archfront.spaces.policies.low_bit import LowBitConv2d, LowBitLinear
from archfront.spaces.policies.quantised import bake, float_weight, quantised_layers, with_float_weights


def pack_model(model: nn.Module) -> nn.Module:
    """Give every layer with a quantised weight its true low-bit form, in place: the same outputs, to the bit.

    Layers with a forward of their own (that pad or standardise by themselves) keep the quantised values in float.
    """
    for path, layer, holder in list(quantised_layers(model)):
        kind = parametrize.type_before_parametrizations(layer)
        if kind not in (nn.Linear, nn.Conv2d):
            bake(layer)
            continue
        weight = float_weight(layer)
        assert weight is not None
        # The codes that a recovery chose lie on the quantiser's own grid.
        parameters = holder.quantiser.parameters(weight.detach())
        codes = None if holder.fixed is None else holder.quantiser.codes(holder.fixed, parameters)
        with_float_weights(layer)
        common = {
            "codes": codes, "parameters": parameters if codes is not None else None,
            "correction": holder.factors, "factor_quantiser": holder.factor_quantiser,
        }  # fmt: skip
        made: nn.Module
        if isinstance(layer, nn.Conv2d):
            made = LowBitConv2d.from_float(layer, holder.quantiser, **common)  # type: ignore[arg-type]
        else:
            assert isinstance(layer, nn.Linear)
            made = LowBitLinear.from_float(layer, holder.quantiser, **common)  # type: ignore[arg-type]
        if hasattr(layer, "input_quantiser"):
            made.add_module("input_quantiser", layer.get_submodule("input_quantiser"))
        if path:
            model.set_submodule(path, made)
        else:
            model = made
    return model
