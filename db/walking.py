"""Reading a whole job of any size, some rows at a time, as it stood at one moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from archfront.db.records import MetricValue
from archfront.db.schema import Candidate, Evaluation, FrontMember, MetricRow

WALK_ROWS = 1000
"""Evaluations in memory at a time."""

FIELDS = (
    "number", "seq", "ask", "fidelity", "repeat", "state", "attempts", "violation", "worker", "started_at",
    "finished_at", "duration_s", "error", "checkpoint",
)  # fmt: skip
"""Columns of ``evaluations`` that a walk gives."""


@dataclass(slots=True, kw_only=True)
class Walked:
    """One evaluation with everything that belongs to it.

    Attributes:
        row: ``FIELDS`` by name.
        stays: ``(entered_seq, left_seq)`` in the front of its fidelity; left_seq is None while it is a member.
    """

    row: dict[str, Any]
    key: str
    genotype: Any
    metrics: dict[str, MetricValue] = field(default_factory=dict)
    stays: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.row["number"])

    @property
    def on_front(self) -> bool:
        """Whether it is a member of the front of its fidelity."""
        return any(left is None for _, left in self.stays)


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection whose every query sees the same moment, however long it takes; nobody is kept from writing."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


def walk(connection: Connection, job_id: int, by: Literal["number", "seq"] = "number") -> Iterator[list[Walked]]:
    """All evaluations of a job in order; by ``seq``, the finished ones in the order of their commits."""
    order = Evaluation.number if by == "number" else Evaluation.seq
    mine = Evaluation.job_id == job_id
    last = connection.execute(sa.select(sa.func.max(order)).where(mine)).scalar()
    first = 0 if by == "number" else 1
    for start in range(first, (first - 1 if last is None else last) + 1, WALK_ROWS):
        within = mine & (order >= start) & (order < start + WALK_ROWS)
        query = (
            sa.select(*[getattr(Evaluation, name) for name in FIELDS], Candidate.key, Candidate.genotype)
            .join(Candidate, Candidate.id == Evaluation.candidate_id)
            .where(within)
            .order_by(order)
        )
        walked = {
            row[0]: Walked(row=dict(zip(FIELDS, row, strict=False)), key=row.key, genotype=row.genotype)
            for row in connection.execute(query)
        }
        metrics = sa.select(MetricRow).where(MetricRow.job_id == job_id, _among(MetricRow.number, by, start, within))
        for m in connection.execute(metrics.order_by(MetricRow.number, MetricRow.name)):
            value = float("nan") if m.value is None else m.value
            walked[m.number].metrics[m.name] = MetricValue(value, m.std, m.provenance, m.predictor, m.device)
        stays = sa.select(FrontMember.number, FrontMember.entered_seq, FrontMember.left_seq).where(
            FrontMember.job_id == job_id, _among(FrontMember.number, by, start, within)
        )
        for stay in connection.execute(stays.order_by(FrontMember.entered_seq)):
            walked[stay.number].stays.append((stay.entered_seq, stay.left_seq))
        yield list(walked.values())


def metric_names(connection: Connection, job_id: int) -> list[tuple[str, bool]]:
    """The metrics of a job in alphabetical order, each with whether any of its values has a deviation."""
    query = sa.select(MetricRow.name, sa.func.count(MetricRow.std)).where(MetricRow.job_id == job_id)
    return [(n, c > 0) for n, c in connection.execute(query.group_by(MetricRow.name).order_by(MetricRow.name))]


def _among(number: Any, by: str, start: int, within: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Which rows of another table belong to the evaluations of a step."""
    if by == "number":
        return sa.and_(number >= start, number < start + WALK_ROWS)
    chosen: sa.ColumnElement[bool] = number.in_(sa.select(Evaluation.number).where(within))
    return chosen
