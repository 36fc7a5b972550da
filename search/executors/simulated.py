"""A virtual clock and as many virtual workers as wanted: asynchronous logic in milliseconds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from archfront.evaluators.evaluator import Task
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.worker import Failure, Outcome

Simulation = Callable[[Task], tuple[Outcome, float]]
"""The outcome of a task and how many virtual seconds it takes."""


class SimulatedExecutor(Executor):
    """Runs tasks by look-up.

    Args:
        simulate: what a task gives, and how long it takes.
        slots: virtual workers.
        deaths: batches (by the count of submits, from 0) that end with the worker's death.
    """

    def __init__(self, simulate: Simulation, slots: int, deaths: Sequence[int] = ()) -> None:
        self.slots = slots
        self.clock_s = 0.0
        self.submitted = 0
        self._simulate = simulate
        self._deaths = set(deaths)
        self._idle = list(range(slots))
        self._under_way: list[tuple[float, int, int, BatchResult]] = []

    def start(self) -> None:
        heapq.heapify(self._idle)

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        return {}

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        slot = heapq.heappop(self._idle)
        ends = self.clock_s
        outcomes = []
        for task in tasks:
            outcome, duration = self._simulate(task)
            ends += duration
            outcomes.append(outcome)
        result = BatchResult(batch=batch, worker=f"virtual-{slot}", outcomes=outcomes)
        if self.submitted in self._deaths:
            death = Failure(kind="died", message="the simulated worker died")
            result = BatchResult(batch=batch, worker=f"virtual-{slot}", death=death)
        # The count breaks ties, so that equal times end in the order of submission.
        heapq.heappush(self._under_way, (ends, self.submitted, slot, result))
        self.submitted += 1

    def wait(self, timeout_s: float) -> list[BatchResult]:
        if not self._under_way:
            return []
        ends, _, slot, result = heapq.heappop(self._under_way)
        self.clock_s = ends
        heapq.heappush(self._idle, slot)
        return [result]

    def rest(self) -> None:
        self._under_way.clear()
