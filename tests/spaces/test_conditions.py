"""Decisions that count only while others have certain values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Ask, Problem
from archfront.spaces.choices import Choices
from archfront.spaces.conditions import Conditions
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.registry import SPACES

COLUMNS: dict[str, list[Any]] = {
    "kernel": [3, 5],
    "use_se": [False, True],
    "se_ratio": [4, 8],
    "gate": ["soft", "hard", "none"],
    "depth": [1, 2, 3],
    "width3": [16, 32],
}
WHEN: dict[str, dict[str, list[Any]]] = {
    "gate": {"se_ratio": [8]},
    "se_ratio": {"use_se": [True]},
    "width3": {"depth": [3], "kernel": [5]},
}


def space() -> Choices:
    made = SPACES.build({"name": "choices", "columns": COLUMNS, "when": WHEN}, "space")
    assert isinstance(made, Choices)
    return made


def every(of: Choices) -> list[list[Any]]:
    """All genotypes with a value everywhere."""
    return [list(choices) for choices in itertools.product(*[column.choices for column in of.columns])]


def expected(genotype: list[Any]) -> list[Any]:
    """The genotype with null for what does not count, by hand."""
    kernel, use_se, se_ratio, gate, depth, width3 = genotype
    return [
        kernel,
        use_se,
        se_ratio if use_se else None,
        gate if use_se and se_ratio == 8 else None,
        depth,
        width3 if depth == 3 and kernel == 5 else None,
    ]


def test_what_does_not_count_is_null_and_counted_once() -> None:
    made = space()
    genotypes = every(made)
    population = made.from_json(genotypes)
    assert made.to_json(population) == [expected(genotype) for genotype in genotypes]
    distinct = {tuple(expected(genotype)) for genotype in genotypes}
    assert made.size == len(distinct) == len(set(made.keys(population)))
    # Features tell apart whatever keys do: also null from the first choice.
    features = made.encode(population)
    assert len({row.tobytes() for row in features}) == len(distinct)
    assert features.shape[1] == 1 + 1 + (1 + 1) + 3 + 1 + (1 + 1)
    assert not features[[expected(g)[3] is None for g in genotypes], 4:7].any()


def test_rows_with_values_where_nothing_counts_have_one_key() -> None:
    """As a sampler of vectors proposes them."""
    made = space()
    rows = np.array(list(itertools.product(*[range(len(c.choices)) for c in made.columns])), dtype=np.int16)
    keys = [tuple(expected(genotype)) for genotype in every(made)]
    assert len(set(zip(keys, made.keys(rows), strict=True))) == made.size
    assert made.to_json(rows) == [list(key) for key in keys]
    assert np.array_equal(made.canonical(rows), made.from_json(made.to_json(rows)))


def test_null_is_refused_where_a_decision_counts() -> None:
    made = space()
    with pytest.raises(InputError, match=r"genotype\[2\] \(se_ratio\): None is null although use_se is True\. .*4, 8"):
        made.from_json([[3, True, None, None, 1, None]])
    with pytest.raises(InputError, match=r"genotype\[0\] \(kernel\)"):
        made.from_json([[None, False, None, None, 1, None]])


def test_sampling_is_uniform_in_each_decision_that_counts() -> None:
    made = space()
    population = made.sample(np.random.default_rng(0), 24_000)
    genotypes = made.to_json(population)
    # Each level of the tree halves (or thirds) what is above it; 5 standard deviations.
    for place, values, above in ((2, [4, 8], 1 / 2), (3, ["soft", "hard", "none"], 1 / 4), (5, [16, 32], 1 / 6)):
        for value in values:
            share = above / len(values)
            found = sum(genotype[place] == value for genotype in genotypes) / len(genotypes)
            assert abs(found - share) < 5 * (share / len(genotypes)) ** 0.5, (place, value)


def test_mutants_differ_in_what_counts_and_children_are_of_their_parents() -> None:
    made = space()
    rng = np.random.default_rng(0)
    parents = made.sample(rng, 600)
    for rate in (None, 0.0, 0.5):
        mutants = made.mutate(rng, parents, rate)
        assert all(a != b for a, b in zip(made.keys(parents), made.keys(mutants), strict=True))
    one = made.from_json([[5, True, 8, "hard", 3, 32]] * 400)
    other = made.from_json([[3, False, None, None, 3, None]] * 400)
    genotypes = made.to_json(made.crossover(rng, one, other))
    # Where se_ratio counts it can only be the first parent's, never a first choice that stands for null.
    assert {genotype[2] for genotype in genotypes} == {8, None}
    assert {genotype[0] for genotype in genotypes} == {3, 5}
    # One change: what comes to count is drawn from all its choices.
    grown = {g[2] for g in made.to_json(made.mutate(rng, made.from_json([[3, False, None, None, 1, None]] * 200), 0.0))}
    assert grown == {4, 8, None}


def test_without_conditions_nothing_changes() -> None:
    """The digest is that of earlier versions, and the generator is used as in any product space."""
    plain = Choices(columns={"b": ["x", "y"], "a": [1, 2]})
    assert plain.digest == "1bec065911c2237a738a3f3d21bb38dd"
    assert plain.config == {"columns": {"b": ["x", "y"], "a": [1, 2]}}
    one, other = np.random.default_rng(0), np.random.default_rng(0)
    parents = plain.sample(one, 20)
    assert np.array_equal(parents, ProductSpace.sample(plain, other, 20))
    assert np.array_equal(plain.mutate(one, parents), ProductSpace.mutate(plain, other, parents))
    assert one.random() == other.random()
    # true was read as 1 before it was allowed.
    truths = SPACES.build({"name": "choices", "columns": {"a": [False, True]}}, "space")
    assert truths.digest == SPACES.build({"name": "choices", "columns": {"a": [0, 1]}}, "space").digest
    assert truths.to_json(truths.from_json([[1]])) == [[True]]
    assert space().digest != Choices(columns=COLUMNS).digest
    assert SPACES.build({"name": "choices", **space().config}, "space").digest == space().digest


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"use_s": {"use_se": [True]}}, r"space\.when\.use_s: .*Did you mean 'use_se'"),
        ({"se_ratio": {"usese": [True]}}, r"space\.when\.se_ratio\.usese: .*Did you mean 'use_se'"),
        ({"width3": {"depth": [4]}}, r"space\.when\.width3\.depth: 4 is not a choice of depth.*1, 2, 3"),
        ({"width3": {"depth": []}}, r"space\.when\.width3\.depth: \[\] has no value"),
        ({"width3": {}}, r"space\.when\.width3: {} names no decision"),
        ({"depth": {"depth": [3]}}, r"space\.when\.depth: 'depth -> depth' wait for each other"),
        (
            {"depth": {"kernel": [3]}, "kernel": {"width3": [16]}, "width3": {"depth": [3]}},
            r"space\.when\.\w+: '(\w+) -> (\w+ -> ){2}\1' wait for each other",
        ),
    ],
)
def test_conditions_that_cannot_hold_are_named(when: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPACES.build({"name": "choices", "columns": COLUMNS, "when": when}, "space")


def test_a_group_too_large_to_list_is_counted_as_a_product() -> None:
    many = [Column(f"c{i}", tuple(range(8))) for i in range(9)]
    chain = {f"c{i + 1}": {f"c{i}": [0]} for i in range(8)}
    assert Conditions(many, chain).count() == 8**9
    # Seven controlling decisions of a chain can be listed: 7 + 7 + ... + 8 ways.
    assert Conditions(many[:7], {n: chain[n] for n in list(chain)[:6]}).count() == 7 * 6 + 8


def test_optuna_searches_a_conditional_space_to_its_end() -> None:
    made = Choices(columns={"a": [1, 2], "b": [1, 2, 3]}, when={"b": {"a": [2]}})
    problem = Problem(space=made, objectives=1)
    strategy = STRATEGIES.build({"name": "optuna:random"}, "strategy", _problem=problem)
    proposals = strategy.ask(Ask(number=0, count=10, first=0, seed=0))
    assert len(proposals) == made.size == 4
