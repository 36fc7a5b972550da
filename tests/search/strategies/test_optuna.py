"""Optuna's samplers as strategies: the table, the settings, and what reaches the study."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.trial import TrialState

from archfront.errors import InputError
from archfront.search.strategies.optuna_sampler import OptunaStrategy, strategy_class
from archfront.search.strategies.optuna_settings import settings_of
from archfront.search.strategies.optuna_study import CONSTRAINT, quiet, random_states, reseed
from archfront.search.strategies.registry import OPTUNA_SAMPLERS, STRATEGIES
from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy

from .driver import Engine, ToySpace, bumpy, columns


def problem(objectives: int = 1, *sizes: int, ordered: bool | None = None, seed: int = 1) -> Problem:
    return Problem(space=ToySpace(columns(*(sizes or (5, 4, 3)), ordered=ordered)), objectives=objectives, seed=seed)


def built(name: str, given: Problem, **settings: Any) -> Strategy:
    return STRATEGIES.build({"name": name, **settings}, "strategy", _problem=given)


def told(strategy: OptunaStrategy, number: int, values: list[float], violation: float = 0.0) -> None:
    strategy.tell(
        Results(
            numbers=np.array([number]),
            fidelities=np.array([0]),
            objectives=np.array([values]),
            violations=np.array([violation]),
        )
    )


def test_the_table_names_every_sampler_of_optuna() -> None:
    samplers = {
        name
        for name, member in vars(optuna.samplers).items()
        if inspect.isclass(member) and issubclass(member, BaseSampler) and member not in (BaseSampler, BaseGASampler)
    }
    assert set(OPTUNA_SAMPLERS.values()) == samplers
    for short, name in OPTUNA_SAMPLERS.items():
        cls = STRATEGIES.get(f"optuna:{short}", "strategy.name")
        assert cls is strategy_class(name)
        assert cls.name == f"optuna:{short}"
        assert cls.replayable


def test_listing_names_imports_no_optuna() -> None:
    script = (
        "import sys\n"
        "from archfront.search.strategies.registry import STRATEGIES\n"
        "assert 'optuna:tpe' in STRATEGIES.names()\n"
        "assert 'optuna' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("optuna:tpe", {"n_startup_trails": 3}, r"strategy\.n_startup_trails.*Did you mean 'n_startup_trials'"),
        ("optuna:tpe", {"n_startup_trials": -1}, r"strategy\.n_startup_trials.*greater than or equal to 0"),
        ("optuna:tpe", {"seed": 3}, r"strategy\.seed.*unknown key"),
        ("optuna:tpe", {"prior_weight": 2.0}, r"strategy\.prior_weight.*unknown key"),
        ("optuna:nsgaii", {"population_size": 1}, r"strategy\.population_size.*refused by Optuna"),
        ("optuna:nsgaii", {"population_size": "many"}, r"strategy\.population_size"),
        ("optuna:nsgaii", {"crossover": "twisted"}, r"strategy\.crossover.*'uniform'"),
        ("optuna:qmc", {"qmc_type": "lattice"}, r"strategy\.qmc_type.*refused by Optuna"),
        ("optuna:partialfixed", {"fixed": {"c9": 1}}, r"strategy\.fixed\.c9.*Known: c0"),
        ("optuna:partialfixed", {"fixed": {"c1": 7}}, r"strategy\.fixed\.c1.*not one of its choices"),
        ("optuna:partialfixed", {"fixed": {}, "base": "tpee"}, r"strategy\.base.*'tpe'"),
    ],
)
def test_wrong_settings_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        built(name, problem(), **settings)


def test_settings_reach_the_sampler() -> None:
    strategy = built("optuna:nsgaii", problem(), population_size=8, crossover="sbx", mutation_prob=0.3)
    assert isinstance(strategy, OptunaStrategy)
    assert strategy.batch == 8
    with quiet():
        sampler: Any = strategy._sampler()
    assert type(sampler._child_generation_strategy._crossover).__name__ == "SBXCrossover"
    assert sampler._child_generation_strategy._mutation_prob == 0.3
    assert {"population_size", "swapping_prob", "crossover"} <= set(settings_of(optuna.samplers.NSGAIISampler))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("optuna:cmaes", problem(2), "one objective only.*optuna:nsgaii.*nsga2"),
        ("optuna:cmaes", problem(1, 3, 3, ordered=False), "no ordered decision.*optuna:tpe"),
        ("optuna:grid", problem(1, *[9] * 8), "too many.*optuna:tpe"),
    ],
)
def test_what_cannot_be_served_is_refused(name: str, given: Problem, message: str) -> None:
    with pytest.raises(InputError, match=message):
        STRATEGIES.get(name, "strategy.name").check(given)


def test_a_space_without_columns_is_refused() -> None:
    endless: Any = type("Endless", (), {})()
    with pytest.raises(InputError, match=r"finite product spaces only.*nsga2"):
        STRATEGIES.get("optuna:tpe", "strategy.name").check(Problem(space=endless, objectives=1))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"optuna:cmaes.*'cmaes', which is not installed.*pip install cmaes"):
        STRATEGIES.get("optuna:cmaes", "strategy.name").check(problem())


@pytest.mark.parametrize("name", [n for n in OPTUNA_SAMPLERS if n != "partialfixed"])
def test_every_random_state_is_seeded(name: str) -> None:
    strategy = built(f"optuna:{name}", problem())
    assert isinstance(strategy, OptunaStrategy)
    with quiet():
        first, second = strategy._sampler(), strategy._sampler()
    for sampler in (first, second):
        # States that were not created yet must not start from the system's entropy either.
        for state in random_states(sampler):
            state._rng = None
        reseed(sampler, 1, 2)
    draws = [[state.rng.random() for state in random_states(sampler)] for sampler in (first, second)]
    assert draws[0] == draws[1]
    assert draws[0]
    assert len(set(draws[0])) == len(draws[0])


def test_states_of_trials() -> None:
    given = problem(2)
    strategy = built("optuna:tpe", given)
    assert isinstance(strategy, OptunaStrategy)
    ask = Ask(number=0, count=4, first=0, seed=1)
    strategy.asked(ask, strategy.ask(ask))
    told(strategy, 2, [1, 2])
    trials = strategy._study.trials
    assert [t.state for t in trials] == [
        TrialState.RUNNING,
        TrialState.RUNNING,
        TrialState.COMPLETE,
        TrialState.RUNNING,
    ]
    assert trials[2].values == [1, 2]
    assert not trials[2].constraints
    told(strategy, 0, [np.nan, np.nan], np.inf)
    told(strategy, 3, [3, 4], 0.5)
    trials = strategy._study.trials
    assert trials[0].state == TrialState.FAIL
    assert trials[3].constraints == {"violation": 0.5}
    # From the first violation on all trials have the constraint, earlier ones too.
    assert trials[2].constraints == {"violation": 0.0}
    assert trials[2].system_attrs[CONSTRAINT] == 0.0


def test_only_the_lowest_fidelity_reaches_the_study() -> None:
    given = Problem(space=ToySpace(columns(5, 4)), objectives=1, fidelities=(1, 3), seed=1)
    strategy = built("optuna:random", given)
    assert isinstance(strategy, OptunaStrategy)
    rows = given.space.sample(np.random.default_rng(0), 2)
    strategy.asked(Ask(number=0, count=2, first=0, seed=1), Proposals(population=rows, fidelities=np.array([3, 1])))
    strategy.tell(
        Results(
            numbers=np.array([0, 1]),
            fidelities=np.array([3, 1]),
            objectives=np.array([[5.0], [6.0]]),
            violations=np.zeros(2),
        )
    )
    assert [t.values for t in strategy._study.trials] == [[6.0]]


def test_a_repeated_candidate_gets_the_known_result() -> None:
    """Three points, so that a sampler repeats itself soon: the repetitions are trials with the twin's value."""
    strategy = built("optuna:random", problem(1, 3))
    assert isinstance(strategy, OptunaStrategy)
    for number in range(3):
        ask = Ask(number=number, count=1, first=number, seed=1)
        answer = strategy.ask(ask)
        strategy.asked(ask, answer)
        told(strategy, number, [float(answer.population[0, 0])])
    trials = strategy._study.trials
    assert len(trials) > 3
    assert all(t.values == [next(iter(t.params.values()))] for t in trials)


