"""What every space owes to strategies, ledger and predictors: a test module calls this for each space that it makes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from archfront.spaces.registry import SPACES
from archfront.spaces.space import KEY_BYTES, Population, Space


def rows(population: Population) -> list[Any]:
    """The rows of a population in a form that ``==`` compares."""
    return [row.tolist() if isinstance(row, np.ndarray) else row for row in population]


def check_space(space: Space, *, count: int = 40, seed: int = 0, reproduced: bool = True) -> None:
    """Every promise of ``Space`` that can be checked without knowing the space.

    Args:
        space: to be checked.
        count: genotypes of each kind.
        seed: of the random generator.
        reproduced: the space stands in the table of spaces, so that its name and config build it again.
    """
    rng = np.random.default_rng(seed)
    population = space.sample(rng, count)
    assert len(population) == count
    assert rows(space.sample(np.random.default_rng(seed), count)) == rows(population)
    assert len(space.sample_spread(rng, count)) == count
    assert len(space.sample(rng, 0)) == 0
    every = [population, space.mutate(rng, population), space.mutate(rng, population, 0.5)]
    every.append(space.crossover(rng, population, space.sample(rng, count)))
    for members in every:
        assert len(members) == count
        _check_members(space, members)
    _check_mutants_differ(space, population, every[1])
    if reproduced:
        again = SPACES.build({"name": space.name, **json.loads(json.dumps(dict(space.config)))}, "space")
        assert again.digest == space.digest
        assert again.keys(again.from_json(space.to_json(population))) == space.keys(population)


def _check_members(space: Space, members: Population) -> None:
    written = json.loads(json.dumps(space.to_json(members), allow_nan=False))
    assert rows(space.from_json(written)) == rows(members)
    canonical = space.canonical(members)
    assert rows(space.canonical(canonical)) == rows(canonical)
    keys = space.keys(members)
    assert space.keys(canonical) == keys
    assert all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in keys)
    # Equal keys, equal representatives, and the other way round.
    forms = [json.dumps(genotype) for genotype in space.to_json(canonical)]
    assert len(set(forms)) == len(set(keys)) == len(set(zip(forms, keys, strict=True)))
    features = space.encode(members)
    assert features.shape[0] == len(members)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.array_equal(features, space.encode(canonical))
    # Rows are taken, split and joined by strategies.
    assert rows(np.concatenate([members[:1], members[1:]])) == rows(members)
    assert rows(members[np.arange(len(members))]) == rows(members)
    for genotype in written[:3]:
        layers = space.describe(genotype)
        assert layers
        assert all(layer.size >= 0 for layer in layers)
        json.dumps([dict(layer.details) for layer in layers])


def _check_mutants_differ(space: Space, parents: Population, mutants: Population) -> None:
    if space.size == 1:
        return
    pairs = zip(rows(parents), rows(mutants), strict=True)
    assert all(parent != mutant for parent, mutant in pairs)


def check_models(space: Any, population: Population, *, batch: int = 2) -> None:
    """Each genotype's model takes images, gives logits, and trains one step to finite gradients."""
    torch.manual_seed(0)
    images = torch.randn(batch, space.in_channels, space.resolution, space.resolution)
    for genotype in space.to_json(population):
        model = space.build(genotype).train()
        logits = model(images)
        assert logits.shape == (batch, space.classes), genotype
        torch.nn.functional.cross_entropy(logits, torch.zeros(batch, dtype=torch.long)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients, genotype
        assert all(torch.isfinite(g).all() for g in gradients), genotype
        torch.optim.SGD(model.parameters(), lr=0.01).step()
