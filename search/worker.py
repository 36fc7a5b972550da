"""What a worker does with a batch of tasks, wherever it runs: build the job's evaluators once, evaluate, report."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from archfront.db.schema import DEVICE_LENGTH, NAME_LENGTH
from archfront.evaluators.deployment.student_files import recorded
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, Provenance, Task
from archfront.evaluators.latency.device import LOCAL_CPU, check_device
from archfront.evaluators.latency.measurement import measured_elsewhere
from archfront.plugins import Plugin
from archfront.search.job import JobSpec
from archfront.search.plugins import load_plugins
from archfront.search.resolve import build_evaluators
from archfront.spaces.registry import SPACES


@dataclass(kw_only=True)
class WorkerSetup:
    """All that a worker needs to know of its job; plain data that travels.

    Attributes:
        spec: the job file.
        plugins: the user's own files.
        artifacts: what the evaluators prepared, by name.
        files: folder or URI for checkpoints, or None.
        threads: that an evaluation may use.
        evaluators: names of those that this worker runs; all of the job if None.
    """

    spec: dict[str, Any]
    plugins: list[Plugin] = field(default_factory=list)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: str | None = None
    threads: int = 1
    evaluators: list[str] | None = None


@dataclass(slots=True, kw_only=True)
class Failure:
    """Why an attempt failed: ``kind`` is ``error``, ``timeout``, ``memory`` or ``died``."""

    kind: str
    message: str
    traceback: str | None = None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """The end of one attempt at a task: its metrics, or why it has none."""

    number: int
    metrics: Mapping[str, Metric] | None = None
    failure: Failure | None = None
    started_at: float = 0.0
    duration_s: float = 0.0
    checkpoint: str | None = None


class Worker:
    """The evaluators of one job in one process."""

    def __init__(self, setup: WorkerSetup) -> None:
        load_plugins(setup.plugins)
        spec = JobSpec.model_validate(setup.spec)
        chosen = setup.evaluators
        self._evaluators = [(n, e) for n, e in build_evaluators(spec) if chosen is None or n in chosen]
        self._space = spec.space
        self.context = EvaluationContext(
            space=SPACES.build(spec.space, "space"),
            data=spec.data,
            threads=setup.threads,
            files=setup.files,
            artifacts=setup.artifacts,
            plugins=setup.plugins,
        )

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any]) -> Any:
        """What is to be done on a worker's host besides evaluations.

        Args:
            method: ``prepare_key``, ``device_key`` and ``prepare`` of the evaluator, or ``measure``: networks timed
                alone, with the arguments of ``measured_elsewhere`` (all but space and plug-ins, which are the job's).
        """
        found = dict(self._evaluators)[evaluator]
        if method == "measure":
            check_device(arguments.get("device", LOCAL_CPU), "finalists.device")
            with found.deployed(arguments["items"], self.context) as (items, facts):
                timings, environment = measured_elsewhere(
                    self._space, **{**arguments, "items": items}, plugins=self.context.plugins
                )
                # While the files are there: what only the measuring process could find out.
                facts = [known | recorded(item) for known, item in zip(facts, items, strict=True)]
            return [asdict(timing) | known for timing, known in zip(timings, facts, strict=True)], environment
        methods = {"prepare_key": found.prepare_key, "device_key": found.device_key, "prepare": found.prepare}
        return methods[method](self.context)

    def evaluate(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Every evaluator on every task that has not failed yet, one outcome a task, in order."""
        started_at, start = time.time(), time.perf_counter()
        metrics: dict[int, dict[str, Metric]] = {task.number: {} for task in tasks}
        failures: dict[int, Failure] = {}
        checkpoints: dict[int, str] = {}
        for name, evaluator in self._evaluators:
            alive = [task for task in tasks if task.number not in failures]
            for task, given in zip(alive, self._apply(name, evaluator, alive), strict=True):
                result = given if isinstance(given, BaseException) else _checked(given)
                if isinstance(result, BaseException):
                    trace = _text("".join(traceback.format_exception(result)))
                    failures[task.number] = Failure(kind="error", message=_text(f"{name}: {result!r}"), traceback=trace)
                    continue
                metrics[task.number].update(result.metrics)
                if result.checkpoint is not None:
                    checkpoints[task.number] = result.checkpoint
        share = (time.perf_counter() - start) / max(len(tasks), 1)
        return [
            Outcome(
                number=task.number,
                metrics=None if task.number in failures else metrics[task.number],
                failure=failures.get(task.number),
                started_at=started_at,
                duration_s=share,
                checkpoint=checkpoints.get(task.number),
            )
            for task in tasks
        ]

    def _apply(self, name: str, evaluator: Evaluator, tasks: Sequence[Task]) -> Sequence[Any]:
        """One evaluator's results; where the batch as a whole raised, each task alone, so that one costs no other."""
        if not tasks:
            return []
        try:
            results = evaluator.evaluate(tasks, self.context)
            if len(results) != len(tasks):
                raise ValueError(f"evaluator {name!r} returned {len(results)} results for {len(tasks)} tasks")
        except (Exception, SystemExit) as error:
            if len(tasks) == 1:
                return [error]
            return [self._apply(name, evaluator, [task])[0] for task in tasks]
        return results


def _checked(given: Any) -> Evaluated | Exception:
    """A result with every field of the type that the ledger stores, or what is wrong with it.

    One value of a wrong type must cost its own evaluation, not the batch that is committed with it.
    """
    try:
        if not isinstance(given, Evaluated):
            raise TypeError(f"an evaluator returned {type(given).__name__}, not Evaluated")
        metrics = {}
        for name, metric in given.metrics.items():
            if not isinstance(name, str) or not isinstance(metric, Metric):
                raise TypeError(f"metric {name!r} is a {type(metric).__name__}, not a Metric with a name")
            for what, text, most in (("name", name, NAME_LENGTH), ("predictor", metric.predictor, NAME_LENGTH),
                                     ("device", metric.device, DEVICE_LENGTH)):  # fmt: skip
                if text is not None and (len(str(text)) > most or "\0" in str(text)):
                    raise ValueError(f"metric {name[:NAME_LENGTH]!r}: its {what} is longer than {most} characters")
            if metric.provenance not in get_args(Provenance):
                raise ValueError(f"metric {name!r} has the unknown provenance {metric.provenance!r}")
            metrics[name] = Metric(
                float(metric.value),
                metric.provenance,
                None if metric.std is None else float(metric.std),
                None if metric.predictor is None else str(metric.predictor),
                None if metric.device is None else str(metric.device),
            )
        return Evaluated(metrics, None if given.checkpoint is None else str(given.checkpoint))
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        return error


def _text(words: str) -> str:
    """Text that every database takes."""
    return words.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
