"""From a job's words to its objects: every name looked up, every combination checked, before anything is stored."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from archfront.db.columns import FIXED
from archfront.db.expressions import Condition, Constraint, parse_constraint
from archfront.errors import InputError, suggestion
from archfront.evaluators.evaluator import EvaluationContext, Evaluator, Metric, MetricSpec
from archfront.evaluators.registry import EVALUATORS
from archfront.registry import validated_arguments
from archfront.search.job import Finalists, JobSpec, Tune
from archfront.search.learning import learning_evaluator
from archfront.search.strategies.halving import with_halving
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Limit, Problem, Strategy
from archfront.spaces.policies.policy_chain import has_policies
from archfront.spaces.registry import SPACES
from archfront.spaces.space import Space

_OF_ALL = ("eager", "compile", "cuda-graph", "onnx", "half", "half-compile", "half-graph")
"""Backends of any networks; the others execute compressed ones."""
_RESERVED = {*FIXED, "evaluation", "key", "genotype"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the metrics of an evaluation mean for its job.

    Attributes:
        objectives: oriented so that less is better.
        violation: summed relative violation of the constraints, 0 where feasible.
    """

    objectives: tuple[float, ...]
    violation: float


class NonFiniteError(ValueError):
    """An objective or a constrained metric is not a finite number."""


@dataclass(kw_only=True)
class ResolvedJob:
    """A job whose every name is bound."""

    spec: JobSpec
    space: Space
    evaluators: list[tuple[str, Evaluator]]
    metrics: dict[str, MetricSpec]
    constraints: list[Constraint]
    fidelities: tuple[int, ...]
    problem: Problem
    batch: int

    @property
    def signs(self) -> list[tuple[str, int]]:
        """Objectives as the ledger's writer wants them: (metric, -1 for those to maximise)."""
        return [(o.metric, -1 if o.direction == "max" else 1) for o in self.spec.objectives]

    def strategy(self) -> Strategy:
        """A fresh strategy of this job, wrapped for several fidelities where there are some."""
        strategy = STRATEGIES.build(self.spec.strategy, "strategy", _problem=self.problem)
        if len(self.fidelities) > 1 and self.spec.engine == "archfront":
            return with_halving(strategy, self.problem, eta=self.spec.halving.eta)
        return strategy

    def task_seed(self, key: str, repeat: int) -> int:
        """Seed of everything random in an evaluation: of the job, the candidate and the repeat, not the fidelity."""
        text = f"{self.spec.seed}/{key}/{repeat}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def judge(self, metrics: Mapping[str, Metric]) -> Verdict:
        """Objectives and violation of an evaluation's metrics.

        Raises:
            NonFiniteError: an objective or a constrained metric is missing or not finite.
        """
        values = {}
        for name in {o.metric for o in self.spec.objectives} | {c.metric for c in self.constraints}:
            metric = metrics.get(name)
            if metric is None:
                raise NonFiniteError(f"the evaluators reported no {name}, which the job needs")
            if not math.isfinite(metric.value):
                raise NonFiniteError(f"{name} is {metric.value}: not a finite number")
            values[name] = metric
        violation = sum(_violation(constraint, values[constraint.metric]) for constraint in self.constraints)
        return Verdict(objectives=tuple(sign * values[name].value for name, sign in self.signs), violation=violation)


