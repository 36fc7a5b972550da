"""What a network costs as it stands, whatever policies have made of it."""

from __future__ import annotations

from torch import Tensor, nn

from archfront.spaces.policies.layers import find_layers
from archfront.spaces.policies.packing import quantised_bytes
from archfront.spaces.policies.quantised import correction_of, input_bits, weight_quantiser
from archfront.spaces.policies.quantiser import FLOAT

MEBI = 2**20


def measured_costs(model: nn.Module, example: Tensor) -> dict[str, float]:
    """``COSTS`` of a network, from one pass over ``example`` ``(1, ...)``.

    ``params`` and ``macs`` (of linear and convolutional layers, for one input) are counts; ``size_bytes`` is all that
    has to be stored: packed codes, scales and zero points, low-rank corrections, and everything that is no layer's
    weight at its own type. ``model_mb`` is HAWQ-V3's model size: parameters times bits of the layers, in MiB.
    ``gbops`` are multiply-adds times bits of the weight times bits of the input, in 1e9; 32 where nothing is quantised.

    Raises:
        InputError: the network fails on the example.
    """
    layers = find_layers(model, example)
    size, model_mb, gbops = float(layers.other_bytes), 0.0, layers.other_macs * FLOAT * FLOAT / 1e9
    for facts in layers.found:
        layer = model.get_submodule(facts.path)
        quantiser = weight_quantiser(layer)
        bits = FLOAT if quantiser is None else quantiser.bits
        size += facts.float_bytes if quantiser is None else quantised_bytes(facts.shape, quantiser)
        size += correction_of(layer)
        model_mb += facts.params * bits / 8 / MEBI
        gbops += facts.macs * bits * input_bits(layer) / 1e9
    counts = {"params": float(layers.params), "macs": float(layers.macs)}
    return {**counts, "size_bytes": size, "model_mb": model_mb, "gbops": gbops}
