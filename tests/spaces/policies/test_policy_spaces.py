"""What every space of policies owes, those of plug-ins included: nothing here is named."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.support.small_models import RESNET, VIT
from tests.support.space_contract import check_space

from archfront.spaces.policies.policy_space import COSTS, PolicySpace
from archfront.spaces.registry import SPACES

NAMES = [name for name in SPACES if issubclass(SPACES.get(name, "space"), PolicySpace)]
MODELS = {"vit": VIT, "resnet": RESNET}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_space_of_policies(name: str, model: str) -> None:
    space = SPACES.build({"name": name, "model": dict(MODELS[model])}, "space")
    assert isinstance(space, PolicySpace)
    check_space(space)
    network = space.source.build()
    images = torch.randn(5, *space.source.example().shape[1:])
    weights = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        own = network(images)
        untouched = space.transform(copy.deepcopy(network), space.untouched(), [images]).eval()
        assert torch.equal(untouched(images), own)
        strongest = [column.choices[0] for column in space.columns]
        assert not torch.equal(space.apply(network, strongest).eval()(images), own)
        # A policy is a function of its genotype.
        again = [space.transform(copy.deepcopy(network), space.variant(strongest), [images]) for _ in range(2)]
        assert torch.equal(again[0](images), again[1](images))
        assert torch.equal(network(images), own)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_those_of_the_network(name: str) -> None:
    """However a space knows them: counted on the network that a policy makes."""
    space = SPACES.build({"name": name, "model": dict(VIT)}, "space")
    assert isinstance(space, PolicySpace)
    population = space.sample(np.random.default_rng(0), 3)
    table = space.cost_table(population)
    counted = [space._measured(space.variant(genotype)) for genotype in space.to_json(population)]
    for cost in COSTS:
        assert table[cost] == pytest.approx([row[cost] for row in counted])
    params, macs = space.costs(population)
    assert (params == table["params"]).all()
    assert (macs == table["macs"]).all()
