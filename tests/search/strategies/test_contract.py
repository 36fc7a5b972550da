"""What every strategy promises, tried on each one in the table, with and without successive halving."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.search.strategies.halving import Halving, with_halving
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Ask, Problem, Proposals, Strategy

from .driver import Engine, FoldedSpace, Row, ToySpace, bumpy, columns, same

OURS = ["random", "regularized-evolution", "nsga2", "surrogate-nsga2"]
HEAVY = {"optuna:gp"}

# Small enough that every strategy leaves its random beginning within a test.
SETTINGS: dict[str, dict[str, Any]] = {
    "regularized-evolution": {"population": 8, "sample": 3},
    "nsga2": {"population": 8},
    "surrogate-nsga2": {"population": 8, "generations": 3},
    "optuna:nsgaii": {"population_size": 6},
    "optuna:nsgaiii": {"population_size": 6},
    "optuna:tpe": {"n_startup_trials": 6},
    "optuna:cmaes": {"popsize": 4},
    "optuna:gp": {"n_startup_trials": 6},
    "optuna:qmc": {"scramble": True},
    "optuna:partialfixed": {"fixed": {"c1": 2}, "base": "nsgaii"},
}


# What a sampler refuses: CMA-ES has one objective.
REFUSED = {("optuna:cmaes", 2)}


def problem(objectives: int, halving: bool = False, sizes: tuple[int, ...] = (4, 3, 3, 5)) -> Problem:
    fidelities = (1, 3, 9) if halving else (0,)
    return Problem(space=FoldedSpace(columns(*sizes)), objectives=objectives, fidelities=fidelities, seed=11)


def made(name: str, given: Problem) -> Strategy:
    STRATEGIES.get(name, "strategy.name").check(given)
    strategy = STRATEGIES.build({"name": name, **SETTINGS.get(name, {})}, "strategy", _problem=given)
    return with_halving(strategy, given)


SERVED = [
    (name, objectives, halving)
    for name in STRATEGIES
    for objectives in (1, 2)
    for halving in (False, True)
    if (name, objectives) not in REFUSED
]
IDS = {case: f"{case[0]}-{case[1]}-{'halving' if case[2] else 'plain'}" for case in SERVED}
# A Gaussian process takes seconds: its cases are in the slow suite.
LIGHT = [pytest.param(*case, id=IDS[case]) for case in SERVED if case[0] not in HEAVY]


@pytest.mark.parametrize(("name", "objectives"), sorted(REFUSED))
def test_what_a_sampler_cannot_serve_is_refused(name: str, objectives: int) -> None:
    with pytest.raises(InputError):
        STRATEGIES.get(name, "strategy.name").check(problem(objectives))


def foreign(given: Problem) -> dict[int, Proposals]:
    """Proposals from elsewhere: before the first answer, and amid a search, at a higher fidelity too."""
    rng = np.random.default_rng(3)
    first = given.space.canonical(given.space.sample(rng, 3))
    later = given.space.canonical(given.space.sample(rng, 2))
    return {
        0: Proposals(population=first, fidelities=np.full(3, given.fidelities[0])),
        5: Proposals(population=later, fidelities=np.array([given.fidelities[0], given.fidelities[-1]])),
    }


def unbroken(name: str, given: Problem, asks: int) -> list[Row]:
    return Engine(made(name, given), given, bumpy(given.objectives), seeds=foreign(given)).run(asks)


@functools.cache
def log_of(name: str, objectives: int, halving: bool) -> list[Row]:
    """One unbroken run for all tests that read it."""
    return unbroken(name, problem(objectives, halving), 24)


@pytest.mark.parametrize(("name", "objectives", "halving"), LIGHT)
def test_resumed_equals_unbroken(name: str, objectives: int, halving: bool) -> None:
    check_resuming(name, problem(objectives, halving), log_of(name, objectives, halving))


@pytest.mark.slow
@pytest.mark.parametrize(("objectives", "halving"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", sorted(HEAVY))
def test_heavy_resumed_equals_unbroken(name: str, objectives: int, halving: bool) -> None:
    given = problem(objectives, halving)
    check_resuming(name, given, unbroken(name, given, 12))


def check_resuming(name: str, given: Problem, log: list[Row]) -> None:
    assert STRATEGIES.get(name, "strategy.name").replayable
    # All cuts for what is quick, one more ask each; the rest is cut where the random beginning is over, and early.
    cuts = {cut: cut + 2 for cut in range(1, len(log))} if name in OURS else {3: 5, 2 * len(log) // 3: len(log)}
    for cut, end in cuts.items():
        resumed = Engine(made(name, given), given, bumpy(given.objectives), seeds=foreign(given))
        resumed.resume(log[:cut])
        again = resumed.run(min(end, len(log)))
        for live, row in zip(log[: len(again)], again, strict=True):
            assert same(live.proposals, row.proposals), f"ask {row.ask.number} differs after a cut at {cut}"


@pytest.mark.parametrize(("name", "objectives", "halving"), LIGHT)
def test_proposals_are_new_members_of_the_space(name: str, objectives: int, halving: bool) -> None:
    check_log(problem(objectives, halving), log_of(name, objectives, halving))


def check_log(given: Problem, log: list[Row]) -> None:
    asked: set[tuple[bytes, int]] = set()
    for row in log:
        population, fidelities = row.proposals.population, row.proposals.fidelities
        given.space.from_json(given.space.to_json(population))
        assert np.array_equal(given.space.canonical(population), population)
        assert fidelities.dtype == np.int64
        assert set(fidelities.tolist()) <= set(given.fidelities)
        new = list(zip(given.space.keys(population), fidelities.tolist(), strict=True))
        if not row.foreign:
            assert len(new) <= row.ask.count
            assert not asked & set(new)
            assert len(set(new)) == len(new)
        asked.update(new)


@pytest.mark.parametrize(("name", "objectives", "halving"), LIGHT)
def test_asking_changes_nothing(name: str, objectives: int, halving: bool) -> None:
    given = problem(objectives, halving)
    engine = Engine(made(name, given), given, bumpy(objectives))
    engine.run(10)
    ask = Ask(number=10, count=3, first=engine.evaluated, seed=given.seed)
    first, second = engine.strategy.ask(ask), engine.strategy.ask(ask)
    assert len(first)
    assert same(first, second)


@pytest.mark.parametrize(("name", "objectives", "halving"), LIGHT)
def test_a_small_space_is_exhausted(name: str, objectives: int, halving: bool) -> None:
    fidelities = (1, 3) if halving else (0,)
    given = Problem(space=ToySpace(columns(2, 3, 2)), objectives=objectives, fidelities=fidelities, seed=2)
    engine = Engine(made(name, given), given, bumpy(objectives), flawed=False)
    engine.run(200)
    check_log(given, engine.log)
    lowest = sum(int(np.sum(row.proposals.fidelities == fidelities[0])) for row in engine.log)
    assert lowest == (4 if name == "optuna:partialfixed" else 12)
    assert len(engine.log) < 200
    assert not len(engine.strategy.ask(Ask(number=999, count=4, first=999, seed=2)))


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - HEAVY))
def test_another_seed_gives_other_proposals(name: str) -> None:
    answers = []
    for seed in (1, 2):
        given = Problem(space=ToySpace(columns(9, 9, 9, 9)), objectives=1, seed=seed)
        answers.append(made(name, given).ask(Ask(number=0, count=5, first=0, seed=seed)).population)
    # An unscrambled sequence starts at a random point too; a grid has its order from the seed.
    assert not np.array_equal(answers[0], answers[1])


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_asks_without_results_differ(name: str) -> None:
    given = problem(1)
    strategy = made(name, given)
    seen: set[bytes] = set()
    for number in range(4):
        ask = Ask(number=number, count=3, first=3 * number, seed=given.seed)
        proposals = strategy.ask(ask)
        assert len(proposals) == 3
        seen.update(given.space.keys(proposals.population))
        strategy.asked(ask, proposals)
    assert len(seen) == 12


def test_halving_wraps_only_where_there_are_fidelities() -> None:
    single = problem(1)
    assert not isinstance(with_halving(made("random", single), single), Halving)


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from tests_of_strategies.test_contract import problem, unbroken
for name, objectives in {cases!r}:
    for row in unbroken(name, problem(objectives), 16):
        print(name, objectives, row.proposals.population.tolist(), row.proposals.memory)
"""


@pytest.mark.slow
def test_another_process_answers_alike(tmp_path: Path) -> None:
    """A job is resumed in another process, where sets have another order."""
    # This folder under a name that a fresh interpreter can import.
    (tmp_path / "tests_of_strategies").symlink_to(os.path.dirname(__file__), target_is_directory=True)
    cases = sorted({case[:2] for case in SERVED if case[0] not in HEAVY})
    script = SCRIPT.format(path=[str(tmp_path)], cases=cases)
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=600,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert {tuple(line.split()[:2]) for line in outputs[0]} == {(n.encode(), str(o).encode()) for n, o in cases}
