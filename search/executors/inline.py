"""Evaluate in this very process: for tests, debuggers and evaluators that cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archfront.evaluators.evaluator import Task
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.worker import Worker, WorkerSetup


class InlineExecutor(Executor):
    """One batch at a time, evaluated when it is waited for. Cannot stop an evaluation that hangs."""

    slots = 1

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._queue: list[tuple[int, Sequence[Task]]] = []

    def start(self) -> None:
        self._worker = Worker(self._setup)

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        return Worker(self._setup).call(evaluator, method, arguments)

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        self._queue.append((batch, tasks))

    def wait(self, timeout_s: float) -> list[BatchResult]:
        if not self._queue:
            return []
        batch, tasks = self._queue.pop(0)
        return [BatchResult(batch=batch, worker="inline", outcomes=self._worker.evaluate(tasks))]

    def rest(self) -> None:
        self._queue.clear()
