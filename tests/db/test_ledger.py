"""The ledger's transactions: nothing lost, nothing twice, one driver."""

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from ledger_rows import SIGNS, SPEC, ask, done, failed

from archfront.db import columns
from archfront.db.connection import write
from archfront.db.lease import kept_lease
from archfront.db.ledger import Ledger
from archfront.db.queries import FrontQuery, counts, front
from archfront.db.records import AttemptRecord
from archfront.db.schema import Base, ColumnChunk, Evaluation, MetricRow
from archfront.db.writer import JobWriter
from archfront.errors import InputError, JobBusyError, LeaseLostError, LedgerError


def test_migrations_make_the_tables_of_the_models(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_history_gives_back_what_was_committed(ledger: Ledger, job: int, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 2), ask(1, 2, 1)])
    writer.commit([ask(2, 3, 1, told=2)], [done(1, {"gain": 3.0, "cost": 1.0}), failed(0)])
    history = ledger.history(job, SIGNS)
    assert [(a.number, a.told, a.first, a.genotypes) for a in history.asks] == [
        (0, 0, 0, [[0], [1]]),
        (1, 0, 2, [[2]]),
        (2, 2, 3, [[3]]),
    ]
    assert history.finished == [1, 0]
    np.testing.assert_array_equal(history.objectives, [[-3.0, 1.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(history.violations, [0.0, np.inf])
    assert [(e.number, e.seq, e.state) for e in history.evaluations] == [
        (0, 2, "failed"),
        (1, 1, "done"),
        (2, None, "running"),
        (3, None, "running"),
    ]


def test_nothing_is_finished_twice(ledger: Ledger, job: int, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 2)], [done(0, {"gain": 1.0, "cost": 1.0})])
    with pytest.raises(LedgerError, match="twice"):
        writer.commit([], [done(1, {"gain": 1.0, "cost": 2.0}), done(0, {"gain": 9.0, "cost": 9.0})])
    with ledger.engine.connect() as connection:
        assert counts(connection, job) == {"running": 1, "done": 1, "failed": 0, "cancelled": 0}
        assert [r["evaluation"] for r in front(connection, job, FrontQuery())] == [0]


def test_a_candidate_is_evaluated_once_at_a_fidelity(ledger: Ledger, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 1)])
    again = ask(1, 1, 1)
    again.keys = ask(0, 0, 1).keys
    with pytest.raises(sa.exc.IntegrityError):
        writer.commit([again])


def test_failed_attempts_are_kept_with_their_tracebacks(ledger: Ledger, job: int, writer: JobWriter) -> None:
    attempt = AttemptRecord(number=0, attempt=1, kind="error", message="boom", traceback="line 1")
    writer.commit([ask(0, 0, 1)], [], [attempt])
    assert ledger.history(job, SIGNS).evaluations[0].attempts == 1


def test_one_driver_at_a_time(ledger: Ledger, job: int) -> None:
    ledger.begin_run(job, {})
    with pytest.raises(JobBusyError, match=f"process {os.getpid()}"):
        ledger.begin_run(job, {})


def test_a_driver_that_lost_its_lease_writes_nothing(ledger: Ledger, job: int, writer: JobWriter) -> None:
    with write(ledger.engine) as connection:
        connection.exec_driver_sql("UPDATE leases SET expires_at = 0")
    other = ledger.writer(job, ledger.begin_run(job, {}), SIGNS)
    with pytest.raises(LeaseLostError):
        writer.commit([ask(0, 0, 1)])
    other.commit([ask(0, 0, 1)])
    assert len(ledger.history(job, SIGNS).asks) == 1


def test_a_dead_drivers_job_is_free_at_once(ledger: Ledger, job: int, url: str) -> None:
    code = f"from archfront.db.ledger import Ledger; Ledger.open({url!r}).begin_run({job}, {{}})"
    subprocess.run([sys.executable, "-c", code], check=True)
    ledger.begin_run(job, {})


