"""Reading the front and the state of a job, now or at any past moment."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.db.columns import FIXED, Columns, load_columns
from archfront.db.dominance import nondominated
from archfront.db.expressions import Condition
from archfront.db.schema import Attempt, Candidate, Evaluation, FrontMember, Job, MetricRow, PredictorRow, Reuse
from archfront.db.selecting import among, fetched
from archfront.errors import InputError, suggestion

Fidelity = int | Literal["top", "any"]


@dataclass(frozen=True, kw_only=True)
class FrontQuery:
    """Which front of a job.

    Attributes:
        objectives: ``(metric, direction)`` pairs; the job's own if None.
        where: a condition on metrics that members must hold besides the job's constraints.
        fidelity: ``top`` (the highest that the job had reached), a number, or ``any``.
        seq: as of the commit of this many evaluations; None for now.
    """

    objectives: Sequence[tuple[str, str]] | None = None
    where: str | None = None
    fidelity: Fidelity = "top"
    seq: int | None = None


def job_objectives(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(objective["metric"], objective["direction"]) for objective in spec["objectives"]]


def front(connection: Connection, job_id: int, query: FrontQuery) -> list[dict[str, Any]]:
    """The members of a front in the order of their numbers, as ``evaluation_rows`` gives them.

    Raises:
        InputError: an unknown metric, a condition that cannot be parsed.
    """
    return evaluation_rows(connection, job_id, front_numbers(connection, job_id, query))


def front_numbers(connection: Connection, job_id: int, query: FrontQuery) -> list[int]:
    """The numbers of a front's evaluations, rising.

    Raises:
        InputError: an unknown metric, a condition that cannot be parsed.
    """
    spec = connection.execute(sa.select(Job.spec).where(Job.id == job_id)).scalar_one()
    if _is_stored(spec, query):
        return [int(number) for (number,) in _stored_front(connection, job_id, query, FrontMember.number)]
    members = _computed_front(load_columns(connection, job_id), query, job_objectives(spec))
    return [int(number) for number in members["number"]]


def _is_stored(spec: Mapping[str, Any], query: FrontQuery) -> bool:
    """The job's own front of one fidelity is stored with its history and read from there; any other is computed from
    the packed columns."""
    own = query.objectives is None or list(query.objectives) == job_objectives(spec)
    return own and query.where is None and query.fidelity != "any"


def front_table(
    connection: Connection, job_id: int, query: FrontQuery, known: Mapping[int, dict[str, Any]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """What people ask of a front's members, and no more: evaluation, key, genotype, fidelity, and metrics by name.

    Args:
        known: rows by number from an earlier call, which are not read again: what is done never changes.

    Raises:
        InputError: an unknown metric, a condition that cannot be parsed.
    """
    spec = connection.execute(sa.select(Job.spec).where(Job.id == job_id)).scalar_one()
    with _without_collection():
        if _is_stored(spec, query):
            stored = _stored_front(connection, job_id, query, FrontMember.number, FrontMember.shown)
            numbers = [number for number, _ in stored]
            texts = {number: text for number, text in stored if number not in known}
            rows = {row["evaluation"]: row for row in _parsed([text for text in texts.values() if text is not None])}
            rows |= _rows(connection, job_id, [number for number, text in texts.items() if text is None])
        else:
            columns = _computed_front(load_columns(connection, job_id), query, job_objectives(spec))
            numbers = columns["number"].astype(int).tolist()
            fresh = [number for number in numbers if number not in known]
            if len(fresh) < len(numbers):
                columns = columns.rows(np.isin(columns["number"], fresh))
            rows = _rows(connection, job_id, fresh, columns)
    return [dict(known[number]) if number in known else rows[number] for number in numbers]


def shown(number: int, key: str, genotype: Any, fidelity: int, metrics: Mapping[str, float | None]) -> str:
    """The row of ``front_table`` as the text that is kept with a member of a front."""
    return json.dumps({"evaluation": number, "key": key, "genotype": genotype, "fidelity": fidelity, **metrics})


def shown_rows(connection: Connection, job_id: int, numbers: Sequence[int]) -> dict[int, str]:
    """By number, ``shown`` of evaluations as they are in the ledger."""
    return {number: json.dumps(row) for number, row in _rows(connection, job_id, numbers).items()}


def _rows(
    connection: Connection, job_id: int, numbers: Sequence[int], columns: Columns | None = None
) -> dict[int, dict[str, Any]]:
    """The rows of ``front_table`` by number, in the order of ``numbers``.

    Args:
        columns: of the same evaluations in the same order, if they were read: metrics are then taken from there.
    """
    if not numbers:
        return {}
    rows = _bare_rows(connection, job_id, numbers)
    # A metric that the columns do not have may be missing, or not a number.
    if columns is not None and not np.isnan(columns.matrix[:, len(FIXED) :]).any():
        for name in columns.metrics:
            for row, value in zip(rows.values(), columns[name].tolist(), strict=True):
                row[name] = value
        return rows
    metrics = sa.select(MetricRow.number, MetricRow.name, MetricRow.value)
    metrics = metrics.where(MetricRow.job_id == job_id, among(connection, MetricRow.number, numbers))
    for number, name, value in connection.execute(metrics).all():
        rows[number][name] = value
    return rows


def _bare_rows(connection: Connection, job_id: int, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The rows of ``front_table`` by number, in the order of ``numbers``, without metrics."""
    query = (
        sa.select(Evaluation.number, Candidate.key, sa.cast(Candidate.genotype, sa.Text), Evaluation.fidelity)
        .join(Candidate, Candidate.id == Evaluation.candidate_id)
        .where(Evaluation.job_id == job_id, among(connection, Evaluation.number, numbers))
    )
    found = fetched(connection, query)
    rows = {
        number: {"evaluation": number, "key": key, "genotype": genotype, "fidelity": fidelity}
        for (number, key, _, fidelity), genotype in zip(found, _parsed([row[2] for row in found]), strict=True)
    }
    return {number: rows[number] for number in numbers}