def test_seeds_join_the_generation_of_a_genetic_sampler() -> None:
    given = problem()
    strategy = built("optuna:nsgaii", given, population_size=4)
    assert isinstance(strategy, OptunaStrategy)
    rows = given.space.sample(np.random.default_rng(0), 2)
    strategy.asked(Ask(number=0, count=2, first=0, seed=1), strategy.proposals(rows))
    assert [t.system_attrs["NSGAIISampler:generation"] for t in strategy._study.trials] == [0, 0]


@pytest.mark.parametrize("name", ["nsgaii", "nsgaiii"])
def test_generations_go_on(name: str) -> None:
    """What the sampler noted of its trials is in the study after ``asked``, not only in the memory."""
    given = problem(2, 6, 6, 6)
    strategy = built(f"optuna:{name}", given, population_size=4)
    assert isinstance(strategy, OptunaStrategy)
    Engine(strategy, given, bumpy(2), flawed=False).run(20)
    key = OPTUNA_SAMPLERS[name] + ":generation"
    assert max(trial.system_attrs.get(key, 0) for trial in strategy._study.trials) >= 3


@pytest.mark.parametrize("name", ["random", "tpe", "nsgaii", "qmc", "grid", "bruteforce"])
def test_each_ask_has_its_own_randomness(name: str) -> None:
    """No repetition among a few proposals in a large space: equal random states would repeat the first ask."""
    given = problem(1, 9, 9, 9, 9)
    strategy = built(f"optuna:{name}", given)
    for number in range(4):
        ask = Ask(number=number, count=2, first=2 * number, seed=1)
        proposals = strategy.ask(ask)
        strategy.asked(ask, proposals)
        assert [new for _, _, new in proposals.memory["trials"]] == [True, True]