def test_chunks_equal_rows_and_damage_is_noticed(
    ledger: Ledger, job: int, writer: JobWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archfront.db.writer.CHUNK_ROWS", 16)
    rng = np.random.default_rng(0)
    for start in range(0, 60, 6):
        metrics = [dict(zip(("gain", "cost"), rng.random(2).tolist(), strict=True)) for _ in range(6)]
        if start > 30:
            metrics = [m | {"late": 1.0} for m in metrics]
        finished = [done(start + i, m) if i else failed(start + i) for i, m in enumerate(metrics)]
        writer.commit([ask(start // 6, start, 6)], finished)
    with ledger.engine.connect() as connection:
        assert len(connection.execute(sa.select(ColumnChunk)).all()) == 3
        loaded = columns.load_columns(connection, job)
        names, matrix = columns.read_rows(connection, job, 1)
        assert set(loaded.names) == set(names)
        for i, name in enumerate(names):
            np.testing.assert_array_equal(loaded[name], matrix[:, i])
        assert columns.check_chunks(connection, job) == []
    # A writer that starts anew goes on with the same tail.
    fresh = ledger.writer(job, writer.run_id, SIGNS)
    fresh.commit([ask(10, 60, 6)], [done(60 + i, {"gain": 0.0, "cost": 1.0}) for i in range(6)])
    with write(ledger.engine) as connection:
        assert columns.check_chunks(connection, job) == []
        assert len(connection.execute(sa.select(ColumnChunk)).all()) == 4
        connection.execute(sa.update(ColumnChunk).where(ColumnChunk.first_seq == 1).values(data=bytes(16 * 8 * 8)))
        assert len(columns.check_chunks(connection, job)) == 1
        np.testing.assert_array_equal(columns.load_columns(connection, job)["seq"], np.arange(1, 67))


def test_any_front_from_columns_equals_the_stored_one(ledger: Ledger, job: int, writer: JobWriter) -> None:
    rng = np.random.default_rng(1)
    rows = [done(i, {"gain": float(g), "cost": float(c)}) for i, (g, c) in enumerate(rng.integers(0, 9, (80, 2)))]
    writer.commit([ask(0, 0, 80)], rows)
    with ledger.engine.connect() as connection:
        stored = [r["evaluation"] for r in front(connection, job, FrontQuery())]
        computed = [r["evaluation"] for r in front(connection, job, FrontQuery(where="cost >= 0"))]
        cheap = front(connection, job, FrontQuery(where="cost <= 3 and not gain > 7"))
        single = front(connection, job, FrontQuery(objectives=[("cost", "min")]))
    assert stored == computed
    assert cheap
    assert all(r["metrics"]["cost"] <= 3 and r["metrics"]["gain"] <= 7 for r in cheap)
    assert all(r["metrics"]["cost"] == 0 for r in single)


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("cost <", "cannot be parsed"),
        ("__import__('os')", "cannot be parsed"),
        ("cost.real > 1", "cannot be parsed"),
        ("csot < 1", "Did you mean 'cost'"),
    ],
)
def test_conditions_are_never_code(ledger: Ledger, job: int, writer: JobWriter, where: str, problem: str) -> None:
    writer.commit([ask(0, 0, 1)], [done(0, {"gain": 1.0, "cost": 1.0})])
    with ledger.engine.connect() as connection, pytest.raises(InputError, match=problem):
        front(connection, job, FrontQuery(where=where))


def test_a_metric_that_is_no_number_is_stored_as_null(ledger: Ledger, job: int, writer: JobWriter) -> None:
    record = done(0, {"gain": 1.0, "cost": 1.0})
    record.metrics = {**record.metrics, "odd": record.metrics["gain"]._replace(value=float("nan"))}
    writer.commit([ask(0, 0, 1)], [record])
    with ledger.engine.connect() as connection:
        assert connection.execute(sa.select(MetricRow.value).where(MetricRow.name == "odd")).scalar_one() is None
        assert columns.check_chunks(connection, job) == []


def test_cancelling_a_job_that_nobody_drives(ledger: Ledger, job: int) -> None:
    assert ledger.request_cancel(job) is False
    assert ledger.job(job)["state"] == "cancelled"


def test_a_corrupt_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.db"
    path.write_bytes(b"this is no database, but it is long enough to look like one" * 50)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(str(path))


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    Ledger.open(str(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9_9_9'")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="newer archfront"):
        Ledger.open(str(path))
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(LedgerError, match="no archfront ledger"):
        Ledger.open(str(path))


def test_durable_settings(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            for name in ("fsync", "synchronous_commit", "full_page_writes"):
                assert connection.exec_driver_sql(f"SHOW {name}").scalar_one() == "on"
            return
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


def test_a_row_cannot_be_running_and_finished(ledger: Ledger, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 1)])
    with pytest.raises(sa.exc.IntegrityError), write(ledger.engine) as connection:
        connection.execute(sa.update(Evaluation).values(seq=1))


def test_jobs_are_found_by_id_name_and_last(ledger: Ledger) -> None:
    first = ledger.create_job("one", SPEC, "s" * 32)
    second = ledger.create_job("one", SPEC, "s" * 32)
    assert [ledger.find_job(r) for r in (str(first), "one", "last")] == [first, second, second]
    with pytest.raises(InputError, match="archfront jobs"):
        ledger.find_job("none")


def test_a_busy_driver_keeps_its_lease(ledger: Ledger, job: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archfront.db.lease._BEAT_S", 0.02)
    run_id = ledger.begin_run(job, {})
    with write(ledger.engine) as connection:
        connection.exec_driver_sql("UPDATE leases SET expires_at = 1")
    assert ledger.holder(job) is None
    with kept_lease(ledger.engine, job, run_id):
        deadline = time.monotonic() + 10
        while ledger.holder(job) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ledger.holder(job) is not None
        # Another run that took over is left alone.
        other = None
        while other is None:
            with write(ledger.engine) as connection:
                connection.exec_driver_sql("UPDATE leases SET expires_at = 1")
            # The thread may have prolonged it again in between.
            with suppress(JobBusyError):
                other = ledger.begin_run(job, {})
        time.sleep(0.1)
        assert ledger.holder(job)["id"] == other  # type: ignore[index]


def test_time_between_a_kill_and_the_resume_does_not_count(ledger: Ledger, job: int, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 2)], [done(0, {"gain": 1.0, "cost": 1.0}), done(1, {"gain": 1.0, "cost": 1.0})])
    with write(ledger.engine) as connection:
        # The first run was killed 5 s after it began; the second began at 100 and lasted 10 s.
        connection.exec_driver_sql("UPDATE runs SET started_at = 0")
        connection.exec_driver_sql("UPDATE evaluations SET finished_at = 5 WHERE number = 0")
        connection.exec_driver_sql("UPDATE evaluations SET finished_at = 108 WHERE number = 1")
        connection.exec_driver_sql("UPDATE leases SET expires_at = 0")
    second = ledger.begin_run(job, {})
    with write(ledger.engine) as connection:
        connection.exec_driver_sql(f"UPDATE runs SET started_at = 100, ended_at = 110 WHERE id = {second}")
    assert ledger.history(job, SIGNS).elapsed_s == 15.0


def test_a_stale_driver_keeps_no_finalist(ledger: Ledger, job: int, writer: JobWriter) -> None:
    writer.commit([ask(0, 0, 1)], [done(0, {"gain": 1.0, "cost": 1.0})])
    with write(ledger.engine) as connection:
        connection.exec_driver_sql("UPDATE leases SET expires_at = 0")
    other = ledger.begin_run(job, {})
    with pytest.raises(LeaseLostError):
        ledger.store_benchmark(job, writer.run_id, 0, "training", {}, {}, None)
    ledger.store_benchmark(job, other, 0, "training", {}, {}, None)
    assert len(ledger.benchmarks(job)) == 1
