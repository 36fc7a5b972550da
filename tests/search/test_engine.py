"""The engine's logic on a virtual clock and in this process."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sqlalchemy as sa
from jobs import synthetic_job
from ledger_dump import differences, dump

import archfront
from archfront.db.ledger import Ledger
from archfront.db.schema import Evaluation
from archfront.errors import InputError, JobBusyError, JobFailedError
from archfront.evaluators.evaluator import Metric, Task
from archfront.plugins import read_plugins
from archfront.search.driver import DriveOptions, drive, submit
from archfront.search.engine import Engine
from archfront.search.executors.simulated import SimulatedExecutor
from archfront.search.job import parse_spec
from archfront.search.plugins import load_plugins
from archfront.search.resolve import ResolvedJob, resolve
from archfront.search.worker import Failure, Outcome


def simulated(task: Task) -> tuple[Outcome, float]:
    cost = float(sum(task.genotype))
    metrics = {"gain": Metric(cost % 7 + task.fidelity), "cost": Metric(cost)}
    return Outcome(number=task.number, metrics=metrics), 1.0 + cost % 5


def engine_on(
    path: Path, plugin: Path, executor: SimulatedExecutor, **changes: Any
) -> tuple[Engine, ResolvedJob, Ledger, int]:
    load_plugins(read_plugins([plugin]))
    spec = parse_spec(synthetic_job(**changes))
    job = resolve(spec)
    ledger = Ledger.open(str(path))
    job_id = ledger.create_job(spec.name, spec.model_dump(mode="json"), job.space.digest)
    writer = ledger.writer(job_id, ledger.begin_run(job_id, {}), job.signs)
    return Engine(job, writer, executor, ledger.history(job_id, job.signs)), job, ledger, job_id


def test_workers_are_never_idle_while_work_remains(tmp_path: Path, plugin: Path) -> None:
    executor = SimulatedExecutor(simulated, slots=8)
    engine, _, ledger, job_id = engine_on(
        tmp_path / "l.db", plugin, executor, evaluations=400, strategy={"name": "random"}
    )
    assert engine.run() == "budget"
    with ledger.engine.connect() as connection:
        rows = connection.execute(sa.select(Evaluation.state)).scalars().all()
    assert rows == ["done"] * 400
    busy = sum(simulated(task)[1] for task in _tasks(ledger, job_id))
    # Eight workers, no idle time but at the very end, where the last ones wait for the longest.
    assert executor.clock_s < busy / 8 + 5


def _tasks(ledger: Ledger, job_id: int) -> list[Task]:
    evaluations = ledger.history(job_id, [("gain", -1), ("cost", 1)]).evaluations
    return [
        Task(number=e.number, genotype=e.genotype, key=e.key, fidelity=e.fidelity, repeat=0, seed=0)
        for e in evaluations
    ]


def test_a_death_costs_only_the_guilty_one_of_a_batch(tmp_path: Path, plugin: Path) -> None:
    deaths = []

    def deadly(task: Task) -> tuple[Outcome, float]:
        return simulated(task)

    class Deadly(SimulatedExecutor):
        """Dies over every batch that holds evaluation 13."""

        def submit(self, batch: int, tasks: Any, timeout_s: float) -> None:
            if any(task.number == 13 for task in tasks):
                self._deaths.add(self.submitted)
                deaths.append(len(tasks))
            super().submit(batch, tasks, timeout_s)

    engine, _, ledger, job_id = engine_on(
        tmp_path / "l.db", plugin, Deadly(deadly, slots=1), evaluations=40, evaluator={"batch_size": 8}
    )
    engine.run()
    rows = dump(ledger, job_id)
    assert [row[0] for row in rows["evaluations"] if row[6] == "failed"] == [13]
    charged = [row[:3] for row in rows["attempts"] if row[1]]
    assert charged == [(13, 1, "died"), (13, 2, "died"), (13, 3, "died")]
    assert deaths == [8, 1, 1, 1]


def test_a_small_space_is_exhausted_and_says_so(tmp_path: Path, plugin: Path) -> None:
    for strategy in ({"name": "random"}, {"name": "nsga2"}, {"name": "regularized-evolution"}):
        job = synthetic_job(100, space={"name": "choices", "columns": {"a": [1, 2, 3], "b": [1, 2]}}, strategy=strategy)
        done = archfront.run(job, db=tmp_path / "l.db", plugins=[plugin])
        assert done.status()["evaluations"]["done"] == 6
        assert "finds nothing new" in done.status()["reason"]


def test_stopped_and_resumed_equals_unbroken(tmp_path: Path, plugin: Path) -> None:
    """The same as the kill test, in process, with an ordered stop at every possible moment."""
    spec = synthetic_job(60, evaluator={"fidelities": [1, 3], "misdeed": "nan", "every": 11})
    sources = read_plugins([plugin])
    whole = archfront.run(spec, db=tmp_path / "whole.db", plugins=[plugin])
    ledger = Ledger.open(str(tmp_path / "stopped.db"))
    job_id = submit(ledger, spec, sources)
    steps = iter(range(10_000))
    while drive(ledger, job_id, DriveOptions(plugins=sources, stop=lambda: next(steps) % 3 == 2)) == "stopped":
        assert ledger.job(job_id)["state"] == "running"
    assert differences(dump(whole.ledger, whole.id), dump(ledger, job_id)) == []


def test_extending_a_finished_job(tmp_path: Path, plugin: Path) -> None:
    job = archfront.run(synthetic_job(20), db=tmp_path / "l.db", plugins=[plugin])
    assert job.resume(evaluations=30) == "budget"
    assert job.status()["evaluations"]["done"] == 50
    assert job.spec["budget"]["evaluations"] == 50


def test_warm_start_evaluates_the_best_of_another_job_first(tmp_path: Path, plugin: Path) -> None:
    first = archfront.run(synthetic_job(60), db=tmp_path / "l.db", plugins=[plugin])
    best = {row["key"] for row in first.front()}
    second = archfront.run(
        synthetic_job(20, name="second", warm_start={"job": "synthetic", "count": len(best)}),
        db=tmp_path / "l.db",
        plugins=[plugin],
    )
    rows = dump(second.ledger, second.id)
    assert rows["asks"][0][4] == "warm_start"
    assert {row[2] for row in rows["evaluations"][: len(best)]} == best
    with pytest.raises(InputError, match="another space"):
        archfront.run(
            synthetic_job(space={"name": "choices", "columns": {"a": [1, 2]}}, warm_start="synthetic"),
            db=tmp_path / "l.db",
            plugins=[plugin],
        )


def test_seeds_come_first_and_are_checked(tmp_path: Path, plugin: Path) -> None:
    seeds = [[1] * 8, [4] * 8]
    job = archfront.run(synthetic_job(10, seeds=seeds), db=tmp_path / "l.db", plugins=[plugin])
    assert [row[3] for row in dump(job.ledger, job.id)["evaluations"][:2]] == [str(s) for s in seeds]
    with pytest.raises(InputError, match=r"seeds\.0: 9 .*is not one of its choices"):
        archfront.run(synthetic_job(10, seeds=[[9] * 8]), db=tmp_path / "l.db", plugins=[plugin])


def test_constraints_keep_the_infeasible_off_the_front(tmp_path: Path, plugin: Path) -> None:
    plain = synthetic_job(80, constraints=["cost <= 15"])
    sure = synthetic_job(80, constraints=["cost <= 15 @ 95%"])
    for spec, bound in ((plain, 15.0), (sure, 15 - 1.64 * 0.5)):
        job = archfront.run(spec, db=tmp_path / "l.db", plugins=[plugin])
        costs = [row["cost"] for row in job.front()]
        assert costs
        assert max(costs) <= bound


def test_strategies_know_the_constraints_on_objectives(plugin: Path) -> None:
    """All but those that ask for a confidence, which depends on more than the objective's value."""
    load_plugins(read_plugins([plugin]))
    job = resolve(parse_spec(synthetic_job(constraints=["cost <= 15", "cost >= 4", "gain >= 3", "cost <= 9 @ 95%"])))
    known = resolve(parse_spec(synthetic_job(constraints=["cost <= 15", "cost >= 4", "gain >= 3"])))
    violated = 0
    for cost in (2.0, 4.0, 15.0, 22.0):
        for gain in (2.0, 3.0, 5.0):
            verdict = known.judge({"cost": Metric(cost, std=0.5), "gain": Metric(gain)})
            assert job.problem.excess(np.array([verdict.objectives])) == pytest.approx(verdict.violation)
            violated += verdict.violation > 0
    assert violated == 8


