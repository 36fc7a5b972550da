"""Strategies on a space without columns: several objectives and early stopping on a grammar, exact resume, and the
variants of regularised evolution that grammars are searched with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from archfront.errors import InputError
from archfront.search.job import parse_spec
from archfront.search.resolve import resolve
from archfront.search.strategies.halving import with_halving
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Ask, Problem, Proposals, Strategy
from archfront.spaces.grammars.tabular import Tabular
from archfront.spaces.space import Population

from .driver import Engine, Objective, same

SPACE = Tabular(terminals=40, params=100_000)
RMIX = {"name": "regularized-evolution", "population": 12, "sample": 4, "random": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "random": {"name": "random"},
    "nsga2": {"name": "nsga2", "population": 8},
    "evolution": {"name": "regularized-evolution", "population": 8, "sample": 3},
    "mix": RMIX,
    "fixed": RMIX | {"update": False},
    "fixed-with-random": {"name": "regularized-evolution", "population": 6, "sample": 3, "update": False},
    "front": {"name": "regularized-evolution", "population": 8, "sample": 4, "winner": "front"},
}


def objective(objectives: int) -> Objective:
    """How far the number of parameters is from 5,000, and how deep the network is."""

    def evaluate(population: Population, fidelity: int) -> npt.NDArray[np.float64]:
        params, _ = SPACE.costs(population)
        depth = [SPACE.analysis(tree).totals.terminals for tree in population]
        far = np.abs(np.log(params / 5_000)) + 0.01 * fidelity
        return np.stack([far, -np.array(depth, dtype=np.float64)], axis=1)[:, :objectives]

    return evaluate


def engine(variant: str, objectives: int, halving: bool = False, **changes: Any) -> Engine:
    given = Problem(space=SPACE, objectives=objectives, fidelities=(1, 3) if halving else (0,), seed=5)
    config = VARIANTS[variant] | changes
    STRATEGIES.get(config["name"], "strategy.name").check(given)
    strategy = with_halving(STRATEGIES.build(config, "strategy", _problem=given), given)
    return Engine(strategy, given, objective(objectives), seeds={0: founders(given)})


def founders(given: Problem) -> Proposals:
    names = [("stack", "linear16", "relu"), ("stack", "norm", "linear64"), ("stack", "linear8", "silu", "linear8")]
    return Proposals(population=SPACE.from_json(names), fidelities=np.full(3, given.fidelities[0]))


@pytest.mark.parametrize("halving", [False, True])
@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_resumed_equals_unbroken(variant: str, objectives: int, halving: bool) -> None:
    log = engine(variant, objectives, halving).run(24)
    assert sum(len(row.proposals) for row in log) > 30
    if halving:
        assert any((row.proposals.fidelities == 3).any() for row in log)
    for cut in (2, 9, 17):
        resumed = engine(variant, objectives, halving)
        resumed.resume(log[:cut])
        again = resumed.run(len(log))
        for live, row in zip(log, again, strict=True):
            assert same(live.proposals, row.proposals)


def parents_of(strategy: Strategy) -> set[bytes]:
    return {m.key for m in strategy._members}  # type: ignore[attr-defined]


def test_without_random_candidates_all_descend_from_the_seeds() -> None:
    run = engine("mix", 1)
    run.step()
    first = run.strategy.ask(Ask(number=1, count=1, first=3, seed=5))
    assert not len(first), "seeds are out, and nobody is there to breed from"
    while not run.strategy._members:  # type: ignore[attr-defined]
        told = run.finished(np.random.default_rng(0))
        assert told is not None
        run.strategy.tell(told)
    child = run.strategy.ask(Ask(number=1, count=1, first=3, seed=5))
    assert len(child) == 1


def test_without_update_only_founders_are_parents() -> None:
    run = engine("fixed", 1)
    run.run(30)
    assert parents_of(run.strategy) <= set(SPACE.keys(founders(run.problem).population))
    run = engine("fixed-with-random", 1)
    run.run(30)
    drawn = {k for row in run.log[:8] for k in SPACE.keys(row.proposals.population)}
    assert 1 < len(parents_of(run.strategy)) <= 6
    assert parents_of(run.strategy) <= drawn


def test_front_winners_are_beaten_by_none_of_their_tournament() -> None:
    run = engine("front", 2, population=30, sample=5)
    run.flawed = False
    run.run(60)
    strategy: Any = run.strategy
    pool = strategy._pool()
    winners = strategy._winners(np.random.default_rng(1), pool, 400)
    tournaments = np.random.default_rng(1).integers(len(pool), size=(400, 5))
    places = set()
    for winner, entrants in zip(winners, tournaments, strict=True):
        assert winner in entrants
        own, others = pool.objectives[winner], pool.objectives[entrants]
        assert not ((others <= own).all(axis=1) & (others < own).any(axis=1)).any()
        places.add(int((np.sort(entrants) == winner).argmax()))
    # The best by rank and crowding is not the only one that wins.
    assert len(places) > 1


def test_evolution_finds_better_networks_than_chance() -> None:
    def far(population: Population, fidelity: int) -> npt.NDArray[np.float64]:
        terminals = np.array([SPACE.analysis(tree).totals.terminals for tree in population])
        return objective(1)(population, fidelity) + np.abs(terminals - 25)[:, np.newaxis]

    best: dict[str, list[float]] = {"random": [], "mix": []}
    for variant, found in best.items():
        for seed in range(4):
            run = engine(variant, 1)
            run.objective, run.flawed, run.seed = far, False, seed
            run.run(60)
            found.append(min(far(row.proposals.population, 0).min() for row in run.log if len(row.proposals)))
    assert np.mean(best["mix"]) < 0.5 * np.mean(best["random"])


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n.startswith("optuna:")])
def test_samplers_that_need_columns_say_so_when_the_job_is_read(name: str) -> None:
    extra = {"fixed": {}} if name == "optuna:partialfixed" else {}
    job = {
        "name": "x", "space": {"name": "einspace"}, "evaluators": [{"name": "costs"}],
        "objectives": [{"metric": "params", "direction": "min"}], "strategy": {"name": name, **extra},
        "budget": {"evaluations": 3},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"finite product spaces only.*regularized-evolution"):
        resolve(parse_spec(job))
    resolve(parse_spec(job | {"strategy": {"name": "nsga2"}}))
