"""einspace: the paper's five seeds, equality with networks written by hand, and samples that build, run and train."""

import os
import time

import numpy as np
import pytest
import torch
from tests.support.einspace_references import REFERENCES, copy_weights
from tests.support.space_contract import check_models
from torch import nn

from archfront.errors import InputError
from archfront.evaluators.costs import count
from archfront.spaces.grammars.derivation import count_nodes
from archfront.spaces.grammars.einspace import Einspace
from archfront.spaces.grammars.einspace_seeds import SEEDS
from archfront.spaces.space import Population

PUBLISHED = {
    "resnet18": (11_173_632, 119, 142),
    "resnet18_no_maxpool": (11_210_560, 121, 144),
    "wrn16_4": (2_748_576, 89, 103),
    "transformer": (4_269_568, 220, 192),
    "mixer": (2_434_048, 116, 148),
}
"""Backbone parameters, terminals and non-terminals at 3x32x32, of the authors' own code."""

SPACE = Einspace()
LIGHT = Einspace(params=2_000_000, macs=20_000_000, activations=400_000)
"""At the paper's input, within bounds that let a step take a moment on a CPU."""

DRAWN = 10_000
STRIDE = 50


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_seeds_have_the_published_sizes(name: str) -> None:
    tree = SEEDS[name]()
    sizes = (SPACE.analysis(tree).totals.params, *count_nodes(SPACE.grammar, tree))
    assert sizes == PUBLISHED[name]
    [held] = SPACE.canonical(SPACE.from_json([tree]))
    assert SPACE.analysis(held).totals.params == PUBLISHED[name][0]


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_seeds_equal_networks_written_by_hand(name: str) -> None:
    torch.manual_seed(0)
    built = SPACE.build(SEEDS[name]())
    assert isinstance(built, nn.Sequential)
    backbone = built[:-1]
    reference = REFERENCES[name]()
    # Norms of identical weights would hide one that stands in another's place.
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    copy_weights(reference, backbone)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for mode in (True, False):
            expected, found = reference.train(mode)(images), backbone.train(mode)(images)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_costs_of_seeds_are_what_torch_counts(name: str) -> None:
    population = SPACE.from_json([SEEDS[name]()])
    with torch.device("meta"):
        model = SPACE.build(SPACE.to_json(population)[0])
    counted = count(model, (3, 32, 32))
    params, macs = SPACE.costs(population)
    assert (params[0], macs[0]) == (counted.params, counted.macs)


def check_costs(space: Einspace, population: Population) -> None:
    """Each within the budget, and with the costs that torch counts."""
    params, macs = space.costs(population)
    for genotype, own_params, own_macs in zip(space.to_json(population), params, macs, strict=True):
        with torch.device("meta"):
            counted = count(space.build(genotype), (space.in_channels, space.resolution, space.resolution))
        assert (own_params, own_macs) == (counted.params, counted.macs), genotype
        assert own_params <= (space.budget.params or own_params)
        assert own_macs <= (space.budget.macs or own_macs)


def test_samples_build_run_and_train() -> None:
    """Every fiftieth of 10,000; ``test_many_samples_build_run_and_train`` takes more, or all."""
    population = LIGHT.sample(np.random.default_rng(0), DRAWN // STRIDE)
    check_costs(LIGHT, population)
    check_models(LIGHT, population)


@pytest.mark.slow
def test_many_samples_build_run_and_train() -> None:
    """ARCHFRONT_SAMPLES=10000 takes them all."""
    rng = np.random.default_rng(1)
    seconds: list[float] = []
    for number in range(int(os.environ.get("ARCHFRONT_SAMPLES", "4000"))):
        begun = time.perf_counter()
        population = LIGHT.sample(rng, 1)
        seconds.append(time.perf_counter() - begun)
        check_models(LIGHT, population)
        if not number % STRIDE:
            check_costs(LIGHT, population)
    print(f"seconds a sample: median {np.median(seconds):.5f}, largest {max(seconds):.2f}")


def test_bounds_hold() -> None:
    space = Einspace(params=5_000, macs=400_000, activations=50_000, depth=6, terminals=30)
    population = space.sample_spread(np.random.default_rng(0), 300)
    population = np.concatenate([population, space.mutate(np.random.default_rng(1), population)])
    population = np.concatenate([population, space.crossover(np.random.default_rng(2), population, population[::-1])])
    params, macs = space.costs(population)
    assert params.max() <= 5_000
    assert macs.max() <= 400_000
    for tree in population:
        found = space.analysis(tree)
        assert found.depth <= 6
        assert found.totals.terminals <= 30
        assert found.totals.activations <= 50_000


def test_one_seed_beyond_the_bounds_is_refused_with_its_size() -> None:
    with pytest.raises(InputError, match=r"has 11,?178,?762 params.*space\.params"):
        Einspace(params=1_000_000).from_json([SEEDS["resnet18"]()])


@pytest.mark.parametrize(
    ("genotype", "words"),
    [
        (["sequential", "norm"], "parts"),
        ("norm", "is no S"),
        (["sequential", "norm", "conv3"], "'conv3' is no M"),
        (["routing", "im2col16x16s16p0", "norm", "permute213"], "does not fit"),
        (["branching", "clone2", "norm", "add"], "wants 2 bodies"),
        (["branching", "clone4", "norm", "dot"], "does not fit"),
        (["sequential", "norm", 3], "neither a name nor a list"),
        ([], "is no production"),
    ],
)
def test_what_is_no_derivation_is_refused_with_the_place(genotype: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SPACE.from_json([genotype])
