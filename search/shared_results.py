"""Results of other jobs in place of evaluations: ``reuse: true`` in a job file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from archfront.db.records import FinishedRecord, MetricValue
from archfront.db.reuse import Result, Results
from archfront.evaluators.evaluator import Metric, Provenance, Task
from archfront.search.resolve import NonFiniteError, ResolvedJob


class SharedResults:
    """What other jobs found, judged by this job's objectives and constraints."""

    def __init__(self, job: ResolvedJob, results: Results) -> None:
        self._job = job
        self._results = results

    def find(self, tasks: Sequence[Task]) -> list[FinishedRecord]:
        """The ends of those tasks that another job has evaluated, in their order."""
        found = self._results.find([(task.key, task.fidelity, task.repeat) for task in tasks])
        records = []
        for task in tasks:
            result = found.get((task.key, task.fidelity, task.repeat))
            record = None if result is None else self._record(task, result)
            if record is not None:
                records.append(record)
        return records

    def _record(self, task: Task, result: Result) -> FinishedRecord | None:
        """None where the result lacks something that this job needs."""
        try:
            verdict = self._job.judge({name: _metric(value) for name, value in result.metrics.items()})
        except NonFiniteError:
            return None
        return FinishedRecord(
            number=task.number,
            fidelity=task.fidelity,
            state="done",
            attempts=0,
            metrics=result.metrics,
            objectives=verdict.objectives,
            violation=verdict.violation,
            duration_s=0.0,
            origin=result.origin,
        )


def _metric(value: MetricValue) -> Metric:
    provenance = cast(Provenance, value.provenance)
    return Metric(value.value, provenance, value.std, value.predictor, value.device)
