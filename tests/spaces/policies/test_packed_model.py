"""Networks with true low-bit weights: what fake quantisation computes, in the bytes that were promised."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.support.small_models import bits, data_of

from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.spaces.policies.low_bit import LowBitConv2d, LowBitLinear, PackedTensor

LOW_RANK = {"name": "low-rank", "rank": 2}


@pytest.mark.parametrize("model", ["vit", "resnet"])
@pytest.mark.parametrize("activations", ["float", "follow"])
@pytest.mark.parametrize(
    "steps", [[], [{"name": "gptq"}], [{"name": "adaround", "steps": 20}], [{"name": "gptq"}, LOW_RANK]]
)
def test_packed_networks_compute_and_weigh_the_same(
    model: str, activations: Any, steps: Sequence[Mapping[str, Any]]
) -> None:
    space = bits(model, weights=[2, 3, 8, 32], activations=activations)
    recovery = [RECOVERIES.build(step, "recovery") for step in steps]
    network = Compressible(space, data_of(model), 32, recovery=recovery)
    genotype = [[3, 2, 8, 32][i % 4] for i in range(len(space.columns))]
    variant = space.variant(genotype)
    fake, true = network.prepared(variant), network.prepared(variant, packed=True)
    [batch] = network.inputs("validation", 20)[0]
    with torch.no_grad():
        assert torch.equal(true(batch), fake(batch))
    layers = [m for m in true.modules() if isinstance(m, (LowBitLinear, LowBitConv2d))]
    quantised = [mine for mine in space.layer_bits(genotype).values() if mine.weights != 32]
    assert len(layers) == len(quantised)
    # Whatever says how codes are to be read, and the ranges of inputs, is not counted.
    headers = {id(m.layout) for m in true.modules() if isinstance(m, PackedTensor)}
    ranges = {id(b) for m in true.modules() if "Activation" in type(m).__name__ for b in m.buffers()}
    counters = {id(b) for name, b in true.named_buffers() if name.endswith("num_batches_tracked")}
    stored = [t for t in true.state_dict(keep_vars=True).values() if id(t) not in headers | ranges | counters]
    assert sum(t.numel() * t.element_size() for t in stored) == network.costs(variant)["size_bytes"]


def test_a_copy_is_packed() -> None:
    space = bits("resnet", weights=[3], activations="float")
    network = Compressible(space, data_of("resnet"), 32)
    variant = space.variant([3] * len(space.columns))
    fake = network.prepared(variant)
    before = copy.deepcopy(fake.state_dict())
    network.prepared(variant, packed=True)
    assert all(torch.equal(value, before[key]) for key, value in fake.state_dict().items())
