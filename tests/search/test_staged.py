"""Several classes of workers: each evaluator's work goes to its own, and what was found is not found again."""

from collections.abc import Sequence
from typing import Any

from archfront.evaluators.evaluator import Metric, Task
from archfront.search.executors.executor import BatchResult
from archfront.search.executors.simulated import SimulatedExecutor
from archfront.search.executors.staged import StagedExecutor
from archfront.search.worker import Failure, Outcome


def task(number: int) -> Task:
    return Task(number=number, genotype=[number], key=f"{number:032x}", fidelity=0, repeat=0, seed=0)


class Stage:
    """A class of virtual workers that reports one metric, and notes who came."""

    def __init__(self, metric: str, fail: Sequence[int] = (), deaths: Sequence[int] = ()) -> None:
        self.seen: list[int] = []
        self._metric, self._fail = metric, set(fail)
        self.executor = SimulatedExecutor(self._simulate, slots=8, deaths=deaths)

    def _simulate(self, asked: Task) -> tuple[Outcome, float]:
        self.seen.append(asked.number)
        if asked.number in self._fail:
            self._fail.discard(asked.number)
            return Outcome(number=asked.number, failure=Failure(kind="error", message="once")), 1.0
        metrics = {self._metric: Metric(float(asked.number))}
        return Outcome(number=asked.number, metrics=metrics, duration_s=1.0, started_at=5.0), 1.0


def finished(staged: StagedExecutor, count: int) -> list[BatchResult]:
    results: list[BatchResult] = []
    while len(results) < count:
        results += staged.wait(1.0)
    return results


def staged_of(*stages: Stage) -> StagedExecutor:
    staged = StagedExecutor([(stage.executor, [stage._metric]) for stage in stages])
    staged.start()
    return staged


def outcomes(results: Sequence[BatchResult]) -> dict[int, Outcome]:
    return {outcome.number: outcome for result in results for outcome in result.outcomes}


def test_each_batch_passes_through_all_classes() -> None:
    training, latency = Stage("accuracy"), Stage("latency_ms")
    staged = staged_of(training, latency)
    staged.submit(0, [task(0), task(1)], 10)
    staged.submit(1, [task(2)], 10)
    results = finished(staged, 2)
    for number, outcome in outcomes(results).items():
        assert outcome.metrics == {"accuracy": Metric(float(number)), "latency_ms": Metric(float(number))}
        assert outcome.duration_s == 2.0
    assert sorted(training.seen) == sorted(latency.seen) == [0, 1, 2]
    assert all(" + " in result.worker for result in results)


def test_what_failed_is_not_measured_and_what_was_trained_is_not_trained_again() -> None:
    training, latency = Stage("accuracy", fail=[1]), Stage("latency_ms", fail=[2])
    staged = staged_of(training, latency)
    staged.submit(0, [task(0), task(1), task(2)], 10)
    [result] = finished(staged, 1)
    found = outcomes([result])
    assert (found[1].failure, found[2].failure) != (None, None)
    assert latency.seen == [0, 2]
    # Both are tried again.
    staged.submit(1, [task(1), task(2)], 10)
    [again] = finished(staged, 1)
    assert all(outcome.failure is None for outcome in again.outcomes)
    assert training.seen == [0, 1, 2, 1]
    assert latency.seen == [0, 2, 1, 2]


def test_a_batch_lost_while_it_was_measured_keeps_its_training() -> None:
    training, latency = Stage("accuracy"), Stage("latency_ms", deaths=[0])
    staged = staged_of(training, latency)
    staged.submit(0, [task(0)], 10)
    [result] = finished(staged, 1)
    assert result.death is not None
    staged.submit(1, [task(0)], 10)
    [again] = finished(staged, 1)
    metrics: Any = again.outcomes[0].metrics
    assert set(metrics) == {"accuracy", "latency_ms"}
    assert training.seen == [0]
