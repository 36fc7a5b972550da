"""The one way in which a running job's rows are written: everything of a step in one fenced transaction."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from archfront.db.columns import CHUNK_ROWS, FIXED, load_columns, pack, read_rows, to_matrix
from archfront.db.connection import ledger_errors, now, write
from archfront.db.front import FrontChange, IncrementalFront
from archfront.db.lease import LEASE_S
from archfront.db.records import AskRecord, AttemptRecord, FinishedRecord
from archfront.db.schema import ColumnChunk, FrontMember, Job
from archfront.errors import LeaseLostError, LedgerError

_RETRY_S = (0.1, 0.5, 2.0, 5.0)


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
        self._mark = "?" if engine.dialect.name == "sqlite" else "%s"
        with engine.connect() as connection:
            self._restore(connection)

    def commit(
        self,
        asks: Sequence[AskRecord] = (),
        finished: Sequence[FinishedRecord] = (),
        attempts: Sequence[AttemptRecord] = (),
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
        tail_start = len(self._tail)

        def step(connection: Connection) -> bool:
            moment = now(connection)
            self._prolong(connection, moment)
            self._write_asks(connection, asks, moment)
            self._write_attempts(connection, attempts, moment)
            del self._tail[tail_start:]
            self._write_finished(connection, seqs, finished, moment)
            self._write_front(connection, changes)
            self._pack_tail(connection)
            return bool(connection.execute(sa.select(Job.cancel_requested).where(Job.id == self.job_id)).scalar_one())

        cancel = self._transact(step)
        self.next_seq += len(finished)
        while len(self._tail) >= CHUNK_ROWS:
            del self._tail[:CHUNK_ROWS]
        return cancel

    def front_points(self, fidelity: int) -> Any:
        """Oriented objectives ``(members, m)`` of the front of a fidelity."""
        return self._fronts[fidelity].points if fidelity in self._fronts else np.empty((0, len(self._objectives)))

    def _restore(self, connection: Connection) -> None:
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
        where = {int(n): i for i, n in enumerate(columns["number"])}
        for fidelity, numbers in members.items():
            rows = [where[n] for n in numbers]
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

    def _transact(self, step: Callable[[Connection], bool]) -> bool:
        """Run a step in a write transaction, again after a passing fault of the database."""
        for wait in (*_RETRY_S, None):
            try:
                with write(self._engine) as connection:
                    return step(connection)
            except OperationalError as error:
                passing = "locked" in str(error) or "busy" in str(error)
                if wait is None or not passing:
                    with ledger_errors(str(self._engine.url)):
                        raise
                time.sleep(wait)
        raise AssertionError("the loop returns or raises")

    def _prolong(self, connection: Connection, moment: float) -> None:
        updated = self._execute(
            connection,
            "UPDATE leases SET expires_at = ? WHERE job_id = ? AND run_id = ?",
            [(moment + LEASE_S, self.job_id, self.run_id)],
        )
        if updated != 1:
            raise LeaseLostError(
                f"Job {self.job_id} is driven by another run now; this one stops. Nothing is lost: "
                f"see `archfront status {self.job_id}`."
            )

    def _write_asks(self, connection: Connection, asks: Sequence[AskRecord], moment: float) -> None:
        self._execute(
            connection,
            "INSERT INTO asks (job_id, number, told, first, count, source, memory, predictor, asked_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (self.job_id, a.number, a.told, a.first, a.count, a.source, json.dumps(a.memory), a.predictor, moment)
                for a in asks
            ],
        )
        self._execute(
            connection,
            "INSERT INTO candidates (space_digest, key, genotype) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (self._space_digest, key, json.dumps(genotype))
                for ask in asks
                for key, genotype in zip(ask.keys, ask.genotypes, strict=True)
            ],
        )
        self._execute(
            connection,
            "INSERT INTO evaluations (job_id, number, ask, candidate_id, fidelity, repeat, state, attempts) "
            "VALUES (?, ?, ?, (SELECT id FROM candidates WHERE space_digest = ? AND key = ?), ?, ?, 'running', 0)",
            [
                (self.job_id, ask.first + i, ask.number, self._space_digest, key, ask.fidelities[i], ask.repeats[i])
                for ask in asks
                for i, key in enumerate(ask.keys)
            ],
        )

    def _write_attempts(self, connection: Connection, attempts: Sequence[AttemptRecord], moment: float) -> None:
        self._execute(
            connection,
            "INSERT INTO attempts (job_id, number, attempt, kind, message, traceback, worker, failed_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(self.job_id, a.number, a.attempt, a.kind, a.message, a.traceback, a.worker, moment) for a in attempts],
        )
        self._execute(
            connection,
            "UPDATE evaluations SET attempts = ? WHERE job_id = ? AND number = ?",
            [(a.attempt, self.job_id, a.number) for a in attempts],
        )

    def _write_finished(
        self, connection: Connection, seqs: Sequence[int], finished: Sequence[FinishedRecord], moment: float
    ) -> None:
        updated = self._execute(
            connection,
            "UPDATE evaluations SET state = ?, seq = ?, attempts = ?, violation = ?, worker = ?, started_at = ?, "
            "finished_at = ?, duration_s = ?, error = ?, checkpoint = ? "
            "WHERE job_id = ? AND number = ? AND state = 'running'",
            [
                (
                    f.state, seq, f.attempts, f.violation, f.worker, f.started_at,
                    moment, f.duration_s, f.error, f.checkpoint, self.job_id, f.number,
                )
                for seq, f in zip(seqs, finished, strict=True)
            ],
        )  # fmt: skip
        if updated != len(finished):
            raise LedgerError(f"Job {self.job_id}: an evaluation would be finished twice; nothing was written.")
        self._execute(
            connection,
            "INSERT INTO metrics (job_id, number, name, value, std, provenance, predictor, device) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (self.job_id, f.number, name, m.value if m.value == m.value else None, *m[1:])
                for f in finished
                for name, m in f.metrics.items()
            ],
        )
        for seq, f in zip(seqs, finished, strict=True):
            row = {name: m.value for name, m in f.metrics.items()}
            violation = np.nan if f.violation is None else f.violation
            fixed = (seq, f.number, f.fidelity, f.state == "done", violation, moment)
            self._tail.append(row | dict(zip(FIXED, fixed, strict=True)))

    def _write_front(self, connection: Connection, changes: Sequence[tuple[int, FrontChange]]) -> None:
        self._execute(
            connection,
            "INSERT INTO front_members (job_id, fidelity, number, entered_seq) VALUES (?, ?, ?, ?)",
            [(self.job_id, fidelity, c.number, c.seq) for fidelity, c in changes if c.entered],
        )
        self._execute(
            connection,
            "UPDATE front_members SET left_seq = ? "
            "WHERE job_id = ? AND fidelity = ? AND number = ? AND left_seq IS NULL",
            [(c.seq, self.job_id, fidelity, c.number) for fidelity, c in changes if not c.entered],
        )

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

    def _execute(self, connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Run a statement for each row through the driver itself: the ORM costs several times more a row."""
        if not rows:
            return 0
        return connection.exec_driver_sql(statement.replace("?", self._mark), list(rows)).rowcount