def resolve(spec: JobSpec) -> ResolvedJob:
    """Bind and check a job.

    Raises:
        InputError: an unknown space, evaluator, data set, strategy or metric; arguments that their classes refuse;
            combinations that cannot work. The message names the field, the value and the remedy.
    """
    space = SPACES.build(spec.space, "space")
    space.sample(np.random.default_rng(0), 1)  # bounds that leave nothing are refused here, not by a worker
    if spec.seeds:
        space.genotypes_of(spec.seeds)
    evaluators = build_evaluators(spec)
    context = EvaluationContext(space=space, data=spec.data, threads=max(1, int(spec.workers.cpus)))
    for _, evaluator in evaluators:
        evaluator.check(context)
    learning_evaluator(evaluators)
    _check_workers(spec, evaluators)
    if spec.reuse and spec.engine == "tune":
        remedy = "Leave one of them out: Tune's schedulers hear only of what its own trials evaluated."
        raise InputError("reuse", True, "cannot be used with `engine: tune`", remedy)
    metrics = _metrics(evaluators)
    fidelities = _fidelities(evaluators)
    for i, objective in enumerate(spec.objectives):
        _known_metric(objective.metric, f"objectives.{i}.metric", metrics)
    if len({o.metric for o in spec.objectives}) < len(spec.objectives):
        raise InputError("objectives", [o.metric for o in spec.objectives], "names a metric twice", "Name each once.")
    constraints = []
    for i, text in enumerate(spec.constraints):
        constraint = parse_constraint(text, f"constraints.{i}")
        known = _known_metric(constraint.metric, f"constraints.{i}", metrics)
        if constraint.confidence is not None and not known.has_std:
            raise InputError(
                f"constraints.{i}", text, f"asks for a confidence, but {known.name} has no known error", "Drop the '@'."
            )
        constraints.append(constraint)
    if spec.finalists.where is not None:
        Condition(spec.finalists.where, metrics, "finalists.where")
    check_backends(spec.finalists, space)
    problem = Problem(
        space=space, objectives=len(spec.objectives), fidelities=fidelities, seed=spec.seed,
        limits=_limits(spec, constraints),
    )  # fmt: skip
    _check_strategy(spec, problem)
    _check_engine(spec, fidelities)
    batch = spec.workers.batch or max(1, min(evaluator.batch_size for _, evaluator in evaluators))
    return ResolvedJob(
        spec=spec, space=space, evaluators=evaluators, metrics=metrics, constraints=constraints,
        fidelities=fidelities, problem=problem, batch=1 if spec.engine == "tune" else batch,
    )  # fmt: skip


def check_backends(plan: Finalists, space: Space) -> None:
    """Refuse backends that execute files where candidates are no policies of a trained network.

    Raises:
        InputError: names the first.
    """
    if plan.count and not has_policies(space):
        for i, backend in enumerate(plan.backends):
            if backend not in _OF_ALL:
                problem = f"executes compressed networks, and {space.name!r} has no policies"
                raise InputError(f"finalists.backends.{i}", backend, problem, f"Give {', '.join(_OF_ALL)}.")


def build_evaluators(spec: JobSpec) -> list[tuple[str, Evaluator]]:
    """The evaluators of a job by name, in its order."""
    built: list[tuple[str, Evaluator]] = []
    for i, config in enumerate(spec.evaluators):
        evaluator = EVALUATORS.build(config, f"evaluators.{i}")
        if config["name"] in dict(built):
            raise InputError(f"evaluators.{i}.name", config["name"], "is given twice", "Give each evaluator once.")
        built.append((str(config["name"]), evaluator))
    return built


def _check_workers(spec: JobSpec, evaluators: list[tuple[str, Evaluator]]) -> None:
    workers = spec.workers
    known = dict(evaluators)
    placed: set[str] = set()
    for name, kind in workers.classes.items():
        for evaluator in kind.evaluators:
            field = f"workers.classes.{name}.evaluators"
            if evaluator not in known:
                raise InputError(field, evaluator, "is no evaluator of this job", suggestion(evaluator, known))
            if evaluator in placed:
                raise InputError(field, evaluator, "runs in another class too", "Name it in one of them.")
            placed.add(evaluator)
    kinds = [workers, *workers.classes.values()]
    if workers.executor != "ray" and (workers.classes or workers.resources or workers.device):
        asked = next(name for name in ("classes", "resources", "device") if getattr(workers, name))
        problem = f"are known to Ray alone, and the executor is {workers.executor!r}"
        raise InputError(f"workers.{asked}", getattr(workers, asked), problem, "Choose `executor: ray`.")
    if any(kind.device is not None for kind in kinds):
        for name, built in evaluators:
            if built.on_device and workers.needs_of(name).device is None:
                problem = "measures a device, but runs on workers that name none, while others do"
                remedy = "Name it in the `evaluators` of the class with the device."
                raise InputError("workers.classes", name, problem, remedy)