@pytest.mark.parametrize("misdeed", ["raise", "nan"])
def test_an_evaluator_that_misbehaves_costs_its_own_attempts(tmp_path: Path, plugin: Path, misdeed: str) -> None:
    job = archfront.run(
        synthetic_job(20, evaluator={"misdeed": misdeed, "every": 5}), db=tmp_path / "l.db", plugins=[plugin]
    )
    status = job.status()
    assert status["evaluations"] == {"done": 16, "failed": 4, "running": 0, "cancelled": 0}
    assert job.state == "done"
    failures = job.status(tracebacks=100)["failures"]
    assert len(failures) == 12
    expected = "synthetic misdeed" if misdeed == "raise" else "gain is nan"
    assert all(expected in failure["message"] for failure in failures)
    assert misdeed == "nan" or "RuntimeError: synthetic misdeed" in failures[0]["traceback"]


def test_hang_death_and_memory_cost_an_attempt_each(tmp_path: Path, plugin: Path) -> None:
    for misdeed, kind, timeout_s in (("hang", "timeout", 1.5), ("die", "died", 60), ("hog", "memory", 60)):
        job = archfront.run(
            synthetic_job(
                4,
                name=misdeed,
                evaluator={"misdeed": misdeed, "every": 4},
                workers={"executor": "process", "timeout_s": timeout_s, "attempts": 2, "memory_mb": 700},
            ),
            db=tmp_path / "l.db",
            plugins=[plugin],
        )
        status = job.status()
        assert (status["evaluations"]["done"], status["evaluations"]["failed"]) == (3, 1)
        assert [(f["attempt"], f["kind"]) for f in status["failures"]] == [(2, kind), (1, kind)]


