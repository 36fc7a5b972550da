"""Several classes of workers in one job: each batch passes through them, in the order of the job's evaluators."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from archfront.evaluators.evaluator import Task
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.worker import Outcome

_PAUSE_S = 0.01


@dataclass(slots=True)
class _Batch:
    tasks: Sequence[Task]
    timeout_s: float
    stage: int = 0
    workers: list[str] = field(default_factory=list)
    ended: dict[int, Outcome] = field(default_factory=dict)


class StagedExecutor(Executor):
    """One executor for each class of workers.

    What a class found of a task is kept until the task is finished: one that is lost or fails later on is not trained
    again because its measurement was.

    Args:
        stages: executors with the names of the evaluators that they run, in order; each takes more batches than it
            has workers, and lets them wait.
    """

    def __init__(self, stages: Sequence[tuple[Executor, Collection[str]]]) -> None:
        self._stages = list(stages)
        self.slots = sum(executor.slots for executor, _ in stages)
        self.elsewhere = any(executor.elsewhere for executor, _ in stages)
        self._batches: dict[int, _Batch] = {}
        self._found: dict[int, dict[int, Outcome]] = {}

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        executor = next(executor for executor, names in self._stages if evaluator in names)
        return executor.call(evaluator, method, arguments, timeout_s)

    def start(self) -> None:
        for executor, _ in self._stages:
            executor.start()

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        self._batches[batch] = _Batch(tasks, timeout_s)
        # A task that comes again lacks its last stage at least, so there is always something to do.
        self._enter(batch)

    def wait(self, timeout_s: float) -> list[BatchResult]:
        until = time.monotonic() + timeout_s
        while True:
            results = []
            for stage, (executor, _) in enumerate(self._stages):
                for result in executor.wait(0):
                    results += self._take(stage, result)
            if results or time.monotonic() >= until:
                return results
            time.sleep(_PAUSE_S)

    def rest(self) -> None:
        self._batches.clear()
        for executor, _ in self._stages:
            executor.rest()

    def close(self) -> None:
        for executor, _ in self._stages:
            executor.close()

    def _take(self, stage: int, result: BatchResult) -> list[BatchResult]:
        batch = self._batches[result.batch]
        batch.workers.append(result.worker)
        if result.lost or result.death is not None:
            del self._batches[result.batch]
            return [result]
        for outcome in result.outcomes:
            if outcome.failure is None:
                self._found.setdefault(outcome.number, {})[stage] = outcome
            else:
                batch.ended[outcome.number] = outcome
        batch.stage = stage + 1
        return self._enter(result.batch)

    def _enter(self, number: int) -> list[BatchResult]:
        """Send a batch to the next class that has not seen all of it, or hand it out."""
        batch = self._batches[number]
        while batch.stage < len(self._stages):
            missing = [
                task
                for task in batch.tasks
                if task.number not in batch.ended and batch.stage not in self._found.get(task.number, {})
            ]
            if missing:
                self._stages[batch.stage][0].submit(number, missing, batch.timeout_s)
                return []
            batch.stage += 1
        del self._batches[number]
        outcomes = [batch.ended.get(task.number) or self._merged(task.number) for task in batch.tasks]
        return [BatchResult(batch=number, worker=" + ".join(batch.workers), outcomes=outcomes)]

    def _merged(self, number: int) -> Outcome:
        parts = [outcome for _, outcome in sorted(self._found.pop(number).items())]
        return Outcome(
            number=number,
            metrics={name: metric for part in parts for name, metric in (part.metrics or {}).items()},
            started_at=parts[0].started_at,
            duration_s=sum(part.duration_s for part in parts),
            checkpoint=next((part.checkpoint for part in parts if part.checkpoint is not None), None),
        )
