"""The job as it was: at a number of commits, and at a time."""

import sqlalchemy as sa
from ledger_rows import ask, done, failed

from archfront.db.ledger import Ledger
from archfront.db.queries import FrontQuery, front, seq_at, top_fidelity
from archfront.db.schema import Evaluation
from archfront.db.writer import JobWriter


def test_the_top_fidelity_that_was(ledger: Ledger, job: int, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 6, fidelity=[1, 1, 9, 3, 9, 1])])
    with ledger.engine.connect() as connection:
        assert top_fidelity(connection, job) is None
        assert top_fidelity(connection, job, 5) is None
    writer.commit([], [failed(0, fidelity=1)])
    writer.commit([], [done(1, {"gain": 1.0, "cost": 1.0}, fidelity=1), failed(2, fidelity=9)])
    writer.commit([], [done(3, {"gain": 1.0, "cost": 1.0}, fidelity=3)])
    writer.commit([], [done(4, {"gain": 1.0, "cost": 1.0}, fidelity=9)])
    writer.commit([], [done(5, {"gain": 1.0, "cost": 1.0}, fidelity=1)])
    with ledger.engine.connect() as connection:
        # Failed ones reach nothing; and what was reached stays so.
        assert [top_fidelity(connection, job, seq) for seq in range(8)] == [None, None, 1, 1, 3, 9, 9, 9]
        assert top_fidelity(connection, job) == 9
        assert [len(front(connection, job, FrontQuery(seq=seq))) for seq in range(7)] == [0, 0, 1, 1, 1, 1, 1]


def test_how_much_was_committed_at_a_time(ledger: Ledger, job: int, writer: JobWriter) -> None:
    with ledger.engine.connect() as connection:
        assert seq_at(connection, job, 1e12) == 0
    writer.commit([ask(0, 0, 40)])
    for n in range(40):
        writer.commit([], [done(n, {"gain": float(n), "cost": 1.0})])
    with ledger.engine.begin() as connection:
        # Two commits of each moment: all of it belongs to the past then.
        doubled = 100.0 + (Evaluation.seq + 1) // 2
        connection.execute(sa.update(Evaluation).values(finished_at=doubled))
    with ledger.engine.connect() as connection:
        times = {seq: at for seq, at in connection.execute(sa.select(Evaluation.seq, Evaluation.finished_at))}  # noqa: C416
        for moment in [0.0, 99.9, 99.5, 100.0, 107.25, 119.0, 1e12, *times.values()]:
            assert seq_at(connection, job, moment) == max((s for s, t in times.items() if t <= moment), default=0)