def test_a_job_in_which_all_fails_fails_early(tmp_path: Path, plugin: Path) -> None:
    with pytest.raises(JobFailedError, match=r"The first 2[0-9] evaluations all failed"):
        archfront.run(synthetic_job(500, evaluator={"misdeed": "raise"}), db=tmp_path / "l.db", plugins=[plugin])
    job = archfront.Job(tmp_path / "l.db")
    assert job.state == "failed"
    assert job.status()["evaluations"]["failed"] < 30


def test_hours_end_a_job(tmp_path: Path, plugin: Path) -> None:
    spec = synthetic_job(10_000, evaluator={"sleep_s": 0.02}, budget={"evaluations": 10_000, "hours": 0.3 / 3600})
    started = time.monotonic()
    job = archfront.run(spec, db=tmp_path / "l.db", plugins=[plugin])
    assert time.monotonic() - started < 30
    assert "hours" in job.status()["reason"]
    assert 0 < job.status()["evaluations"]["done"] < 1000


def test_lost_batches_are_sent_again_at_no_charge(tmp_path: Path, plugin: Path) -> None:
    class Losing(SimulatedExecutor):
        """Loses every third batch."""

        def wait(self, timeout_s: float) -> Any:
            results = super().wait(timeout_s)
            for result in results:
                if result.batch % 3 == 0:
                    result.outcomes, result.lost = [], True
            return results

    engine, _, ledger, job_id = engine_on(tmp_path / "l.db", plugin, Losing(simulated, slots=3), evaluations=50)
    assert engine.run() == "budget"
    rows = dump(ledger, job_id)
    assert [row[6] for row in rows["evaluations"]] == ["done"] * 50
    assert rows["attempts"] == []
    assert {row[8] for row in rows["evaluations"]} == {1}


def test_failures_are_told_but_not_to_the_front(tmp_path: Path, plugin: Path) -> None:
    def failing(task: Task) -> tuple[Outcome, float]:
        if task.number % 2:
            return Outcome(number=task.number, failure=Failure(kind="error", message="no")), 1.0
        return simulated(task)

    engine, _, ledger, job_id = engine_on(
        tmp_path / "l.db", plugin, SimulatedExecutor(failing, slots=4), evaluations=60
    )
    assert engine.run() == "budget"
    members = [row[1] for row in dump(ledger, job_id)["front_members"]]
    assert members
    assert all(number % 2 == 0 for number in members)