def _check_engine(spec: JobSpec, fidelities: tuple[int, ...]) -> None:
    if spec.engine == "archfront":
        if spec.tune != Tune():
            problem = "is given, but the job's engine is 'archfront'"
            raise InputError("tune", spec.tune.model_dump(), problem, "Set `engine: tune`, or drop it.")
        return
    if spec.workers.executor != "ray":
        problem = "cannot be used with `engine: tune`, which runs on Ray"
        raise InputError("workers.executor", spec.workers.executor, problem, "Choose `executor: ray`.")
    if spec.workers.classes:
        problem = "cannot be used with `engine: tune`: all steps of a trial run on one kind of worker"
        raise InputError("workers.classes", sorted(spec.workers.classes), problem, "Use the archfront engine.")
    if spec.workers.batch not in (None, 1):
        problem = "cannot be used with `engine: tune`: a trial is one candidate"
        raise InputError("workers.batch", spec.workers.batch, problem, "Leave it out.")
    # Importing Tune takes a second, which other jobs need not spend.
    from archfront.search.tune.schedulers import scheduler_settings

    scheduler_settings(spec.tune.scheduler, [(o.metric, o.direction) for o in spec.objectives], fidelities)


def _metrics(evaluators: list[tuple[str, Evaluator]]) -> dict[str, MetricSpec]:
    metrics: dict[str, MetricSpec] = {}
    for i, (name, evaluator) in enumerate(evaluators):
        for metric in evaluator.metrics:
            if metric.name in _RESERVED:
                raise InputError(
                    f"evaluators.{i}", metric.name, "is a column of every evaluation", "Name the metric otherwise."
                )
            if metric.name in metrics:
                raise InputError(
                    f"evaluators.{i}", name, f"reports {metric.name}, as an evaluator before it does", "Drop one."
                )
            metrics[metric.name] = metric
    return metrics


def _fidelities(evaluators: list[tuple[str, Evaluator]]) -> tuple[int, ...]:
    having = [(i, name, e.fidelities) for i, (name, e) in enumerate(evaluators) if e.fidelities]
    if len(having) > 1:
        names = [name for _, name, _ in having]
        raise InputError("evaluators", names, "both have fidelities", "Give fidelities to one of them.")
    if not having:
        return (0,)
    i, _, given = having[0]
    levels = list(given or ())
    if max(levels) >= 2**31:
        raise InputError(f"evaluators.{i}.fidelities", levels, "are too large", "Give numbers below 2147483648.")
    if any(later <= earlier for earlier, later in itertools.pairwise(levels)) or min(levels) < 0:
        raise InputError(f"evaluators.{i}.fidelities", levels, "do not rise", "Give rising numbers, e.g. [3, 9].")
    return tuple(levels)


def _known_metric(name: str, field: str, metrics: Mapping[str, MetricSpec]) -> MetricSpec:
    if name not in metrics:
        raise InputError(field, name, "is no metric of this job's evaluators", suggestion(name, metrics))
    return metrics[name]


def _limits(spec: JobSpec, constraints: Sequence[Constraint]) -> tuple[Limit, ...]:
    """Those of the constraints that concern an objective, whatever its error."""
    found = []
    for i, objective in enumerate(spec.objectives):
        sign = -1 if objective.direction == "max" else 1
        found += [
            Limit(objective=i, bound=sign * one.bound, upper=one.upper == (sign > 0))
            for one in constraints
            if one.metric == objective.metric and one.confidence is None
        ]
    return tuple(found)


def _check_strategy(spec: JobSpec, problem: Problem) -> None:
    config: dict[str, Any] = spec.strategy
    if "name" not in config:
        raise InputError("strategy", config, "has no 'name'", f"Give one of: {', '.join(STRATEGIES.names())}.")
    cls = STRATEGIES.get(str(config["name"]), "strategy.name")
    validated_arguments(cls, {k: v for k, v in config.items() if k != "name"}, "strategy")
    cls.check(problem)
    STRATEGIES.build(config, "strategy", _problem=problem)
    if spec.exact_resume and not cls.replayable:
        raise InputError(
            "strategy.name",
            config["name"],
            "cannot be replayed from the ledger, so a resumed job would differ from an unbroken one",
            "Set `exact_resume: false` to accept that, or choose another strategy.",
        )


def _violation(constraint: Constraint, metric: Metric) -> float:
    """How far a metric is outside of its bound, relative to the bound; 0 inside.

    With a confidence the value is first moved by the normal quantile of its standard deviation.
    """
    value = metric.value
    if constraint.confidence is not None:
        if metric.std is None:
            raise NonFiniteError(f"{constraint.metric} came without a standard deviation, which '{constraint}' needs")
        margin = NormalDist().inv_cdf(constraint.confidence) * metric.std
        value += margin if constraint.upper else -margin
    excess = value - constraint.bound if constraint.upper else constraint.bound - value
    return max(0.0, excess) / max(abs(constraint.bound), 1e-12)
