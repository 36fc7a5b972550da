"""The members of a space within bounds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import archfront
from archfront.errors import InputError
from archfront.evaluators.costs import Costs, count
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Problem
from archfront.spaces.additive import BoundedSums, Sum
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.bounded import Bounded
from archfront.spaces.bounded_sources import Listed, Summed
from archfront.spaces.choices import Choices
from archfront.spaces.counting import chain_costs
from archfront.spaces.evonorm import EvoNorm
from archfront.spaces.fbnet import FBNetTiny
from archfront.spaces.grammars.tabular import Tabular
from archfront.spaces.joint import Joint
from archfront.spaces.nasbench201 import NasBench201
from archfront.spaces.registry import SPACES
from archfront.spaces.space import Population, Space

SMALL = FBNetTiny(layers=4, blocks=["k3_e1", "k3_e3", "k5_e1", "k5_e6", "skip"])


def rows_of(space: Any) -> Population:
    return np.array(list(itertools.product(*[range(len(c.choices)) for c in space.columns])), dtype=np.int16)


def assert_uniform(drawn: Population, members: Population) -> None:
    """Chi-square of draws against the uniform distribution on these rows; fails once in 10^6 by chance."""
    counts = {row.tobytes(): 0 for row in members}
    for row in drawn:
        counts[row.tobytes()] += 1  # a row outside is a KeyError
    expected = len(drawn) / len(members)
    assert expected >= 8
    statistic = sum((n - expected) ** 2 for n in counts.values()) / expected
    freedom = len(members) - 1
    # Wilson and Hilferty's normal approximation of chi-square.
    assert ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5 < 4.75


@pytest.mark.parametrize("cells", [1 << 18, 900, 40])
@pytest.mark.parametrize(
    "bounds", [{"macs": (0.2, 0.5)}, {"params": (0.6, 1.0)}, {"macs": (0.3, 0.6), "params": (0.2, 0.5)}]
)
def test_draws_by_dynamic_programming_are_uniform(cells: int, bounds: dict[str, tuple[float, float]]) -> None:
    """Also where the grid is too coarse for the sums."""
    every = rows_of(SMALL)
    costs = dict(zip(("params", "macs"), chain_costs(SMALL, every).T, strict=True))
    cuts = {q: np.quantile(costs[q], bound).astype(int).tolist() for q, bound in bounds.items()}
    inside = np.all([(costs[q] >= low) & (costs[q] <= high) for q, (low, high) in cuts.items()], axis=0)
    made = Bounded.around(SMALL, **cuts)
    base = chain_costs(SMALL, np.zeros((1, 4), dtype=np.int16))[0]
    sums = []
    for i, quantity in enumerate(("params", "macs")):
        if quantity in cuts:
            terms = [
                np.array([chain_costs(SMALL, _at(c, k))[0, i] - base[i] for k in range(len(SMALL.columns[c].choices))])
                for c in range(4)
            ]
            sums.append(Sum(terms=terms, low=cuts[quantity][0] - base[i], high=cuts[quantity][1] - base[i]))
    table = BoundedSums(sums, cells=cells)
    assert table.chance >= inside.mean() - 1e-12
    assert not table.exact or table.chance == pytest.approx(inside.mean())
    assert np.array_equal(table.admits(every), inside)
    source = Summed(SMALL, table, made.admits, len(every))
    drawn = source.draw(np.random.default_rng(0), 10 * int(inside.sum()))
    assert drawn is not None
    assert_uniform(drawn, every[inside])


def _at(column: int, choice: int) -> Population:
    row = np.zeros((1, 4), dtype=np.int16)
    row[0, column] = choice
    return row


def test_a_tight_window_of_a_large_space() -> None:
    """Plain draws find a member of it once in 300,000 million, and of the other once in 3,000."""
    space = FBNetTiny()
    least = Bounded.around(space, macs=(None, 1.01 * 168_960))
    assert isinstance(least._source, Summed)
    assert least.size == 1
    [only] = least.to_json(least.sample(np.random.default_rng(0), 1))
    # No block at all where the shape allows it; else the cheapest.
    assert only.count("skip") >= 9
    both = Bounded.around(space, macs=(2.0e6, 2.02e6), params=(None, 9.0e4))
    rng = np.random.default_rng(0)
    population = both.sample(rng, 300)
    costs = chain_costs(space, population)
    assert ((costs[:, 1] >= 2.0e6) & (costs[:, 1] <= 2.02e6) & (costs[:, 0] <= 9.0e4)).all()
    assert len(set(both.keys(population))) > 290
    assert both.admits(space.sample(rng, 2000)).mean() < 0.02
    for children in (both.mutate(rng, population, 0.0), both.mutate(rng, population, 0.3)):
        assert both.admits(children).all()
        assert all(a != b for a, b in zip(both.keys(children), both.keys(population), strict=True))
        # They stay near: random members differ in about ten of the twelve.
        assert (children != population).sum(axis=1).mean() < 7
    assert both.admits(both.crossover(rng, population, population[::-1])).all()


def test_small_spaces_are_listed() -> None:
    """NAS-Bench-201 with pruning, whose costs are no sums over its edges; without it they are."""
    space = NasBench201(channels=4, cells=1)
    every = rows_of(space)
    params, macs = space.costs(every)
    bounds = {"params": (int(np.quantile(params, 0.1)), int(np.quantile(params, 0.3))), "macs": (0, int(macs.mean()))}
    inside = (params >= bounds["params"][0]) & (params <= bounds["params"][1]) & (macs <= bounds["macs"][1])
    assert 200 < inside.sum() < 8000
    made = Bounded.around(space, **bounds)
    assert isinstance(made._source, Listed)
    assert made.size == inside.sum()
    assert_uniform(made.sample(np.random.default_rng(0), 10 * int(inside.sum())), every[inside])
    outside = every[~inside][:1]
    near = made._source.near(np.random.default_rng(0), outside)
    assert near is not None
    assert made.admits(near)[0]
    assert (near != outside).sum() == (every[inside] != outside).sum(axis=1).min()


def test_a_grammar_is_led_into_its_bounds() -> None:
    space = Tabular()
    made = Bounded.around(space, params=(20_000, 21_000))
    rng = np.random.default_rng(0)
    population = made.sample(rng, 25)
    assert made.admits(space.sample(rng, 200)).mean() < 0.1
    for members in (population, made.mutate(rng, population), made.crossover(rng, population, population[::-1])):
        for genotype in made.to_json(members):
            assert 20_000 <= sum(p.numel() for p in made.build(genotype).parameters()) <= 21_000
    # Its own budget takes over the upper bound: whatever is drawn keeps it, and the space itself is as it was.
    assert made._proposer.costs(made._proposer.sample(rng, 100))[0].max() <= 21_000  # type: ignore[attr-defined]
    assert space.budget.params == 1_000_000


def test_models_without_a_formula_are_counted_once() -> None:
    space = EvoNorm(width=4, resolution=8, nodes=3)
    made = Bounded.around(space, params=(0, None))
    population = space.sample(np.random.default_rng(0), 4)
    [genotype, *_] = space.to_json(population)
    with torch.device("meta"):
        cost = count(space.build(genotype), (3, 8, 8))
    assert made.quantities(population)[0].tolist() == [cost.params, cost.macs]
    made.inner.build = None  # type: ignore[method-assign, assignment]
    assert made.quantities(population)[0].tolist() == [cost.params, cost.macs]


@pytest.mark.parametrize("inner", [SMALL, NasBench201(channels=4, cells=1), Tabular(params=3000)], ids=lambda s: s.name)
def test_bounds_are_of_what_the_evaluator_counts(inner: Space) -> None:
    made = Bounded.around(inner, macs=(0, None))
    population = made.sample(np.random.default_rng(0), 6)
    tasks = [
        Task(number=i, genotype=genotype, key=str(i), fidelity=0, repeat=0, seed=0)
        for i, genotype in enumerate(made.to_json(population))
    ]
    for found, own in zip(
        Costs().evaluate(tasks, EvaluationContext(space=made)), made.quantities(population), strict=True
    ):
        assert isinstance(found, Evaluated)
        assert [found.metrics["params"].value, found.metrics["macs"].value] == own.tolist()


def test_the_inner_space_shows_through() -> None:
    made = Bounded.around(SMALL, macs=(None, 10**6))
    assert isinstance(made, BlockSpace)
    assert (made.resolution, made.classes) == (16, 10)  # type: ignore[attr-defined]
    population = made.sample(np.random.default_rng(0), 5)
    assert made.keys(population) == SMALL.keys(population)
    assert made.digest != SMALL.digest != Bounded.around(SMALL, macs=(None, 10**6 - 1)).digest != made.digest
    again = SPACES.build({"name": "bounded", **made.config}, "space")
    assert again.digest == made.digest
    assert made.config["macs"] == [None, 10**6]
    within = Joint.of({"training": Choices(columns={"lr": [1, 2]}), "network": SMALL})
    joined = Bounded.around(within, macs=(3 * 10**5, 4 * 10**5))
    assert isinstance(joined._source, Listed)
    network = [genotype["network"] for genotype in joined.to_json(joined.sample(np.random.default_rng(0), 50))]
    assert Bounded.around(SMALL, macs=(3 * 10**5, 4 * 10**5)).admits(SMALL.from_json(network)).all()


def test_what_is_outside_is_refused_with_its_amount() -> None:
    made = Bounded.around(SMALL, macs=(3 * 10**5, 4 * 10**5), params=(None, 10**6))
    heavy = ["k5_e6"] * 4
    macs = chain_costs(SMALL, SMALL.from_json([heavy]))[0, 1]
    with pytest.raises(InputError, match=rf"has {macs} macs, outside space\.macs of \[300000, 400000\]"):
        made.validate(heavy)


def test_an_empty_space_says_how_near_it_is() -> None:
    for inner, bound in (
        (FBNetTiny(), (None, 10)),
        (SMALL, (None, 10)),
        (Tabular(params=2000, terminals=6), (10**6, None)),
    ):
        made = Bounded.around(inner, params=bound)
        with pytest.raises(InputError, match=r"no member that could be found; the nearest of 32 draws has \d+ params"):
            made.sample(np.random.default_rng(0), 3)
    with pytest.raises(InputError, match="hardly a model"):
        Bounded.around(Tabular(), params=(None, 100)).sample(np.random.default_rng(0), 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"of": {"name": "fbnet-tiny"}}, r"space\.macs: None bounds nothing, nor does params"),
        ({"of": {"name": "fbnet-tiny"}, "macs": [5, 4]}, r"space\.macs: \(5.*, 4.*\) has nothing between"),
        ({"of": {"name": "fbnet-tiny"}, "params": [-1, None]}, r"space\.params: .* is no pair of amounts"),
        ({"of": {"name": "fbnet-tiny"}, "macs": [1]}, r"space\.macs"),
        ({"of": {"name": "fbnet-tiny", "width": 0}, "macs": [1, None]}, r"space\.of\.width: 0.* is out of range"),
        ({"of": {"name": "choices", "columns": {"a": [1]}}, "macs": [1, 2]}, r"space\.of: 'choices' has no models"),
    ],
)
def test_bounds_that_cannot_be_used_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPACES.build({"name": "bounded", **config}, "space")


def test_searches_stay_inside(tmp_path: Path) -> None:
    bounded = {"name": "bounded", "of": {"name": "tabular", "params": 50_000}, "macs": [1000, 3000]}
    space = {"name": "joint", "parts": {"network": bounded, "training": {"name": "choices", "columns": {"lr": [1, 2]}}}}
    for strategy in ("random", "regularized-evolution", "nsga2"):
        job = {
            "name": "bounded",
            "space": space,
            "evaluators": [{"name": "costs"}],
            "objectives": [{"metric": "params", "direction": "min"}, {"metric": "macs", "direction": "max"}],
            "strategy": {"name": strategy, "population": 10} if strategy != "random" else {"name": strategy},
            "budget": {"evaluations": 30},
            "workers": {"executor": "inline", "count": 1},
        }
        done = archfront.run(job, db=tmp_path / f"{strategy}.db")
        assert done.status()["evaluations"]["done"] == 30
        assert len(done.front(where="macs >= 1000 and macs <= 3000")) > 0
        # Of all evaluations, not only those of the front: the condition comes first.
        assert len(done.front(where="macs < 1000")) == len(done.front(where="macs > 3000")) == 0
    with pytest.raises(InputError, match=r"finite product spaces only.*Use random, regularized-evolution or nsga2"):
        STRATEGIES.get("optuna:tpe", "strategy.name").check(
            Problem(space=Bounded.around(SMALL, macs=(None, 10**6)), objectives=1)
        )
