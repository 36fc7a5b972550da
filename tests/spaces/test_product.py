"""The operators of finite product spaces."""

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.spaces.choices import Choices
from archfront.spaces.product import Column, digests

SPACE = Choices(columns={"a": [1, 2, 3], "b": ["x", "y"], "c": ["only"], "d": [8, 4]})


def test_samples_are_uniform() -> None:
    population = SPACE.sample(np.random.default_rng(0), 30_000)
    for i, column in enumerate(SPACE.columns):
        shares = np.bincount(population[:, i], minlength=len(column.choices)) / len(population)
        np.testing.assert_allclose(shares, 1 / len(column.choices), atol=0.01)


def test_every_mutant_differs_and_stays_inside() -> None:
    rng = np.random.default_rng(1)
    parents = SPACE.sample(rng, 5_000)
    mutants = SPACE.mutate(rng, parents)
    assert ((mutants != parents).sum(axis=1) >= 1).all()
    assert (mutants >= 0).all()
    assert (mutants < SPACE.cardinalities).all()
    single = SPACE.mutate(rng, parents, rate=0.0)
    assert ((single != parents).sum(axis=1) == 1).all()


def test_children_take_each_decision_from_a_parent() -> None:
    rng = np.random.default_rng(2)
    first, second = SPACE.sample(rng, 500), SPACE.sample(rng, 500)
    children = SPACE.crossover(rng, first, second)
    assert ((children == first) | (children == second)).all()
    assert (children != first).any()
    assert (children != second).any()


def test_spread_samples_reach_further_and_favour_no_choice() -> None:
    rng = np.random.default_rng(3)
    wide = Choices(columns={f"c{i}": [0, 1, 2, 3] for i in range(20)})
    plain, spread = wide.sample(rng, 8_000), wide.sample_spread(rng, 8_000)
    assert spread.sum(axis=1).std() > 2 * plain.sum(axis=1).std()
    np.testing.assert_allclose(np.bincount(spread.ravel(), minlength=4) / spread.size, 0.25, atol=0.02)
    # Columns that share no choices with others are drawn on their own.
    assert (SPACE.sample_spread(rng, 500) < SPACE.cardinalities).all()


def test_json_round_trip_and_keys() -> None:
    population = SPACE.sample(np.random.default_rng(4), 200)
    again = SPACE.from_json(SPACE.to_json(population))
    np.testing.assert_array_equal(again, population)
    keys = SPACE.keys(population)
    assert len(set(keys)) == len(np.unique(population, axis=0))
    assert all(len(key) == 16 for key in keys)


def test_digests_tell_a_million_rows_apart() -> None:
    cardinalities = np.full(40, 9)
    rng = np.random.default_rng(5)
    population = (rng.random((200_000, 40)) * 9).astype(np.int16)
    # Neighbours differ in one digit: the hardest case for a weak hash.
    population[100_000:] = population[:100_000]
    population[100_000:, 39] = (population[100_000:, 39] + 1) % 9
    assert len(set(digests(population, cardinalities))) == len(np.unique(population, axis=0))


def test_a_foreign_genotype_is_named() -> None:
    with pytest.raises(InputError, match=r"genotype\[1\] \(b\).*'z'"):
        SPACE.from_json([[1, "z", "only", 8]])
    with pytest.raises(InputError, match="no choice"):
        Choices(columns={"a": []})
    assert Column("a", (1,)).ordered is False
