"""What is nobody's fault costs nobody: lost workers, lost Ray, lost finalists; and odd last words harm no job."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import synthetic_job
from postgres import Postgres

import archfront
from archfront.client import Job
from archfront.db.ledger import Ledger
from archfront.evaluators.evaluator import Metric, Task
from archfront.plugins import read_plugins
from archfront.search.driver import submit
from archfront.search.engine import Engine
from archfront.search.executors.executor import BatchResult
from archfront.search.executors.simulated import SimulatedExecutor
from archfront.search.finalists import _train
from archfront.search.job import parse_spec
from archfront.search.resolve import resolve
from archfront.search.worker import Failure, Outcome


def simulated(task: Task) -> tuple[Outcome, float]:
    cost = float(sum(task.genotype))
    return Outcome(number=task.number, metrics={"gain": Metric(cost**0.5), "cost": Metric(cost)}), 1.0


class Losing(SimulatedExecutor):
    """Loses the batches with evaluation 0 a number of times."""

    def __init__(self, times: int, *, with_ray: bool) -> None:
        super().__init__(simulated, slots=2)
        self.left, self.with_ray = times, with_ray
        self._first: set[int] = set()

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        if any(task.number == 0 for task in tasks):
            self._first.add(batch)
        super().submit(batch, tasks, timeout_s)

    def wait(self, timeout_s: float) -> list[BatchResult]:
        results = super().wait(timeout_s)
        for result in results:
            if result.batch in self._first and self.left:
                self.left -= 1
                result.outcomes, result.lost, result.with_ray = [], True, self.with_ray
        return results


def run(folder: Path, plugin: Path, executor: SimulatedExecutor, **changes: Any) -> tuple[Ledger, int]:
    ledger = Ledger.open(str(folder / "l.db"))
    plugins = read_plugins([plugin])
    job_id = submit(ledger, synthetic_job(12, **changes), plugins)
    job = resolve(parse_spec(ledger.job(job_id)["spec"]))
    run_id = ledger.begin_run(job_id, {})
    writer = ledger.writer(job_id, run_id, job.signs)
    assert Engine(job, writer, executor, ledger.history(job_id, job.signs)).run() == "budget"
    ledger.end_run(job_id, run_id, "budget", None, "done")
    return ledger, job_id


@pytest.mark.parametrize(
    ("times", "with_ray", "attempts"), [(4, False, 0), (5, False, 1), (9, False, 1), (10, False, 2), (40, True, 0)]
)
def test_five_losses_cost_an_attempt_and_those_of_ray_none(
    tmp_path: Path, plugin: Path, times: int, with_ray: bool, attempts: int
) -> None:
    ledger, _ = run(tmp_path, plugin, Losing(times, with_ray=with_ray))
    with ledger.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT number, kind FROM attempts").all()
        states = connection.exec_driver_sql("SELECT state FROM evaluations").scalars().all()
    assert [tuple(row) for row in rows] == [(0, "died")] * attempts
    assert Counter(states) == {"done": 12}


def test_a_lost_finalist_is_trained_again(tmp_path: Path, plugin: Path) -> None:
    finalists = {"count": 2, "epochs": 3}
    ledger, job_id = run(tmp_path, plugin, SimulatedExecutor(simulated, slots=2), finalists=finalists)
    job = resolve(parse_spec(ledger.job(job_id)["spec"]))
    run_id = ledger.begin_run(job_id, {})
    chosen = [{"evaluation": n, "genotype": [1] * 8, "key": f"{n:032x}", "repeat": 0, "metrics": {}} for n in range(2)]
    failures = iter([Failure(kind="error", message="once")])

    def train(task: Task) -> tuple[Outcome, float]:
        failure = next(failures, None) if task.number == 1 else None
        if failure is not None:
            return Outcome(number=task.number, failure=failure), 1.0
        return Outcome(number=task.number, metrics={"accuracy": Metric(90.0)}), 1.0

    losing = Losing(3, with_ray=False)
    losing._simulate = train
    losing.start()
    assert _train(ledger, job_id, run_id, job, losing, 3, chosen, lambda _: None, lambda: False)
    kept = ledger.benchmarks(job_id)
    assert sorted(row["number"] for row in kept) == [0, 1]
    assert all(row["content"]["accuracy"] == 90.0 for row in kept)


DYING = '''
"""An evaluator that dies with bytes on its lips that no text column takes."""
import os, sys

from archfront.evaluators.evaluator import Evaluated, Evaluator, Metric, MetricSpec


class Dying(Evaluator):
    name = "dying"

    @property
    def metrics(self):
        return [MetricSpec(name="value", unit="1", direction="max")]

    def evaluate(self, tasks, context):
        if tasks[0].number == 1:
            sys.stderr.buffer.write(b"last \\0 words \\xff")
            sys.stderr.flush()
            os._exit(7)
        if tasks[0].number == 2:
            return [Evaluated({"value": Metric(1.0), "n" * 101: Metric(1.0)})]
        return [Evaluated({"value": Metric(float(task.number))}) for task in tasks]


ARCHFRONT_PLUGINS = {"evaluators": {"dying": Dying}}
'''


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_odd_last_words(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    postgres: Postgres | None = request.getfixturevalue("postgres") if kind == "postgresql" else None
    db = postgres.ledger() if postgres is not None else str(tmp_path / "archfront.db")
    file = tmp_path / "dying.py"
    file.write_text(DYING)
    spec = {
        "name": "dying",
        "space": {"name": "choices", "columns": {"a": [1, 2], "b": [1, 2]}},
        "evaluators": [{"name": "dying"}],
        "objectives": [{"metric": "value", "direction": "max"}],
        "strategy": {"name": "random"},
        "budget": {"evaluations": 4},
        "workers": {"executor": "process", "attempts": 2},
    }
    job: Job = archfront.run(spec, db=db, plugins=[file])
    assert job.status()["evaluations"] == {"running": 0, "done": 2, "failed": 2, "cancelled": 0}
    failures = job.status(tracebacks=10)["failures"]
    assert Counter((f["number"], f["kind"]) for f in failures) == {(1, "died"): 2, (2, "error"): 2}
    died = next(f for f in failures if f["number"] == 1)
    assert "last \\0 words" in died["traceback"]
    assert "is longer than 100 characters" in next(f for f in failures if f["number"] == 2)["message"]
