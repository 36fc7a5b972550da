"""Who gets work, and when: no worker waits for the strategy, and nothing runs that is not in the ledger."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import synthetic_job

from archfront.db.ledger import Ledger
from archfront.db.schema import Evaluation
from archfront.evaluators.evaluator import Metric, Task
from archfront.plugins import read_plugins
from archfront.search.engine import Engine
from archfront.search.executors.executor import BatchResult
from archfront.search.executors.simulated import SimulatedExecutor
from archfront.search.job import parse_spec
from archfront.search.plugins import load_plugins
from archfront.search.resolve import resolve
from archfront.search.worker import Outcome


def simulated(task: Task) -> tuple[Outcome, float]:
    cost = float(sum(task.genotype))
    return Outcome(number=task.number, metrics={"gain": Metric(cost % 7), "cost": Metric(cost)}), 1.0 + cost % 5


class Watched(SimulatedExecutor):
    """Notes batches, how many are under way at each wait and sent without a committed result at each submit, and
    whether what it gets is in the ledger.

    Args:
        together: how many results a wait brings.
    """

    def __init__(self, slots: int, ledger: Ledger, together: int = 1) -> None:
        super().__init__(simulated, slots)
        self._ledger = ledger
        self._together = together
        self.sizes: list[int] = []
        self.waits: list[int] = []
        self.uncommitted: list[int] = []

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        with self._ledger.engine.connect() as connection:
            numbers = [task.number for task in tasks]
            query = sa.select(sa.func.count()).where(Evaluation.number.in_(numbers), Evaluation.state == "running")
            assert connection.execute(query).scalar_one() == len(tasks)
            committed = connection.execute(sa.select(sa.func.count(Evaluation.seq))).scalar_one()
        self.sizes.append(len(tasks))
        self.uncommitted.append(sum(self.sizes) - committed)
        super().submit(batch, tasks, timeout_s)

    def wait(self, timeout_s: float) -> list[BatchResult]:
        self.waits.append(len(self._under_way))
        return [result for _ in range(self._together) for result in super(Watched, self).wait(timeout_s)]


def run(tmp_path: Path, plugin: Path, slots: int, together: int = 1, **changes: Any) -> Watched:
    load_plugins(read_plugins([plugin]))
    spec = parse_spec(synthetic_job(**changes))
    job = resolve(spec)
    ledger = Ledger.open(str(tmp_path / "l.db"))
    job_id = ledger.create_job(spec.name, spec.model_dump(mode="json"), job.space.digest)
    writer = ledger.writer(job_id, ledger.begin_run(job_id, {}), job.signs)
    executor = Watched(slots, ledger, together)
    assert Engine(job, writer, executor, ledger.history(job_id, job.signs)).run() == "budget"
    return executor


@pytest.mark.parametrize("strategy", [{"name": "nsga2", "population": 6}, {"name": "random"}])
def test_more_workers_than_a_strategy_proposes_at_once_are_all_busy(
    tmp_path: Path, plugin: Path, strategy: dict[str, Any]
) -> None:
    executor = run(tmp_path, plugin, 60, evaluations=400, strategy=strategy)
    # Until nothing more is to come: the last sixty end one after the other.
    assert executor.waits[0] == 60
    assert set(executor.waits[:-60]) == {60}


def test_nothing_runs_that_is_not_written_ahead(tmp_path: Path, plugin: Path) -> None:
    """Five results at once ask for more than the two evaluations that wait, and those must be committed first."""
    executor = run(tmp_path, plugin, 6, 5, evaluations=90, strategy={"name": "nsga2", "population": 2})
    assert sum(executor.sizes) == 90
    assert 6 in executor.waits


def test_workers_share_what_is_out(tmp_path: Path, plugin: Path) -> None:
    executor = run(
        tmp_path,
        plugin,
        4,
        evaluations=400,
        strategy={"name": "nsga2", "population": 20},
        evaluator={"batch_size": 100},
    )
    assert executor.waits[0] == 4
    assert max(executor.sizes) == 10


@pytest.mark.parametrize("together", [1, 3])
def test_a_driver_that_dies_loses_at_most_one_evaluation_a_worker(tmp_path: Path, plugin: Path, together: int) -> None:
    """A worker has nothing new before its last result is committed."""
    executor = run(tmp_path, plugin, 3, together, evaluations=60, strategy={"name": "random"})
    assert max(executor.uncommitted) == 3
