"""Batches arrive as they were sent."""

from dataclasses import asdict

from archfront.evaluators.evaluator import Metric, Task
from archfront.evaluators.learning import Learned
from archfront.search.executors.wire import pack_outcomes, pack_tasks, unpack_outcomes, unpack_tasks
from archfront.search.worker import Failure, Outcome


def test_tasks() -> None:
    tasks = [
        Task(number=1, genotype=[1, "a", {"b": None}], key="k" * 32, fidelity=9, repeat=2, seed=2**62),
        Task(number=2, genotype={"x": 0.1}, key="", fidelity=0, repeat=0, seed=0, final=True),
        Task(number=3, genotype=[], key="", fidelity=0, repeat=0, seed=0, learned=Learned("8-ab", {"slope": 1.5})),
    ]
    assert unpack_tasks(pack_tasks(tasks)) == tasks
    assert unpack_tasks(pack_tasks([])) == []


def test_a_batch_carries_what_was_learned_once() -> None:
    learned = Learned("8-ab", {"words": "x" * 5000})
    tasks = [Task(number=i, genotype=[i], key="", fidelity=0, repeat=0, seed=0, learned=learned) for i in range(100)]
    assert len(pack_tasks(tasks)) < 15_000


def test_a_task_survives_as_a_mapping() -> None:
    """The way it takes through Ray Tune: a trial's configuration."""
    learned = Learned("8-ab", {"widths": [[0.9, None]]})
    task = Task(number=1, genotype=[1], key="", fidelity=0, repeat=0, seed=0, learned=learned)
    assert Task(**asdict(task)) == task
    assert isinstance(asdict(task)["learned"], Learned)


def test_outcomes() -> None:
    metrics = {"a": Metric(1.5), "b": Metric(float("inf"), "predicted", 0.1, "p-1", "device")}
    outcomes = [
        Outcome(number=1, metrics=metrics, started_at=1.0, duration_s=2.0, checkpoint="file"),
        Outcome(number=2, failure=Failure(kind="error", message="m", traceback="t")),
        Outcome(number=3, metrics={}),
    ]
    assert unpack_outcomes(pack_outcomes(outcomes)) == outcomes