def test_asking_leaves_no_trial() -> None:
    strategy = built("optuna:random", problem())
    assert isinstance(strategy, OptunaStrategy)
    strategy.ask(Ask(number=0, count=3, first=0, seed=1))
    assert not strategy._study.trials


def test_cmaes_keeps_no_pickle() -> None:
    given = problem(1, 6, 6, 6, ordered=True)
    engine = Engine(built("optuna:cmaes", given, popsize=4), given, bumpy(1), flawed=False)
    log = engine.run(20)
    states = [
        attrs["cma:optimizer:0"]
        for row in log
        for _, attrs, _ in row.proposals.memory["trials"]
        if attrs and "cma:optimizer:0" in attrs
    ]
    assert states
    assert json.loads(states[-1])["class"] == "CMA"
    assert json.loads(states[-1])["state"]["_g"] >= 3


@pytest.mark.parametrize("settings", [{"with_margin": True}, {"use_separable_cma": True}, {"lr_adapt": True}])
def test_all_kinds_of_cmaes_are_restored(settings: dict[str, bool]) -> None:
    given = problem(1, 6, 6, 6, ordered=True)
    engine = Engine(built("optuna:cmaes", given, popsize=4, **settings), given, bumpy(1), flawed=False)
    assert sum("optimizer:0" in json.dumps(row.proposals.memory) for row in engine.run(16)) >= 2


def test_fixed_decisions_stay_fixed() -> None:
    given = problem()
    log = Engine(built("optuna:partialfixed", given, fixed={"c1": 2}, base="random"), given, bumpy(1)).run(30)
    population = np.concatenate([row.proposals.population for row in log])
    assert len(population) == 15
    assert (population[:, 1] == 2).all()
