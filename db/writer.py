"""The one way in which a running job's rows are written: everything of a step in one fenced transaction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from archfront.db.bulk import bulk_of
from archfront.db.columns import CHUNK_ROWS, FIXED, load_columns, pack, read_rows, to_matrix
from archfront.db.connection import Patience, write
from archfront.db.front import FrontChange, IncrementalFront
from archfront.db.lease import LEASE_S
from archfront.db.queries import shown, shown_rows
from archfront.db.records import AskRecord, AttemptRecord, FinishedRecord, PredictorRecord
from archfront.db.schema import WORKER_LENGTH, ColumnChunk, FrontMember, Job, Lease
from archfront.errors import LeaseLostError, LedgerError

_KEY = ("job_id", "number")

_FIRST_REFRESH, _REFRESH_GROWTH = 100, 10
"""After how many results the database is told to look at its tables, and how much later again."""


class JobWriter:
    """Writes the asks, results and front of one job for the run that holds its lease.

    Args:
        objectives: ``(metric, sign)`` in order; sign -1 for those to maximise.
    """

    def __init__(
        self, engine: Engine, job_id: int, space_digest: str, run_id: int, objectives: Sequence[tuple[str, int]]
    ) -> None:
        self._engine = engine
        self.job_id = job_id
        self.run_id = run_id
        self._space_digest = space_digest
        self._objectives = list(objectives)
        self._bulk = bulk_of(engine.dialect.name)
        self._refresh_at = _FIRST_REFRESH
        # Key and genotype of what this writer has written ahead: what enters a front need not be read again.
        self._ahead: dict[int, tuple[str, Any]] = {}
        with engine.connect() as connection:
            self._restore(connection)

    def commit(
        self,
        asks: Sequence[AskRecord] = (),
        finished: Sequence[FinishedRecord] = (),
        attempts: Sequence[AttemptRecord] = (),
        predictors: Sequence[PredictorRecord] = (),
    ) -> bool:
        """Write all of it in one transaction, and prolong the lease.

        Returns:
            whether somebody has asked to cancel the job.

        Raises:
            LeaseLostError: another run holds the job now; nothing was written.
            LedgerError: an evaluation was finished before; nothing was written.
        """
        seqs = list(range(self.next_seq, self.next_seq + len(finished)))
        changes = self._front_changes(seqs, finished)
        for ask in asks:
            numbers = range(ask.first, ask.first + ask.count)
            self._ahead.update(zip(numbers, zip(ask.keys, ask.genotypes, strict=True), strict=True))
        tail_start = len(self._tail)

        def step(connection: Connection, moment: float) -> None:
            self._write_predictors(connection, predictors, moment)
            self._write_asks(connection, asks, moment)
            self._write_attempts(connection, attempts, moment)
            del self._tail[tail_start:]
            self._write_finished(connection, seqs, finished, moment)
            self._write_front(connection, changes, finished)
            self._pack_tail(connection)
            if self.next_seq + len(finished) > self._refresh_at:
                self._bulk.refresh_plans(connection)

        cancel = self._transact(step)
        for record in finished:
            self._ahead.pop(record.number, None)
        self.next_seq += len(finished)
        while self.next_seq > self._refresh_at:
            self._refresh_at *= _REFRESH_GROWTH
        while len(self._tail) >= CHUNK_ROWS:
            del self._tail[:CHUNK_ROWS]
        return cancel

    def front_points(self, fidelity: int) -> Any:
        """Oriented objectives ``(members, m)`` of the front of a fidelity."""
        return self._fronts[fidelity].points if fidelity in self._fronts else np.empty((0, len(self._objectives)))

    def _restore(self, connection: Connection) -> None:
        mine = (Lease.job_id == self.job_id) & (Lease.run_id == self.run_id)
        self._commits = connection.execute(sa.select(Lease.commits).where(mine)).scalar() or 0
        columns = load_columns(connection, self.job_id)
        self.next_seq = len(columns) + 1
        packed = connection.execute(
            sa.select(sa.func.max(ColumnChunk.last_seq)).where(ColumnChunk.job_id == self.job_id)
        ).scalar_one()
        names, matrix = read_rows(connection, self.job_id, (packed or 0) + 1)
        self._tail: list[dict[str, float]] = [dict(zip(names, row, strict=True)) for row in matrix.tolist()]
        self._fronts: dict[int, IncrementalFront] = {}
        members = defaultdict(list)
        present = sa.select(FrontMember.fidelity, FrontMember.number).where(
            FrontMember.job_id == self.job_id, FrontMember.left_seq.is_(None)
        )
        for fidelity, number in connection.execute(present.order_by(FrontMember.entered_seq)):
            members[fidelity].append(number)
        order = np.argsort(columns["number"]) if members else np.empty(0, dtype=np.int64)
        for fidelity, numbers in members.items():
            rows = order[np.searchsorted(columns["number"], numbers, sorter=order)]
            points = np.stack([sign * columns[name][rows] for name, sign in self._objectives], axis=1)
            self._front(fidelity).restore(numbers, points)

    def _front(self, fidelity: int) -> IncrementalFront:
        if fidelity not in self._fronts:
            self._fronts[fidelity] = IncrementalFront(len(self._objectives))
        return self._fronts[fidelity]

    def _front_changes(self, seqs: Sequence[int], finished: Sequence[FinishedRecord]) -> list[tuple[int, FrontChange]]:
        by_fidelity: dict[int, list[tuple[int, FinishedRecord]]] = defaultdict(list)
        for seq, record in zip(seqs, finished, strict=True):
            if record.state == "done" and record.violation == 0:
                by_fidelity[record.fidelity].append((seq, record))
        changes = []
        for fidelity, rows in by_fidelity.items():
            points = np.array([record.objectives for _, record in rows], dtype=float)
            inserted = self._front(fidelity).insert([s for s, _ in rows], [r.number for _, r in rows], points)
            changes += [(fidelity, change) for change in inserted]
        return changes

    def _transact(self, step: Callable[[Connection, float], None]) -> bool:
        """Run a step in a write transaction, once: a database that goes away is waited for, and asked whether the
        commit that was under way took place. Returns whether the job is to be cancelled."""
        waited = Patience()
        while True:
            try:
                with write(self._engine) as connection:
                    moment, cancel = self._prolong(connection, again=waited.begun)
                    if moment is not None:
                        step(connection, moment)
                self._commits += 1
                return cancel
            except DBAPIError as error:
                waited.wait_or_raise(error, str(self._engine.url))

    def _prolong(self, connection: Connection, *, again: bool) -> tuple[float | None, bool]:
        """Prolong and count on the lease. Returns the time by the database's clock, None if this very commit took
        place before, and whether the job is to be cancelled."""
        held = self._bulk.prolong(connection, self.job_id, self.run_id, self._commits, LEASE_S)
        if held is not None:
            return held
        mine = (Lease.job_id == self.job_id) & (Lease.run_id == self.run_id)
        state = sa.select(Lease.commits, Job.cancel_requested).join(Job, Job.id == Lease.job_id).where(mine)
        row = connection.execute(state.with_for_update(of=Lease)).first()
        if row is not None and again and row.commits == self._commits + 1:
            return None, bool(row.cancel_requested)
        raise LeaseLostError(
            f"Job {self.job_id} is driven by another run now; this one stops. Nothing is lost: "
            f"see `archfront status {self.job_id}`."
        )

    def _write_predictors(self, connection: Connection, made: Sequence[PredictorRecord], moment: float) -> None:
        if made:
            self._bulk.insert(
                connection,
                "predictors",
                ("job_id", "pairs", "version", "evaluator", "state", "made_at"),
                [(self.job_id, p.pairs, p.version, p.evaluator, json.dumps(p.state), moment) for p in made],
            )

    def _write_asks(self, connection: Connection, asks: Sequence[AskRecord], moment: float) -> None:
        if not asks:
            return
        self._bulk.insert(
            connection,
            "asks",
            ("job_id", "number", "told", "first", "count", "source", "memory", "predictor", "asked_at"),
            [
                (self.job_id, a.number, a.told, a.first, a.count, a.source, json.dumps(a.memory), a.predictor, moment)
                for a in asks
            ],
        )
        proposed = [pair for ask in asks for pair in zip(ask.keys, ask.genotypes, strict=True)]
        ids = self._bulk.candidates(connection, self._space_digest, proposed)
        self._bulk.insert(
            connection,
            "evaluations",
            ("job_id", "number", "ask", "candidate_id", "fidelity", "repeat", "state", "attempts"),
            [
                (self.job_id, ask.first + i, ask.number, ids[key], ask.fidelities[i], ask.repeats[i], "running", 0)
                for ask in asks
                for i, key in enumerate(ask.keys)
            ],
        )

    def _write_attempts(self, connection: Connection, attempts: Sequence[AttemptRecord], moment: float) -> None:
        self._bulk.insert(
            connection,
            "attempts",
            ("job_id", "number", "attempt", "kind", "message", "traceback", "worker", "failed_at"),
            [
                (
                    self.job_id, a.number, a.attempt, a.kind, _text(a.message), _text(a.traceback),
                    _text(a.worker, WORKER_LENGTH), moment,
                )
                for a in attempts
            ],
        )  # fmt: skip
        if not attempts:
            return
        latest = {a.number: a.attempt for a in attempts}
        rows = [(attempt, self.job_id, number) for number, attempt in latest.items()]
        self._bulk.update(connection, "evaluations", ("attempts",), _KEY, rows, "state = 'running'")

    def _write_finished(
        self, connection: Connection, seqs: Sequence[int], finished: Sequence[FinishedRecord], moment: float
    ) -> None:
        updated = self._bulk.update(
            connection,
            "evaluations",
            (
                "state", "seq", "attempts", "violation", "worker", "started_at",
                "finished_at", "duration_s", "error", "checkpoint",
            ),
            _KEY,
            [
                (
                    f.state, seq, f.attempts, f.violation, _text(f.worker, WORKER_LENGTH), f.started_at,
                    moment, f.duration_s, _text(f.error), _text(f.checkpoint), self.job_id, f.number,
                )
                for seq, f in zip(seqs, finished, strict=True)
            ],
            "state = 'running'",
        )  # fmt: skip
        if updated != len(finished):
            raise LedgerError(f"Job {self.job_id}: an evaluation would be finished twice; nothing was written.")
        self._bulk.insert(
            connection,
            "metrics",
            ("job_id", "number", "name", "value", "std", "provenance", "predictor", "device"),
            [
                (self.job_id, f.number, name, m.value if m.value == m.value else None, *m[1:])
                for f in finished
                for name, m in f.metrics.items()
            ],
        )
        self._bulk.insert(
            connection,
            "reuses",
            ("job_id", "number", "origin_job_id", "origin_number"),
            [(self.job_id, f.number, *f.origin) for f in finished if f.origin is not None],
        )
        for seq, f in zip(seqs, finished, strict=True):
            row = {name: m.value for name, m in f.metrics.items()}
            violation = np.nan if f.violation is None else f.violation
            fixed = (seq, f.number, f.fidelity, f.state == "done", violation, moment)
            self._tail.append(row | dict(zip(FIXED, fixed, strict=True)))

    def _write_front(
        self,
        connection: Connection,
        changes: Sequence[tuple[int, FrontChange]],
        finished: Sequence[FinishedRecord],
    ) -> None:
        # Within one commit a member may enter and leave: it is inserted with both ends.
        left = {(fidelity, c.number): c.seq for fidelity, c in changes if not c.entered}
        texts = self._shown(connection, {c.number for _, c in changes if c.entered}, finished)
        entered = [
            (self.job_id, fidelity, c.number, c.seq, left.pop((fidelity, c.number), None), texts[c.number])
            for fidelity, c in changes
            if c.entered
        ]
        columns = ("job_id", "fidelity", "number", "entered_seq", "left_seq", "shown")
        self._bulk.insert(connection, "front_members", columns, entered)
        self._bulk.update(
            connection,
            "front_members",
            ("left_seq",),
            ("job_id", "fidelity", "number"),
            [(seq, self.job_id, fidelity, number) for (fidelity, number), seq in left.items()],
            "left_seq IS NULL",
        )

    def _shown(self, connection: Connection, numbers: set[int], finished: Sequence[FinishedRecord]) -> dict[int, str]:
        """By number, what ``queries.shown_rows`` reads."""
        found = {}
        for record in finished:
            if record.number in numbers and record.number in self._ahead:
                key, genotype = self._ahead[record.number]
                metrics = {name: m.value if m.value == m.value else None for name, m in record.metrics.items()}
                found[record.number] = shown(record.number, key, genotype, record.fidelity, metrics)
        # What was under way when an earlier run ended.
        return found | shown_rows(connection, self.job_id, sorted(numbers - set(found)))

    def _pack_tail(self, connection: Connection) -> None:
        for start in range(0, len(self._tail) - CHUNK_ROWS + 1, CHUNK_ROWS):
            rows = self._tail[start : start + CHUNK_ROWS]
            metrics = sorted({name for row in rows for name in row} - set(FIXED))
            names = [*FIXED, *metrics]
            data, digest = pack(names, to_matrix(rows, names))
            first, last = int(rows[0]["seq"]), int(rows[-1]["seq"])
            connection.execute(
                sa.insert(ColumnChunk).values(
                    job_id=self.job_id, first_seq=first, last_seq=last, names=names, data=data, digest=digest
                )
            )


def _text(words: str | None, length: int | None = None) -> str | None:
    """Text that every database takes: PostgreSQL stores no NUL, and nothing longer than its column."""
    if words is None:
        return None
    if "\0" in words or not words.isascii():
        words = words.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return words[:length]
