"""Results of other jobs that may serve this one: the same work on the same candidate, done before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.db.records import MetricValue
from archfront.db.schema import Candidate, Evaluation, Job, MetricRow, Reuse

if TYPE_CHECKING:
    from archfront.db.ledger import Ledger

_STEP = 500

Wanted = tuple[str, int, int]
"""A candidate's key, a fidelity, a repeat."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What an evaluation of another job gave; ``origin`` is (job, evaluation)."""

    origin: tuple[int, int]
    metrics: dict[str, MetricValue] = field(default_factory=dict)


class Results:
    """Finished evaluations of the jobs that do the same work as this one.

    Only what was really evaluated there serves: a result that was itself reused is found at its origin.
    """

    def __init__(self, ledger: Ledger, job_id: int, space_digest: str, work_digest: str) -> None:
        self._ledger = ledger
        self._job_id = job_id
        self._space_digest = space_digest
        self._work_digest = work_digest

    def find(self, wanted: Sequence[Wanted]) -> dict[Wanted, Result]:
        """The oldest result of each that has one."""
        return self._ledger.read(lambda connection: self._find(connection, wanted))

    def _find(self, connection: Connection, wanted: Sequence[Wanted]) -> dict[Wanted, Result]:
        found: dict[Wanted, Result] = {}
        keys = sorted({key for key, _, _ in wanted})
        asked = set(wanted)
        for start in range(0, len(keys), _STEP):
            for key, fidelity, repeat, job_id, number in connection.execute(self._query(keys[start : start + _STEP])):
                if (key, fidelity, repeat) in asked:
                    found.setdefault((key, fidelity, repeat), Result(origin=(job_id, number)))
        by_origin = {result.origin: result for result in found.values()}
        for job_id in {job_id for job_id, _ in by_origin}:
            numbers = sorted(number for job, number in by_origin if job == job_id)
            for start in range(0, len(numbers), _STEP):
                mine = (MetricRow.job_id == job_id) & MetricRow.number.in_(numbers[start : start + _STEP])
                for m in connection.execute(sa.select(MetricRow).where(mine)):
                    value = float("nan") if m.value is None else m.value
                    metric = MetricValue(value, m.std, m.provenance, m.predictor, m.device)
                    by_origin[job_id, m.number].metrics[m.name] = metric
        return found

    def _query(self, keys: Sequence[str]) -> sa.Select[str, int, int, int, int]:
        return (
            sa.select(Candidate.key, Evaluation.fidelity, Evaluation.repeat, Evaluation.job_id, Evaluation.number)
            .join(Evaluation, Evaluation.candidate_id == Candidate.id)
            .join(Job, Job.id == Evaluation.job_id)
            .outerjoin(Reuse, (Reuse.job_id == Evaluation.job_id) & (Reuse.number == Evaluation.number))
            .where(
                Candidate.space_digest == self._space_digest,
                Candidate.key.in_(keys),
                Job.work_digest == self._work_digest,
                Job.id != self._job_id,
                Evaluation.state == "done",
                Reuse.job_id.is_(None),
            )
            .order_by(Evaluation.job_id, Evaluation.number)
        )


def origins(connection: Connection, job_id: int, numbers: Sequence[int] | None = None) -> dict[int, tuple[int, int]]:
    """Origins of a job's reused evaluations by number; of all of them if ``numbers`` is None."""
    query = sa.select(Reuse.number, Reuse.origin_job_id, Reuse.origin_number).where(Reuse.job_id == job_id)
    if numbers is not None:
        query = query.where(Reuse.number.in_(list(numbers)))
    return {number: (origin_job, origin) for number, origin_job, origin in connection.execute(query)}


def count_reused(connection: Connection, job_id: int) -> int:
    """How many of a job's evaluations are others' results."""
    query = sa.select(sa.func.count()).select_from(Reuse).where(Reuse.job_id == job_id)
    return int(connection.execute(query).scalar_one())


def borrowed(connection: Connection, job_id: int) -> dict[int, list[tuple[int, int]]]:
    """Who uses a job's results: (job, evaluation) by the number of the origin."""
    query = sa.select(Reuse.origin_number, Reuse.job_id, Reuse.number).where(Reuse.origin_job_id == job_id)
    found: dict[int, list[tuple[int, int]]] = {}
    for origin, borrower, number in connection.execute(query):
        found.setdefault(origin, []).append((borrower, number))
    return found
