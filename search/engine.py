"""The loop of a job: ask, write ahead, dispatch, commit, tell.

The engine is a state machine whose state is a function of the ledger's rows and whose steps are cut by count:

- results are taken one by one, in the order in which they will be committed; after each the engine asks the strategy
  while fewer than ``target`` evaluations are out;
- how many rows share a transaction, and when it ends, changes nothing but times;
- batches sent to workers are the lowest unfinished numbers, so their composition is a function of the state too.

With one worker and a deterministic evaluator, a job that is killed anywhere and resumed hence writes the same rows.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from archfront.db.history import History
from archfront.db.records import AskRecord, AttemptRecord, FinishedRecord, MetricValue
from archfront.db.writer import JobWriter
from archfront.errors import JobFailedError
from archfront.evaluators.evaluator import Metric, Task
from archfront.evaluators.learning import Learned
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.learning import Learner
from archfront.search.progress import Progress, Tally
from archfront.search.resolve import NonFiniteError, ResolvedJob
from archfront.search.shared_results import SharedResults
from archfront.search.strategy import Ask, Proposals, Results, Strategy
from archfront.search.worker import Failure, Outcome

_LOOK_S = 2.0
"""How often an engine with nothing to commit looks whether somebody cancelled its job."""

_HOPELESS = 20
"""A job whose first so many evaluations all fail ends as failed instead of spending its budget."""

_LARGEST_ASK = 512
"""Of a strategy that takes any number: a longer answer would keep workers waiting for it."""

_SHARED_AT_ONCE = 1000
"""How many results of other jobs are committed together at most."""

_LOSSES = 5
"""How often a batch may be lost with its host before its evaluations are charged an attempt."""


@dataclass(slots=True)
class _Open:
    """An evaluation that is written ahead and not finished."""

    task: Task
    attempts: int = 0
    losses: int = 0
    alone: bool = False


@dataclass(kw_only=True)
class Seeding:
    """Foreign candidates to evaluate before the strategy is asked: ``source`` is ``seeds`` or ``warm_start``."""

    source: str
    genotypes: Sequence[Any] = field(default_factory=list)


class Engine:
    """Drives one job until its budget is spent, its space is exhausted, or it is stopped.

    Args:
        shared: results of other jobs, to take where they serve in place of an evaluation.
        seedings: asked first, in order, where the ledger has no asks yet.
        observe: called after each commit.
        stop: polled between steps; true ends the job resumable.
    """

    def __init__(
        self,
        job: ResolvedJob,
        writer: JobWriter,
        executor: Executor,
        history: History,
        *,
        shared: SharedResults | None = None,
        seedings: Sequence[Seeding] = (),
        observe: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._job = job
        self._writer = writer
        self._executor = executor
        self._shared = shared
        self._found: dict[int, FinishedRecord] = {}
        self._observe = observe
        self._stop = stop
        self._strategy: Strategy = job.strategy()
        self._ask_size, self._target = self._sizes()
        self._untold: list[tuple[int, int, Sequence[float] | None, float]] = []
        self._open: dict[int, _Open] = {}
        self._queue: list[int] = []
        self._under_way: dict[int, list[int]] = {}
        self._batches = 0
        self._blocked = False
        self._changed = False
        self._seedings = list(seedings)
        self._new_asks: list[AskRecord] = []
        self._new_finished: list[FinishedRecord] = []
        self._new_attempts: list[AttemptRecord] = []
        self._learner = Learner(job.evaluators, history)
        self._restore(history)
        self._written = self._asked
        self._last_commit = 0.0

    def run(self) -> str:
        """Run the job.

        Returns:
            why it ended: ``budget``, ``exhausted``, ``hours``, ``cancelled`` or ``stopped`` (resumable).

        Raises:
            JobFailedError: nothing that was evaluated succeeded.
            LeaseLostError: another driver took over.
        """
        self._plan()
        while True:
            self._take_found()
            if self._commit():
                return self._cancel()
            if self._found:
                continue  # before anything is dispatched, so that their order does not depend on workers
            if self._tally.failed - self._failed_before >= _HOPELESS and not self._tally.done:
                raise JobFailedError(
                    f"The first {self._tally.failed} evaluations all failed; `archfront status {self._writer.job_id}` "
                    "shows why. The rest of the budget is not spent."
                )
            # Only now: a worker whose last result is not committed has nothing new, so that a driver that dies loses at
            # most one evaluation a worker.
            self._dispatch()
            if self._changed:
                running = len(self._open) - len(self._queue)
                budget = self._job.spec.budget.evaluations
                points = self._writer.front_points
                self._observe(
                    self._tally.progress(asked=self._asked, running=running, budget=budget, front_points=points)
                )
                self._changed = False
            if not self._under_way:
                self._promote(last=True)
                if not self._queue:
                    return self._ending()
                continue
            if self._stop():
                return "stopped"
            for result in self._executor.wait(0.25):
                self._take(result)
            self._promote(last=False)

    def _sizes(self) -> tuple[int, int]:
        """How many evaluations to ask for at once, and to have out at most: enough for every worker, and one ask
        more, so that none waits for the strategy."""
        slots, room = self._executor.slots, self._executor.slots * self._job.batch
        if self._strategy.batch:
            size = min(room, self._strategy.batch)
            return size, max(2 * size, slots + size)
        size = min(room, _LARGEST_ASK)
        return size, room + size

    # Planning: a function of counts alone.

    def _plan(self) -> None:
        budget = self._job.spec.budget
        while self._asked < budget.evaluations and not self._blocked:
            if self._asked - self._tally.finished + self._ask_size > self._target or self._out_of_time():
                return
            self._ask(min(self._ask_size, budget.evaluations - self._asked))

    def _ask(self, count: int) -> None:
        self._tell()
        ask = Ask(number=self._asks, count=count, first=self._asked, seed=self._job.spec.seed)
        source, proposals = self._proposals(ask)
        self._enter(ask, source, proposals)
        # A strategy with nothing to propose waits for the next result; with none to come, the space is exhausted.
        self._blocked = not len(proposals)

    def _enter(self, ask: Ask, source: str, proposals: Proposals) -> None:
        """Write an ask ahead, and queue its evaluations."""
        keys = [key.hex() for key in self._job.space.keys(proposals.population)]
        genotypes = self._job.space.to_json(proposals.population)
        fidelities = proposals.fidelities.tolist()
        # As a replay will see it: what the ledger keeps of an ask is how many proposals came of it.
        self._strategy.asked(replace(ask, count=len(keys)), proposals)
        learned = self._learner.current
        self._new_asks.append(
            AskRecord(
                number=ask.number,
                told=self._tally.finished,
                first=ask.first,
                source=source,
                keys=keys,
                genotypes=genotypes,
                fidelities=fidelities,
                repeats=[0] * len(keys),
                memory=proposals.memory,
                predictor=None if learned is None else learned.version,
            )
        )
        for offset, (genotype, key, fidelity) in enumerate(zip(genotypes, keys, fidelities, strict=True)):
            self._add_open(self._task(ask.first + offset, genotype, key, fidelity, 0, learned))
        self._look_up(range(ask.first, ask.first + len(keys)))
        self._asks += 1
        self._asked += len(keys)

    def _promote(self, *, last: bool) -> None:
        """Ask for the next fidelity of what the executor lets go on, while the budget lasts; each an ask of its own,
        so that when results are told depends on their count alone."""
        if not self._executor.decides:
            return
        following = dict(itertools.pairwise(self._job.fidelities))
        for task in self._executor.promotions(last=last):
            if self._asked >= self._job.spec.budget.evaluations or self._out_of_time():
                return
            population = self._job.space.from_json([task.genotype])
            fidelity = following[task.fidelity]
            # One that is to be tried again has not finished, and one that was asked for before may be said again.
            if task.number in self._open or not self._strategy.is_new(population, fidelity)[0]:
                continue
            self._tell()
            ask = Ask(number=self._asks, count=1, first=self._asked, seed=self._job.spec.seed)
            proposals = Proposals(population=population, fidelities=np.array([fidelity], dtype=np.int64))
            self._enter(ask, "scheduler", proposals)

    def _proposals(self, ask: Ask) -> tuple[str, Proposals]:
        """Foreign candidates first, then the strategy's."""
        while self._seedings:
            seeding = self._seedings.pop(0)
            population = self._job.space.canonical(self._job.space.from_json(seeding.genotypes))
            population = population[self._strategy.is_new(population, self._job.fidelities[0])]
            room = self._job.spec.budget.evaluations - self._asked
            if len(population):
                return seeding.source, self._strategy.proposals(population[:room])
        return "strategy", self._strategy.ask(ask)

    def _tell(self) -> None:
        if self._untold:
            self._strategy.tell(_results(self._untold, self._job.problem.objectives))
            self._untold = []

    def _add_open(self, task: Task, attempts: int = 0, *, alone: bool = False) -> None:
        self._open[task.number] = _Open(task, attempts, alone=alone)
        heapq.heappush(self._queue, task.number)

    def _task(
        self, number: int, genotype: Any, key: str, fidelity: int, repeat: int, learned: Learned | None = None
    ) -> Task:
        return Task(
            number=number, genotype=genotype, key=key, fidelity=fidelity, repeat=repeat,
            seed=self._job.task_seed(key, repeat), learned=learned,
        )  # fmt: skip

    # Results of other jobs.

    def _look_up(self, numbers: Iterable[int]) -> None:
        """Find what other jobs know of new evaluations; those leave the queue."""
        if self._shared is None:
            return
        for record in self._shared.find([self._open[number].task for number in numbers]):
            self._found[record.number] = record
        if self._found:
            self._queue = [number for number in self._queue if number not in self._found]
            heapq.heapify(self._queue)

    def _take_found(self) -> None:
        """Finish what was found, as if it had come at once; what is asked for thereupon may be found too."""
        while self._found and len(self._new_finished) < _SHARED_AT_ONCE:
            self._finish(self._found.pop(next(iter(self._found))))

    # Dispatch and results.

    def _dispatch(self) -> None:
        spec = self._job.spec.workers
        # Every worker gets its part of what is out: else one would have it all, and the others and the driver wait.
        size = min(self._job.batch, math.ceil(self._target / self._executor.slots))
        while self._queue and self._queue[0] < self._written and len(self._under_way) < self._executor.slots:
            numbers = [heapq.heappop(self._queue)]
            while (
                self._queue
                and len(numbers) < size
                and not self._open[numbers[0]].alone
                and not self._open[self._queue[0]].alone
            ):
                numbers.append(heapq.heappop(self._queue))
            batch, self._batches = self._batches, self._batches + 1
            self._under_way[batch] = numbers
            self._executor.submit(batch, [self._open[n].task for n in numbers], spec.timeout_s * len(numbers))

    def _take(self, result: BatchResult) -> None:
        numbers = self._under_way.pop(result.batch)
        if result.lost:
            self._take_lost(numbers, result)
        elif result.death is not None:
            self._take_death(numbers, result.worker, result.death)
        else:
            for outcome in result.outcomes:
                self._take_outcome(outcome, result.worker)

    def _take_lost(self, numbers: Sequence[int], result: BatchResult) -> None:
        for number in numbers:
            self._open[number].losses += not result.with_ray
            if self._open[number].losses >= _LOSSES:
                self._open[number].losses = 0
                failure = Failure(kind="died", message=f"lost with its worker {_LOSSES} times")
                self._take_outcome(Outcome(number=number, failure=failure), result.worker)
            else:
                heapq.heappush(self._queue, number)

    def _take_death(self, numbers: Sequence[int], worker: str, death: Failure) -> None:
        if len(numbers) == 1:
            self._take_outcome(Outcome(number=numbers[0], failure=death), worker)
            return
        # One of the batch is to blame, and nobody knows which: each is tried alone, at no charge.
        for number in numbers:
            self._open[number].alone = True
            heapq.heappush(self._queue, number)
            # In the ledger too: a resumed job must send them alone, or its results come in another order.
            self._new_attempts.append(
                AttemptRecord(
                    number=number, attempt=0, kind="suspect", message=f"its batch died ({death.message})", worker=worker
                )
            )

    def _take_outcome(self, outcome: Outcome, worker: str) -> None:
        opened = self._open[outcome.number]
        opened.attempts += 1
        failure = outcome.failure
        metrics = outcome.metrics
        verdict = None
        if metrics is not None:
            try:
                verdict = self._job.judge(metrics)
            except NonFiniteError as error:
                failure = Failure(kind="non-finite", message=str(error))
        if failure is not None:
            self._new_attempts.append(
                AttemptRecord(
                    number=outcome.number,
                    attempt=opened.attempts,
                    kind=failure.kind,
                    message=failure.message,
                    traceback=failure.traceback,
                    worker=worker,
                )
            )
            if opened.attempts < self._job.spec.workers.attempts:
                heapq.heappush(self._queue, outcome.number)
                return
        self._finish(
            FinishedRecord(
                number=outcome.number,
                fidelity=opened.task.fidelity,
                state="done" if verdict is not None else "failed",
                attempts=opened.attempts,
                metrics=_metric_values(metrics or {}),
                objectives=None if verdict is None else verdict.objectives,
                violation=None if verdict is None else verdict.violation,
                worker=worker,
                started_at=outcome.started_at,
                duration_s=outcome.duration_s,
                error=None if failure is None else failure.message,
                checkpoint=outcome.checkpoint,
            )
        )

    def _finish(self, record: FinishedRecord) -> None:
        del self._open[record.number]
        self._new_finished.append(record)
        self._blocked = False
        violation = math.inf if record.violation is None else record.violation
        self._untold.append((record.number, record.fidelity, record.objectives, violation))
        self._tally.count(record.state, record.fidelity, record.objectives)
        # Before the next ask: the version in force is a function of the results that the ask knows.
        self._learner.take(record)
        self._plan()

    def _commit(self) -> bool:
        """Write what is new; whether the job is to be cancelled."""
        new = bool(self._new_asks or self._new_finished or self._new_attempts)
        if not new and time.monotonic() - self._last_commit < _LOOK_S:
            return False
        cancel = self._writer.commit(self._new_asks, self._new_finished, self._new_attempts, self._learner.new)
        self._new_asks, self._new_finished, self._new_attempts, self._learner.new = [], [], [], []
        self._last_commit = time.monotonic()
        self._written = self._asked
        self._changed |= new
        return cancel

    # Endings.

    def _ending(self) -> str:
        if self._tally.finished and not self._tally.done:
            raise JobFailedError(
                f"All {self._tally.finished} evaluations failed; `archfront status {self._writer.job_id}` shows why."
            )
        if self._asked >= self._job.spec.budget.evaluations:
            return "budget"
        return "hours" if self._out_of_time() else "exhausted"

    def _cancel(self) -> str:
        """Mark what is not finished as cancelled, so that the job's rows are all at an end."""
        for number in sorted(self._open):
            opened = self._open.pop(number)
            self._new_finished.append(
                FinishedRecord(
                    number=number, fidelity=opened.task.fidelity, state="cancelled", attempts=opened.attempts
                )
            )
        self._commit()
        return "cancelled"

    def _out_of_time(self) -> bool:
        hours = self._job.spec.budget.hours
        return hours is not None and self._tally.elapsed_s > hours * 3600

    # Resuming.

    def _restore(self, history: History) -> None:
        """Replay the ledger's asks and results, and queue what was written ahead."""
        told = 0
        waiting: dict[int, Learned | None] = dict.fromkeys(e.ask for e in history.unfinished)
        for record in history.replay():
            if record.told > told:
                self._strategy.tell(_past_results(history, told, record.told))
                told = record.told
            ask = Ask(number=record.number, count=record.count, first=record.first, seed=self._job.spec.seed)
            self._strategy.asked(ask, self._stored_proposals(record))
            self._seedings = [s for s in self._seedings if s.source != record.source]
            if record.number in waiting:
                waiting[record.number] = self._learner.version(record.predictor)
        self._asks = history.ask_count
        self._asked = history.evaluation_count
        self._tally = Tally(history.elapsed_s)
        points = [None if math.isnan(row[0]) else row for row in history.objectives.tolist()]
        for number, fidelity, point in zip(history.numbers.tolist(), history.fidelities.tolist(), points, strict=True):
            state = "done" if point is not None else "failed" if number in history.failed else "cancelled"
            self._tally.count(state, fidelity, point, new=False)
        rest = (history.numbers[told:].tolist(), history.fidelities[told:].tolist(), points[told:])
        self._untold = list(zip(*rest, history.violations[told:].tolist(), strict=True))
        # A job that failed is given another chance when it is resumed.
        self._failed_before = self._tally.failed
        self._blocked = history.last_ask == (self._tally.finished, 0)
        if self._executor.decides:
            found = {e.number: e for e in history.stored()}
            ended = [found[number] for number in history.numbers.tolist()]
            tasks = [self._task(e.number, e.genotype, e.key, e.fidelity, e.repeat) for e in ended]
            self._executor.recall(list(zip(tasks, points, strict=True)))
        for e in history.unfinished:
            task = self._task(e.number, e.genotype, e.key, e.fidelity, e.repeat, waiting[e.ask])
            self._add_open(task, e.attempts, alone=e.number in history.suspects)
        self._look_up(list(self._open))

    def _stored_proposals(self, record: AskRecord) -> Proposals:
        population = self._job.space.from_json(record.genotypes)
        return Proposals(
            population=population, fidelities=np.asarray(record.fidelities, dtype=np.int64), memory=record.memory
        )


def _metric_values(metrics: Any) -> dict[str, MetricValue]:
    return {name: _metric_value(metric) for name, metric in metrics.items()}


def _metric_value(metric: Metric) -> MetricValue:
    return MetricValue(float(metric.value), metric.std, metric.provenance, metric.predictor, metric.device)


def _past_results(history: History, start: int, end: int) -> Results:
    return Results(
        numbers=history.numbers[start:end],
        fidelities=history.fidelities[start:end],
        objectives=history.objectives[start:end],
        violations=history.violations[start:end],
    )


def _results(rows: Sequence[tuple[int, int, Sequence[float] | None, float]], objectives: int) -> Results:
    missing = [math.nan] * objectives
    return Results(
        numbers=np.array([row[0] for row in rows], dtype=np.int64),
        fidelities=np.array([row[1] for row in rows], dtype=np.int64),
        objectives=np.array([missing if row[2] is None else row[2] for row in rows], dtype=float),
        violations=np.array([row[3] for row in rows], dtype=float),
    )
