"""What a job's engine resumes from, read in pieces: a driver that takes over a job of a million stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.db.columns import load_columns
from archfront.db.records import AskRecord, PredictorRecord, StoredEvaluation
from archfront.db.schema import AskRow, Attempt, Candidate, Evaluation, PredictorRow, Run

_ASKS = 500
_EVALUATIONS = 10_000
"""Rows in memory at a time."""


@dataclass(kw_only=True)
class History:
    """A job's past, for whoever holds its lease.

    Attributes:
        ask_count: how many asks there are.
        evaluation_count: how many evaluations they made.
        last_ask: ``(told, count)`` of the last one that was no scheduler's, or None.
        numbers: ``(finished,)``, in order of seq.
        fidelities: ``(finished,)``.
        objectives: ``(finished, m)``, oriented; NaN rows where failed.
        violations: ``(finished,)``, inf where failed.
        failed: numbers of those that failed; others that are not done were cancelled.
        unfinished: evaluations that are written ahead.
        suspects: evaluations whose batch died, to be tried alone.
        elapsed_s: that runs have spent on the job.
    """

    ask_count: int
    evaluation_count: int
    last_ask: tuple[int, int] | None
    numbers: npt.NDArray[np.int64]
    fidelities: npt.NDArray[np.int64]
    objectives: npt.NDArray[np.float64]
    violations: npt.NDArray[np.float64]
    failed: set[int]
    unfinished: list[StoredEvaluation]
    suspects: set[int]
    elapsed_s: float
    _read: Callable[[Callable[[Connection], Any]], Any]
    _job_id: int

    def replay(self) -> Iterator[AskRecord]:
        """All asks with what they made, in order."""
        for start in range(0, self.ask_count, _ASKS):
            yield from self._read(partial(_asks, self._job_id, start))

    def stored(self) -> Iterator[StoredEvaluation]:
        """All evaluations in the order of their numbers."""
        for start in range(0, self.evaluation_count, _EVALUATIONS):
            within = (Evaluation.number >= start) & (Evaluation.number < start + _EVALUATIONS)
            yield from self._read(partial(_evaluations, self._job_id, within))

    def predictors(self) -> list[PredictorRecord]:
        """The versions that were fitted while the job ran, in order."""
        found: list[PredictorRecord] = self._read(partial(_predictors, self._job_id))
        return found

    def measured(self, names: Sequence[str]) -> npt.NDArray[np.float64]:
        """``(n, len(names))``: these metrics of each evaluation that is done and has all of them, in order of seq."""
        found: npt.NDArray[np.float64] = self._read(partial(_measured, self._job_id, names))
        return found

    @property
    def finished(self) -> list[int]:
        """``numbers`` as plain integers."""
        return [int(number) for number in self.numbers]

    @property
    def asks(self) -> list[AskRecord]:
        """All asks at once."""
        return list(self.replay())

    @property
    def evaluations(self) -> list[StoredEvaluation]:
        """All evaluations at once."""
        return list(self.stored())


def read_history(
    read: Callable[[Callable[[Connection], Any]], Any], job_id: int, objectives: Sequence[tuple[str, int]]
) -> History:
    """The past of a job.

    Args:
        read: runs a step that only reads, and waits for a database that is away.
        objectives: ``(metric, sign)``, sign -1 for those to maximise.
    """

    def step(connection: Connection) -> History:
        mine = AskRow.job_id == job_id
        columns = load_columns(connection, job_id)
        done = columns["done"] == 1
        points = np.full((len(columns), len(objectives)), np.nan)
        for i, (name, sign) in enumerate(objectives):
            if name in columns:
                points[done, i] = sign * columns[name][done]
        points[~np.isfinite(points).all(axis=1)] = np.nan
        last = sa.select(AskRow.told, AskRow.count).where(mine, AskRow.source != "scheduler")
        found = connection.execute(last.order_by(AskRow.number.desc()).limit(1)).first()
        alone = sa.select(Attempt.number).where(Attempt.job_id == job_id, Attempt.attempt == 0)
        failed = sa.select(Evaluation.number).where(Evaluation.job_id == job_id, Evaluation.state == "failed")
        of_job = sa.select(sa.func.count()).where(Evaluation.job_id == job_id)
        return History(
            ask_count=connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one(),
            evaluation_count=connection.execute(of_job).scalar_one(),
            last_ask=None if found is None else (found[0], found[1]),
            numbers=columns["number"].astype(np.int64),
            fidelities=columns["fidelity"].astype(np.int64),
            objectives=points,
            violations=np.where(done, columns["violation"], np.inf),
            # The rows need not be read where everything went well.
            failed=set() if done.all() else set(connection.execute(failed).scalars()),
            unfinished=_evaluations(job_id, Evaluation.seq.is_(None), connection),
            suspects=set(connection.execute(alone).scalars()),
            elapsed_s=_elapsed(connection, job_id),
            _read=read,
            _job_id=job_id,
        )

    result: History = read(step)
    return result


def _asks(job_id: int, start: int, connection: Connection) -> list[AskRecord]:
    """The asks numbered ``start`` and, at most, 499 more."""
    mine = (AskRow.job_id == job_id) & (AskRow.number >= start) & (AskRow.number < start + _ASKS)
    rows = connection.execute(sa.select(AskRow).where(mine).order_by(AskRow.number)).all()
    first, end = rows[0].first, rows[-1].first + rows[-1].count
    query = (
        sa.select(Candidate.key, Candidate.genotype, Evaluation.fidelity, Evaluation.repeat)
        .join(Evaluation, Evaluation.candidate_id == Candidate.id)
        .where(Evaluation.job_id == job_id, Evaluation.number >= first, Evaluation.number < end)
        .order_by(Evaluation.number)
    )
    made = connection.execute(query).all()
    asks = []
    for row in rows:
        mine_made = made[row.first - first : row.first - first + row.count]
        keys, genotypes, fidelities, repeats = zip(*mine_made, strict=True) if mine_made else ((), (), (), ())
        asks.append(
            AskRecord(
                number=row.number,
                told=row.told,
                first=row.first,
                source=row.source,
                keys=list(keys),
                genotypes=list(genotypes),
                fidelities=list(fidelities),
                repeats=list(repeats),
                memory=row.memory,
                predictor=row.predictor,
            )
        )
    return asks


def _evaluations(job_id: int, within: sa.ColumnElement[bool], connection: Connection) -> list[StoredEvaluation]:
    query = (
        sa.select(
            Evaluation.number, Evaluation.ask, Candidate.key, Candidate.genotype, Evaluation.fidelity,
            Evaluation.repeat, Evaluation.seq, Evaluation.state, Evaluation.attempts, Evaluation.violation,
        )
        .join(Candidate, Candidate.id == Evaluation.candidate_id)
        .where(Evaluation.job_id == job_id, within)
        .order_by(Evaluation.number)
    )  # fmt: skip
    names = StoredEvaluation.__slots__
    return [StoredEvaluation(**dict(zip(names, row, strict=True))) for row in connection.execute(query)]


def _predictors(job_id: int, connection: Connection) -> list[PredictorRecord]:
    query = sa.select(PredictorRow.pairs, PredictorRow.version, PredictorRow.evaluator, PredictorRow.state)
    rows = connection.execute(query.where(PredictorRow.job_id == job_id).order_by(PredictorRow.pairs))
    return [PredictorRecord(pairs=p, version=v, evaluator=e, state=s) for p, v, e, s in rows]


def _measured(job_id: int, names: Sequence[str], connection: Connection) -> npt.NDArray[np.float64]:
    columns = load_columns(connection, job_id)
    if not all(name in columns for name in names):
        return np.empty((0, len(names)))
    values = np.stack([columns[name] for name in names], axis=1)
    whole: npt.NDArray[np.bool_] = (columns["done"] == 1) & np.isfinite(values).all(axis=1)
    return np.asarray(values[whole])


def _elapsed(connection: Connection, job_id: int) -> float:
    """Seconds that runs have spent on a job; a killed run counts up to its last commit."""
    runs = connection.execute(
        sa.select(Run.started_at, Run.ended_at).where(Run.job_id == job_id).order_by(Run.id)
    ).all()
    total = 0.0
    for i, (start, end) in enumerate(runs):
        if end is None:
            until = runs[i + 1][0] if i + 1 < len(runs) else float("inf")
            mine = (Evaluation.finished_at >= start) & (Evaluation.finished_at <= until)
            last = sa.select(sa.func.max(Evaluation.finished_at)).where(Evaluation.job_id == job_id, mine)
            end = connection.execute(last).scalar() or start
        total += end - start
    return total
