"""What a report says, read from the ledger."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from archfront.client import Front, Job
from archfront.db.columns import Columns, load_columns
from archfront.db.dominance import hypervolume, nondominated
from archfront.db.queries import evaluation_rows, front_history
from archfront.db.walking import snapshot


@dataclass(kw_only=True)
class Finalist:
    """A finalist with all that was found of it.

    Attributes:
        row: its evaluation in the search.
        training: accuracies after the long training, or empty.
        timings: ``(settings, content)`` of each measurement.
    """

    row: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    timings: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    @property
    def predicted_ms(self) -> float | None:
        metrics = self.row["metrics"]
        # Of one that the search had measured, what was predicted stands beside it.
        value = metrics.get("latency_predicted_ms", metrics.get("latency_ms"))
        return None if value is None else float(value)

    def measured(self, backend: str, batch: int) -> dict[str, Any] | None:
        """The newest timing of a backend and batch size that succeeded."""
        found = [c for s, c in self.timings if s["backend"] == backend and s["batch"] == batch and not c.get("error")]
        return found[-1] if found else None

    def newest(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The newest timing that succeeded of each backend, batch size and device."""
        found = {(s["backend"], s["batch"], s.get("device")): (s, c) for s, c in self.timings if not c.get("error")}
        return list(found.values())


@dataclass(kw_only=True)
class Correlation:
    """How well ranks at a lower fidelity foretell those at a higher one, over candidates that have both."""

    metric: str
    low: int
    high: int
    low_values: npt.NDArray[np.float64]
    high_values: npt.NDArray[np.float64]
    spearman: float
    kendall: float


@dataclass(kw_only=True)
class Facts:
    """A job's results."""

    job: Job
    front: Front
    columns: Columns
    history: list[tuple[int, float]]
    correlations: list[Correlation]
    finalists: list[Finalist]
    candidates: int


def measured_front(
    finalists: list[Finalist], objectives: list[tuple[str, str]], batch: int, backend: str = "eager"
) -> set[int]:
    """Evaluations of the finalists that none of the others dominates once their latencies are the measured ones.

    Empty where latency is no objective, or a finalist's was not measured.
    """
    if "latency_ms" not in [name for name, _ in objectives]:
        return set()
    points = []
    for finalist in finalists:
        timing = finalist.measured(backend, batch)
        if timing is None:
            return set()
        metrics = {**finalist.row["metrics"], "latency_ms": timing["median_ms"]}
        points.append([-metrics[name] if direction == "max" else metrics[name] for name, direction in objectives])
    kept = nondominated(np.array(points, dtype=np.float64).reshape(len(points), -1))
    return {finalists[i].row["evaluation"] for i in np.arange(len(finalists))[kept]}


def gather(job: Job) -> Facts:
    members = job.front()
    with snapshot(job.ledger.engine) as connection:
        columns = load_columns(connection, job.id)
        keys = connection.exec_driver_sql(
            f"SELECT count(DISTINCT candidate_id) FROM evaluations WHERE job_id = {job.id}"
        ).scalar_one()
        level = members[0]["fidelity"] if len(members) else None
        stays = [] if level is None else front_history(connection, job.id, level)
    return Facts(
        job=job,
        front=members,
        columns=columns,
        history=hypervolume_history(columns, stays, members.objectives, level),
        correlations=correlations(job, columns, members.objectives),
        finalists=finalists(job),
        candidates=int(keys),
    )


def hypervolume_history(
    columns: Columns, stays: list[tuple[int, int, int | None]], objectives: list[tuple[str, str]], level: int | None
) -> list[tuple[int, float]]:
    """(evaluations committed, hypervolume) after each change of the front of a fidelity.

    Relative to the box between the best and the worst feasible values that the job found at that fidelity in the end:
    so all points of the curve share one reference, and it never falls.
    """
    if level is None:
        return []
    feasible = (columns["done"] == 1) & (columns["violation"] == 0) & (columns["fidelity"] == level)
    signs = np.array([-1.0 if direction == "max" else 1.0 for _, direction in objectives])
    points = np.stack([columns[name] for name, _ in objectives], axis=1) * signs
    best, worst = points[feasible].min(axis=0), points[feasible].max(axis=0)
    scaled = (points - best) / np.where(worst > best, worst - best, 1.0)
    place = {int(number): i for i, number in enumerate(columns["number"])}
    moments = sorted({seq for _, entered, left in stays for seq in (entered, left) if seq is not None})
    history = []
    for moment in moments:
        present = [place[n] for n, entered, left in stays if entered <= moment and (left is None or left > moment)]
        history.append((moment, hypervolume(scaled[present], np.ones(len(objectives)))))
    if history and history[-1][0] < len(columns):
        history.append((len(columns), history[-1][1]))
    return history


def correlations(job: Job, columns: Columns, objectives: list[tuple[str, str]]) -> list[Correlation]:
    """Between neighbouring fidelities, for each objective that depends on the fidelity."""
    done = columns.rows(columns["done"] == 1)
    levels = sorted({int(f) for f in done["fidelity"]})
    if len(levels) < 2:
        return []
    numbers = [int(n) for n in done["number"]]
    with snapshot(job.ledger.engine) as connection:
        keys = {row["evaluation"]: row["key"] for row in evaluation_rows(connection, job.id, numbers)}
    found = []
    for low, high in itertools.pairwise(levels):
        for name, _ in objectives:
            values = {
                level: {keys[int(n)]: v for n, f, v in zip(done["number"], done["fidelity"], done[name], strict=True)
                        if f == level}
                for level in (low, high)
            }  # fmt: skip
            both = sorted(set(values[low]) & set(values[high]))
            x, y = (np.array([values[level][key] for key in both]) for level in (low, high))
            if len(both) < 3 or np.array_equal(x, y) or np.ptp(x) == 0 or np.ptp(y) == 0:
                continue
            found.append(
                Correlation(
                    metric=name, low=low, high=high, low_values=x, high_values=y,
                    spearman=float(stats.spearmanr(x, y).statistic), kendall=float(stats.kendalltau(x, y).statistic),
                )
            )  # fmt: skip
    return found


def finalists(job: Job) -> list[Finalist]:
    """In the order in which they were chosen."""
    found: dict[int, Finalist] = {}
    benchmarks = job.ledger.benchmarks(job.id)
    numbers = list(dict.fromkeys(b["number"] for b in benchmarks))
    with snapshot(job.ledger.engine) as connection:
        for row in evaluation_rows(connection, job.id, numbers):
            found[row["evaluation"]] = Finalist(row=row)
    for benchmark in benchmarks:
        finalist = found[benchmark["number"]]
        if benchmark["kind"] == "training":
            finalist.training = benchmark["content"]
        else:
            finalist.timings.append((benchmark["settings"], benchmark["content"]))
    return list(found.values())