def top_fidelity(connection: Connection, job_id: int, seq: int | None = None) -> int | None:
    """The highest fidelity at which the job had finished an evaluation, or None."""
    # Written out, not as a parameter: only so is the partial index on what is done used.
    done = (Evaluation.job_id == job_id) & (Evaluation.state == sa.literal_column("'done'"))
    highest = sa.select(sa.func.max(Evaluation.fidelity)).where(done)
    level = connection.execute(highest).scalar()
    while level is not None and seq is not None:
        first = sa.select(sa.func.min(Evaluation.seq)).where(done, Evaluation.fidelity == level)
        earliest = connection.execute(first).scalar()
        if earliest is not None and earliest <= seq:
            break
        level = connection.execute(highest.where(Evaluation.fidelity < level)).scalar()
    return level


def seq_at(connection: Connection, job_id: int, moment: float) -> int:
    """How many evaluations were committed at a moment (seconds since 1970, by the database's clock)."""
    mine = Evaluation.job_id == job_id
    last = connection.execute(sa.select(sa.func.max(Evaluation.seq)).where(mine)).scalar() or 0
    # Time rises with seq, so twenty look-ups by seq find it among a million.
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        look_up = sa.select(Evaluation.finished_at).where(mine, Evaluation.seq == middle)
        finished_at = connection.execute(look_up).scalar()
        was_there = finished_at is not None and finished_at <= moment
        low, high = (middle, high) if was_there else (low, middle - 1)
    return low


def seq_of(connection: Connection, job_id: int, number: int) -> int:
    """The commit order of an evaluation.

    Raises:
        InputError: no such finished evaluation.
    """
    query = sa.select(Evaluation.seq).where(Evaluation.job_id == job_id, Evaluation.number == number)
    seq = connection.execute(query).scalar()
    if seq is None:
        raise InputError("--at", number, "is no finished evaluation of this job", "Give its number, or a time.")
    return seq