def test_a_batch_that_died_is_known_after_a_resume(tmp_path: Path, plugin: Path) -> None:
    """Its members are tried alone, and a resumed job must go on doing so: or its rows come in another order."""
    spec = synthetic_job(
        16,
        evaluator={"misdeed": "die", "every": 4, "batch_size": 4},
        workers={"executor": "process", "attempts": 1},
        strategy={"name": "random"},
    )
    sources = read_plugins([plugin])
    whole = archfront.run(spec, db=tmp_path / "whole.db", plugins=[plugin])
    ledger = Ledger.open(str(tmp_path / "stopped.db"))
    job_id = submit(ledger, spec, sources)
    for stop_after in (3, 6):
        seen: list[int] = []
        options = DriveOptions(
            plugins=sources,
            observe=lambda progress, seen=seen: seen.append(progress.finished),  # type: ignore[misc]
            stop=lambda seen=seen, limit=stop_after: bool(seen and seen[-1] >= limit),  # type: ignore[misc]
        )
        assert drive(ledger, job_id, options) == "stopped"
    assert drive(ledger, job_id, DriveOptions(plugins=sources)) == "budget"
    rows = dump(ledger, job_id)
    assert any(row[1] == 0 and row[2] == "suspect" for row in rows["attempts"])
    assert differences(dump(whole.ledger, whole.id), rows) == []


ODD = '''
from archfront.evaluators.evaluator import Evaluated, Evaluator, Metric, MetricSpec

class Odd(Evaluator):
    """Every other result is of a wrong kind."""

    name = "odd"
    batch_size = 8
    metrics = [MetricSpec(name="gain", unit="1", direction="max"), MetricSpec(name="cost", unit="1", direction="min")]
    wrong = [None, "words", 10**400, [1.0]]

    def evaluate(self, tasks, context):
        return [self.one(task.number) for task in tasks]

    def one(self, number):
        if number % 16 == 15:
            return {"gain": 1.0}
        value = self.wrong[number // 2 % 4] if number % 2 else float(number)
        return Evaluated({"gain": Metric(value), "cost": Metric(1.0)})

ARCHFRONT_PLUGINS = {"evaluators": {"odd": Odd}}
'''


def test_a_result_of_a_wrong_type_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    spec = synthetic_job(32) | {"evaluators": [{"name": "odd"}]}
    job = archfront.run(spec, db=tmp_path / "l.db", plugins=[tmp_path / "odd.py"])
    assert job.status()["evaluations"] == {"done": 16, "failed": 16, "running": 0, "cancelled": 0}
    assert job.state == "done"


def test_a_refused_extension_changes_nothing(tmp_path: Path, plugin: Path) -> None:
    job = archfront.run(synthetic_job(10), db=tmp_path / "l.db", plugins=[plugin])
    run_id = job.ledger.begin_run(job.id, job.ledger.last_code(job.id) or {})
    with pytest.raises(JobBusyError):
        job.resume(evaluations=5)
    assert job.spec["budget"]["evaluations"] == 10
    job.ledger.end_run(job.id, run_id, "stopped", None, "running")
    job.resume(evaluations=5)
    assert job.status()["evaluations"]["done"] == 15


def test_what_an_evaluator_started_ends_with_it(tmp_path: Path) -> None:
    start = "        return [self.one("
    source = ODD.replace(start, "        __import__('subprocess').run(['sleep', '4321'])\n" + start)
    assert source != ODD
    (tmp_path / "sleeping.py").write_text(source)
    workers = {"executor": "process", "count": 1, "timeout_s": 0.2, "attempts": 1}
    spec = synthetic_job(1) | {"evaluators": [{"name": "odd"}], "workers": workers}
    with pytest.raises(JobFailedError):
        archfront.run(spec, db=tmp_path / "l.db", plugins=[tmp_path / "sleeping.py"])
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "4321"]]
    assert left == []


def test_a_failed_job_gets_another_chance(tmp_path: Path) -> None:
    """Its plug-in was mended: the failures of before do not end it again."""
    path = tmp_path / "odd.py"
    path.write_text(ODD.replace("if number % 16 == 15", "if True"))
    spec = synthetic_job(60) | {"evaluators": [{"name": "odd"}]}
    with pytest.raises(JobFailedError):
        archfront.run(spec, db=tmp_path / "l.db", plugins=[path])
    path.write_text(ODD)
    job = archfront.Job(tmp_path / "l.db", plugins=[path])
    assert job.resume(accept_changes=lambda _: True) == "budget"
    assert job.status()["evaluations"]["done"] > 0


def test_a_metric_may_not_be_named_like_a_column(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD.replace('"gain"', '"seq"'))
    spec = synthetic_job(4) | {"evaluators": [{"name": "odd"}], "objectives": [{"metric": "seq", "direction": "max"}]}
    with pytest.raises(InputError, match="column of every evaluation"):
        archfront.run(spec, db=tmp_path / "l.db", plugins=[tmp_path / "odd.py"])
