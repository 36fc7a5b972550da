"""Every sampler of Optuna as a strategy ``optuna:<name>`` that can be replayed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.trial import FrozenTrial, TrialState

from archfront.errors import InputError, suggestion
from archfront.search.strategies.optuna_settings import arguments, settings_of
from archfront.search.strategies.optuna_study import CONSTRAINT, PlainCmaEsSampler, RewindableStorage, quiet, reseed
from archfront.search.strategies.registry import OPTUNA_SAMPLERS
from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy
from archfront.spaces.product import ColumnSpace
from archfront.spaces.space import Population

_TRIES = 10
_LARGEST_GRID = 100_000
_PACKAGES = {"cmaes": ["cmaes"], "gp": ["scipy", "torch"], "qmc": ["scipy"]}
_SINGLE_OBJECTIVE = ("cmaes",)

# Half-sampled trials are shown to other processes by these; ours are always complete, and the ledger keeps them.
_TRANSIENT = ("tpe:relative_params", "gp:relative_params")


class OptunaStrategy(Strategy):
    """One Optuna sampler on a finite product space; a subclass for each sampler is made by ``strategy_class``.

    Ordered columns become ``IntDistribution``, the others ``CategoricalDistribution``, both over choice indices.

    Replay. All the state of a search is in an Optuna study in memory, and only ``asked`` and ``tell`` change it:
    ``ask`` lets a fresh sampler, all of whose random states are seeded from (seed, ask number), add trials to the
    study, notes their parameters and attributes (NSGA-II's generation, CMA-ES's optimiser, ...) in
    ``Proposals.memory``, and takes the study back. ``asked`` adds them again from the memory, live and on replay
    alike, so both hold the same study. The memory makes a replay independent of Optuna's version and of arithmetic.

    Duplicates. A proposal that the job has had (the same canonical key) is asked for again, up to 10 times. Its trial
    stays: it gets the known result, at once or when that is in, so that the sampler learns where it already was;
    genetic samplers get it as failed, which they ignore, so that a generation consists of different individuals.
    After 10 tries a random new candidate takes the place, in a trial with exactly its parameters.

    Results. Only the lowest fidelity reaches the study. Failed evaluations become failed trials, which samplers
    ignore. Once a violation was seen, every trial has one constraint, the total violation; CMA-ES, QMC, grid, brute
    force and random have no use for it. Trials in flight are in the study as running ones: TPE and GP take them
    into account.
    """

    sampler: ClassVar[str]
    """The short name, as in ``optuna:<sampler>``."""

    sampler_class: ClassVar[type[BaseSampler]]

    def __init__(self, _problem: Problem, **settings: Any) -> None:
        super().__init__(_problem)
        self.check(_problem)
        assert isinstance(_problem.space, ColumnSpace)
        self.columns = _problem.space.columns
        # The number keeps the columns' order where Optuna sorts by name, and equal names apart.
        self._names = [f"{i:04d} {column.name}" for i, column in enumerate(self.columns)]
        self._distributions = {
            name: _distribution(len(column.choices), column.ordered)
            for name, column in zip(self._names, self.columns, strict=True)
        }
        self._seed = int(np.random.SeedSequence(abs(_problem.seed)).generate_state(1)[0] >> 1)
        self._settings = settings
        self._storage = RewindableStorage()
        with quiet():
            try:
                sampler = self._sampler()
            except (ValueError, TypeError) as error:
                named = next((key for key in settings if key in str(error)), None)
                field, value = (f"strategy.{named}", settings[named]) if named else ("strategy", settings)
                raise InputError(field, value, f"is refused by Optuna: {error}".rstrip("."), "Change it.") from None
            self._study = optuna.create_study(
                storage=self._storage, sampler=sampler, directions=["minimize"] * _problem.objectives
            )
        self._id = self._study._study_id
        genetic = _genetic(sampler)
        self._discards = genetic is not None
        self.batch = genetic.population_size if genetic else None
        self._running: dict[int, list[int]] = {}
        self._known: dict[bytes, int] = {}
        self._results: dict[int, tuple[list[float], float]] = {}
        self._constrained = False

    @classmethod
    def check(cls, problem: Problem) -> None:
        name = f"optuna:{cls.sampler}"
        if not isinstance(problem.space, ColumnSpace):
            problem_text = "serves finite product spaces only, where any choices together are a genotype"
            remedy = "Use random, regularized-evolution or nsga2."
            raise InputError("strategy.name", name, problem_text, remedy)
        for package in _PACKAGES.get(cls.sampler, []):
            if importlib.util.find_spec(package) is None:
                problem_text = f"needs the package {package!r}, which is not installed"
                raise InputError("strategy.name", name, problem_text, f"pip install {package}")
        if problem.objectives > 1 and cls.sampler in _SINGLE_OBJECTIVE:
            raise InputError("strategy.name", name, "serves one objective only", f"Use {_others(_SINGLE_OBJECTIVE)}.")
        if cls.sampler == "cmaes" and not any(c.ordered and len(c.choices) > 1 for c in problem.space.columns):
            remedy = f"Use {_others(['cmaes'])}."
            raise InputError("strategy.name", name, "has no ordered decision of this space to work on", remedy)
        # Not the space's size: the grid also lists decisions that do not count.
        points = math.prod(len(column.choices) for column in problem.space.columns)
        if cls.sampler == "grid" and points > _LARGEST_GRID:
            text = f"lists the whole space, and {points} points are too many (limit {_LARGEST_GRID})"
            raise InputError("strategy.name", name, text, f"Use {_others(['grid'])}.")

    def ask(self, ask: Ask) -> Proposals:
        mark = self._storage.mark(self._id)
        try:
            with quiet():
                sampler = self._sampler()
                reseed(sampler, abs(ask.seed), ask.number)
                self._study.sampler = sampler
                return self._drawn(ask)
        finally:
            self._storage.rewind(self._id, mark)

    def remember(self, ask: Ask, proposals: Proposals) -> None:
        at = np.flatnonzero(proposals.fidelities == self.problem.fidelities[0])
        memory = proposals.memory
        if memory is None:
            trials = [[row.tolist(), None, True] for row in proposals.population[at]]
        else:
            trials = memory["trials"]
        if not trials:
            return
        keys = self.space.keys(np.array([params for params, _, _ in trials], dtype=np.int16))
        numbers = iter((ask.first + at).tolist())
        with quiet():
            for key, (params, attrs, new) in zip(keys, trials, strict=True):
                trial = self._trial(params, attrs)
                number = next(numbers, None) if new else None
                if number is not None:
                    self._known.setdefault(key, number)
                    self._running.setdefault(number, []).append(trial._trial_id)
                elif new:
                    # Fewer proposals were stored than answered.
                    self._finish(trial._trial_id, [np.nan], np.inf)
                elif not self._settled(trial._trial_id, key):
                    self._running[self._known[key]].append(trial._trial_id)
        for name, value in (memory["study"] if memory else {}).items():
            self._storage.set_study_system_attr(self._id, name, value)

    def learn(self, population: Population, results: Results) -> None:
        with quiet():
            for i in np.flatnonzero(results.fidelities == self.problem.fidelities[0]).tolist():
                number = int(results.numbers[i])
                violation = float(results.violations[i])
                self._results[number] = (results.objectives[i].tolist(), violation)
                if np.isfinite(violation) and violation > 0 and not self._constrained:
                    self._constrained = True
                    self._storage.make_constrained(self._id)
                for trial in self._running.pop(number):
                    self._finish(trial, *self._results[number])

    def _sampler(self) -> BaseSampler:
        """A new sampler; what must not change during a job (the order of a grid, a scrambled sequence) has its seed."""
        given = arguments(self.sampler_class, self._settings) | {"seed": self._seed}
        if self.sampler in ("cmaes", "gp", "qmc"):
            given["warn_independent_sampling"] = False
        if self.sampler == "cmaes":
            return PlainCmaEsSampler(**given)
        if self.sampler == "grid":
            given["search_space"] = {
                name: range(len(column.choices)) for name, column in zip(self._names, self.columns, strict=True)
            }
        return self.sampler_class(**given)

    def _drawn(self, ask: Ask) -> Proposals:
        """Add trials to the study until enough of them are new."""
        lowest = self.problem.fidelities[0]
        attrs_before = self._storage.get_study_system_attrs(self._id)
        size = self.space.size
        rng = ask.rng()
        taken: set[bytes] = set()
        trials: list[tuple[int, bool]] = []
        rows: list[Population] = []
        while len(rows) < ask.count and (size is None or len(self._known) + len(taken) < size):
            for _ in range(_TRIES):
                trial = self._study.ask(self._distributions)
                row = np.array([[trial.params[name] for name in self._names]], dtype=np.int16)
                key = self.space.keys(row)[0]
                new = key not in taken and (key, lowest) not in self._seen
                trials.append((trial._trial_id, new))
                if new:
                    break
                self._settled(trial._trial_id, key)
            else:
                row = self._random(rng, taken)
                if not len(row):
                    break
                key = self.space.keys(row)[0]
                trials.append((self._trial(row[0].tolist(), None)._trial_id, True))
            taken.add(key)
            rows.append(self.space.canonical(row))
        attrs = self._storage.get_study_system_attrs(self._id)
        memory = {
            "trials": [self._noted(*trial) for trial in trials],
            "study": {name: value for name, value in attrs.items() if attrs_before.get(name) is not value},
        }
        population = np.concatenate(rows) if rows else self.space.sample(rng, 0)
        # Through JSON, as the ledger keeps it: live and on replay the study gets the very same values.
        return self.proposals(population, json.loads(json.dumps(memory)))

    def _random(self, rng: np.random.Generator, taken: set[bytes]) -> Population:
        """One candidate that the job has not had and this ask does not have, or none."""

        def generate(count: int) -> Population:
            drawn = self._fixed(self.space.sample(rng, count))
            kept: Population = drawn[np.array([key not in taken for key in self.space.keys(drawn)], dtype=bool)]
            return kept

        return self.fresh(1, generate)

    def _fixed(self, population: Population) -> Population:
        """The population with the decisions that are fixed (``optuna:partialfixed``)."""
        return population

    def _noted(self, trial_id: int, new: bool) -> list[Any]:
        trial = self._storage.get_trial(trial_id)
        attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith(_TRANSIENT) and k != CONSTRAINT}
        return [[trial.params[name] for name in self._names], attrs, new]

    def _trial(self, params: Iterable[int], attrs: dict[str, Any] | None) -> FrozenTrial:
        """Add a running trial; ``attrs`` None means that no sampler made it."""
        named = dict(zip(self._names, (int(p) for p in params), strict=True))
        trial = self._storage.new_trial(self._id, named, self._distributions, attrs or {})
        genetic = _genetic(self._study.sampler)
        if attrs is None and genetic:
            # Without a generation a genetic sampler would never look at it.
            self._study._thread_local.cached_all_trials = None
            genetic.get_trial_generation(self._study, trial)
        return trial

    def _settled(self, trial_id: int, key: bytes) -> bool:
        """Finish a trial that repeats a candidate, if that has a result; False where it is still to come."""
        if self._discards:
            self._finish(trial_id, [np.nan], np.inf)
            return True
        number = self._known.get(key)
        if number is None or number not in self._results:
            return False
        self._finish(trial_id, *self._results[number])
        return True

    def _finish(self, trial_id: int, objectives: list[float], violation: float) -> None:
        if np.isfinite(violation) and np.isfinite(objectives).all():
            if self._constrained:
                self._storage.set_trial_system_attr(trial_id, CONSTRAINT, violation)
            self._end(trial_id, TrialState.COMPLETE, objectives)
        else:
            self._end(trial_id, TrialState.FAIL, None)

    def _end(self, trial_id: int, state: TrialState, values: list[float] | None) -> None:
        # Grid and brute force look at all trials here, only to tell ``Study.optimize`` when to stop.
        if self.sampler not in ("grid", "bruteforce"):
            trial = self._storage.get_trial(trial_id)
            self._study.sampler.after_trial(self._study, trial, state, values)
        self._storage.set_trial_state_values(trial_id, state, values)


class PartialFixedStrategy(OptunaStrategy):
    """Optuna's ``PartialFixedSampler``: some decisions fixed, the others left to another sampler.

    Args:
        fixed: column name -> choice.
        base: short name of the sampler that decides the others, with its default settings.
    """

    def __init__(self, _problem: Problem, fixed: dict[str, Any], base: str = "tpe") -> None:
        self.check(_problem)
        assert isinstance(_problem.space, ColumnSpace)
        known = sorted(set(OPTUNA_SAMPLERS) - {"partialfixed", "grid", "bruteforce"})
        if base not in known:
            raise InputError(
                "strategy.base", base, "is not a sampler that others can build on", suggestion(base, known)
            )
        strategy_class(OPTUNA_SAMPLERS[base]).check(_problem)
        columns = {column.name: (i, column) for i, column in enumerate(_problem.space.columns)}
        self._values: dict[int, int] = {}
        for name, choice in fixed.items():
            if name not in columns:
                raise InputError(f"strategy.fixed.{name}", choice, "is not of this space", suggestion(name, columns))
            i, column = columns[name]
            if choice not in column.choices:
                remedy = suggestion(str(choice), [str(c) for c in column.choices])
                raise InputError(f"strategy.fixed.{name}", choice, "is not one of its choices", remedy)
            self._values[i] = column.choices.index(choice)
        self._base = base
        super().__init__(_problem)

    def _sampler(self) -> BaseSampler:
        given: dict[str, Any] = {"seed": self._seed}
        if self._base in ("cmaes", "gp", "qmc"):
            given["warn_independent_sampling"] = False
        made: Any = (
            PlainCmaEsSampler if self._base == "cmaes" else getattr(optuna.samplers, OPTUNA_SAMPLERS[self._base])
        )
        fixed = {self._names[i]: index for i, index in self._values.items()}
        return optuna.samplers.PartialFixedSampler(fixed, made(**given))

    def _fixed(self, population: Population) -> Population:
        for i, index in self._values.items():
            population[:, i] = index
        return population


def _genetic(sampler: BaseSampler) -> BaseGASampler | None:
    """The genetic sampler, if it is one or fixes some decisions of one."""
    inner = getattr(sampler, "_base_sampler", sampler)
    return inner if isinstance(inner, BaseGASampler) else None


def _distribution(choices: int, ordered: bool) -> BaseDistribution:
    return IntDistribution(0, choices - 1) if ordered else CategoricalDistribution(tuple(range(choices)))


def _others(samplers: Iterable[str]) -> str:
    named = [f"optuna:{name}" for name in OPTUNA_SAMPLERS if name not in (*samplers, "partialfixed")]
    return ", ".join([*named, "random", "regularized-evolution"]) + " or nsga2"


def strategy_class(sampler: str) -> type[OptunaStrategy]:
    """The strategy of a sampler class of ``optuna.samplers``, made at the first call.

    Its ``__init__`` has the sampler's own keyword arguments (those that a job file can fill), so that the registry
    checks them like those of any strategy.
    """
    if sampler not in _CLASSES:
        name = next(short for short, cls in OPTUNA_SAMPLERS.items() if cls == sampler)
        sampler_class: type[BaseSampler] = getattr(optuna.samplers, sampler)
        base = PartialFixedStrategy if name == "partialfixed" else OptunaStrategy
        members: dict[str, Any] = {"name": f"optuna:{name}", "sampler": name, "sampler_class": sampler_class}
        if base is OptunaStrategy:
            members["__init__"] = _initialiser(sampler_class)
        members["__doc__"] = f"Optuna's ``{sampler}``.\n\n{inspect.getdoc(base)}"
        _CLASSES[sampler] = type(f"Optuna{sampler}", (base,), members)
    return _CLASSES[sampler]


_CLASSES: dict[str, type[OptunaStrategy]] = {}


def _initialiser(sampler: type[BaseSampler]) -> Any:
    settings = settings_of(sampler)

    def __init__(self: OptunaStrategy, _problem: Problem, **given: Any) -> None:
        OptunaStrategy.__init__(self, _problem, **given)

    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "_problem")]
    vars(__init__)["__signature__"] = inspect.Signature([*first, *settings.values()])
    __init__.__annotations__ = {name: parameter.annotation for name, parameter in settings.items()}
    return __init__


def __getattr__(name: str) -> Any:
    """The strategy classes of the registry's table: ``TPESampler`` and so on."""
    if name in OPTUNA_SAMPLERS.values():
        return strategy_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