def evaluation_rows(connection: Connection, job_id: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Evaluations with their candidates and metrics, in the order given.

    ``origin`` is the (job, evaluation) whose result a reused one is, else None; its checkpoint is then the origin's.
    """
    query = (
        sa.select(
            Evaluation.number, Candidate.key, sa.cast(Candidate.genotype, sa.Text), Evaluation.fidelity, Evaluation.seq,
            Evaluation.checkpoint, Evaluation.repeat, Reuse.origin_job_id, Reuse.origin_number,
        )
        .join(Candidate, Candidate.id == Evaluation.candidate_id)
        .outerjoin(Reuse, (Reuse.job_id == Evaluation.job_id) & (Reuse.number == Evaluation.number))
        .where(Evaluation.job_id == job_id, among(connection, Evaluation.number, numbers))
    )  # fmt: skip
    metrics = sa.select(MetricRow.number, MetricRow.name, MetricRow.value, MetricRow.std, MetricRow.provenance)
    metrics = metrics.where(MetricRow.job_id == job_id, among(connection, MetricRow.number, numbers))
    rows = _with_candidates(connection, connection.execute(query).all())
    for number, name, value, std, provenance in connection.execute(metrics).all():
        row = rows[number]
        row["metrics"][name] = value
        row["provenance"][name] = provenance
        if std is not None:
            row["std"][name] = std
    return [rows[number] for number in numbers]


def find_evaluation(connection: Connection, job_id: int, candidate: str) -> dict[str, Any]:
    """The evaluation behind a number, or the newest one of the candidate whose key begins so.

    Raises:
        InputError: none, or several candidates.
    """
    mine = Evaluation.job_id == job_id
    if candidate.isdigit() and len(candidate) < 10:
        known = connection.execute(sa.select(Evaluation.number).where(mine, Evaluation.number == int(candidate)))
        numbers = list(known.scalars())
    else:
        query = (
            sa.select(Evaluation.number, Candidate.key)
            .join(Candidate, Candidate.id == Evaluation.candidate_id)
            .where(mine, Candidate.key.startswith(candidate, autoescape=True))
            .order_by(Evaluation.fidelity.desc(), Evaluation.number.desc())
        )
        found = connection.execute(query).all()
        if len({key for _, key in found}) > 1:
            raise InputError("CANDIDATE", candidate, "begins several keys", "Give more of it.")
        numbers = [number for number, _ in found]
    if not numbers:
        raise InputError(
            "CANDIDATE", candidate, "is no evaluation of this job", "`archfront front` shows numbers and keys."
        )
    return evaluation_rows(connection, job_id, numbers[:1])[0]


def _with_candidates(connection: Connection, found: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """Rows by number, as yet without metrics."""
    rows: dict[int, dict[str, Any]] = {}
    genotypes = _parsed([row[2] for row in found])
    for (number, key, _, fidelity, seq, checkpoint, repeat, *origin), genotype in zip(found, genotypes, strict=True):
        rows[number] = {
            "evaluation": number, "key": key, "genotype": genotype, "fidelity": fidelity, "seq": seq,
            "repeat": repeat, "checkpoint": checkpoint, "metrics": {}, "std": {}, "provenance": {}, "origin": None,
        }  # fmt: skip
        if origin[0] is not None:
            kept = sa.select(Evaluation.checkpoint)
            kept = kept.where(Evaluation.job_id == origin[0], Evaluation.number == origin[1])
            rows[number] |= {"origin": tuple(origin), "checkpoint": connection.execute(kept).scalar()}
    return rows


def _parsed(texts: Sequence[str]) -> list[Any]:
    """JSON texts, parsed together: one call for each would take twice as long."""
    found: list[Any] = json.loads(f"[{','.join(texts)}]")
    return found


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for garbage meanwhile: among many new rows, all alive, it takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def front_history(connection: Connection, job_id: int, fidelity: int) -> list[tuple[int, int, int | None]]:
    """All stays in the front of a fidelity: (evaluation, entered_seq, left_seq)."""
    query = (
        sa.select(FrontMember.number, FrontMember.entered_seq, FrontMember.left_seq)
        .where(FrontMember.job_id == job_id, FrontMember.fidelity == fidelity)
        .order_by(FrontMember.entered_seq, FrontMember.number)
    )
    return [(number, entered, left) for number, entered, left in connection.execute(query)]


def counts(connection: Connection, job_id: int) -> dict[str, int]:
    """How many evaluations are in each state."""
    query = sa.select(Evaluation.state, sa.func.count()).where(Evaluation.job_id == job_id).group_by(Evaluation.state)
    found = {state: int(count) for state, count in connection.execute(query)}
    return {state: found.get(state, 0) for state in ("running", "done", "failed", "cancelled")}


def failures(connection: Connection, job_id: int, limit: int = 20) -> list[dict[str, Any]]:
    """The newest failed attempts, with their tracebacks."""
    query = (
        sa.select(Attempt)
        .where(Attempt.job_id == job_id)
        .order_by(Attempt.failed_at.desc(), Attempt.number.desc(), Attempt.attempt.desc())
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def latest_predictor(connection: Connection, job_id: int) -> dict[str, Any] | None:
    """The newest version that was fitted while the job ran: version, pairs, evaluator, and its median relative errors
    after and before, if it says so."""
    query = sa.select(PredictorRow).where(PredictorRow.job_id == job_id).order_by(PredictorRow.pairs.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    errors = {name: row["state"].get(name) for name in ("error", "error_before")}
    return {name: row[name] for name in ("version", "pairs", "evaluator")} | errors


def _stored_front(connection: Connection, job_id: int, query: FrontQuery, *what: Any) -> list[Any]:
    """``what`` of the members, whose first is the number, in the order of the numbers."""
    level = top_fidelity(connection, job_id, query.seq) if query.fidelity == "top" else query.fidelity
    if level is None:
        return []
    stays = sa.select(*what).where(FrontMember.job_id == job_id, FrontMember.fidelity == level)
    if query.seq is None:
        stays = stays.where(FrontMember.left_seq.is_(None))
    else:
        still = sa.or_(FrontMember.left_seq.is_(None), FrontMember.left_seq > query.seq)
        stays = stays.where(FrontMember.entered_seq <= query.seq, still)
    return sorted(connection.execute(stays).all(), key=lambda row: row[0])


def _computed_front(columns: Columns, query: FrontQuery, own: Sequence[tuple[str, str]]) -> Columns:
    """The columns of the members, in the order of their numbers."""
    if not len(columns):
        return columns  # which metrics there will be is not known yet
    objectives = own if query.objectives is None else query.objectives
    for name, _ in objectives:
        if name not in columns.metrics:
            raise InputError("--objectives", name, "is no metric of this job", suggestion(name, columns.metrics))
    keep = (columns["done"] == 1) & (columns["violation"] == 0)
    if query.seq is not None:
        keep &= columns["seq"] <= query.seq
    if query.fidelity == "top":
        done = columns["done"] == 1 if query.seq is None else (columns["done"] == 1) & (columns["seq"] <= query.seq)
        if done.any():
            keep &= columns["fidelity"] == columns["fidelity"][done].max()
    elif query.fidelity != "any":
        keep &= columns["fidelity"] == query.fidelity
    if query.where is not None:
        known = [*columns.metrics, *(name for name in FIXED if name in ("number", "fidelity", "seq"))]
        condition = Condition(query.where, known)
        keep &= condition.mask({name: columns[name] for name in condition.names | {"seq"}})
    rows = np.flatnonzero(keep)
    signs = [-1 if direction == "max" else 1 for _, direction in objectives]
    points = np.stack([sign * columns[name][rows] for sign, (name, _) in zip(signs, objectives, strict=True)], axis=1)
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        rows, points = rows[finite], points[finite]
    members = rows[nondominated(points)]
    return columns.rows(members[np.argsort(columns["number"][members])])
