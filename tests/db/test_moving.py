"""A whole ledger moved between databases: every row of every table, refusals, and a job that goes on after it."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import synthetic_job
from ledger_dump import differences, dump
from ledger_rows import SIGNS, SPEC, ask, done, failed
from postgres import Postgres
from typer.testing import CliRunner

import archfront
from archfront.cli.main import app
from archfront.db import columns, moving
from archfront.db.connection import open_engine, parse_url, write
from archfront.db.ledger import Ledger
from archfront.db.moving import move
from archfront.db.records import AskRecord, AttemptRecord, FinishedRecord, PredictorRecord
from archfront.db.schema import AskRow, Controller, Evaluation
from archfront.errors import ArchfrontError
from archfront.plugins import read_plugins
from archfront.search.driver import submit
from archfront.search.job import parse_spec


def fill(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger with rows in every table, and the values that are easily lost."""
    monkeypatch.setattr("archfront.db.writer.CHUNK_ROWS", 4)
    ledger = Ledger.open(url)
    device = {"digest": "d" * 16, "name": "böse 'quotes'\t\\N \\. \n"}
    for name in ("first", "second"):
        job = ledger.create_job(name, SPEC, "s" * 32, work_digest="w", files=None)
        run = ledger.begin_run(job, {"code": name})
        writer = ledger.writer(job, run, SIGNS)
        learned = PredictorRecord(
            pairs=8, version="8-ab", evaluator="latency", state={"widths": [[0.9, None]], "a": 0.1}
        )
        writer.commit([ask(0, 0, 6), odd_ask(6)], predictors=[learned])
        values = [done(n, {"gain": 0.1 * n, "cost": 1 / 3, "late": float("nan")}) for n in range(5)]
        wrong = AttemptRecord(
            number=5, attempt=1, kind="error", message="tab\there", traceback="line\nline\\", worker="w"
        )
        writer.commit([], [*values, failed(5)], [wrong])
        ledger.store_artifact("table", name, {"rows": [1, 2.5, None]}, device)
        ledger.store_benchmark(job, run, 1, "latency", {"batch": 1}, {"raw": [1e-300, 0.1 + 0.2]}, device)
        if name == "second":
            end = FinishedRecord(number=6, fidelity=0, state="failed", attempts=1, error="x", origin=(1, 1))
            writer.commit([], [end])
        ledger.end_run(job, run, "stopped", None, "running")
    ledger.change_job(1, files="s3://bucket/ä")
    with write(ledger.engine) as connection:
        connection.execute(sa.update(AskRow).where(AskRow.job_id == 1, AskRow.number == 0).values(memory=sa.null()))
        connection.execute(sa.insert(Controller).values(host="h", pid=1, state="idle", started_at=0.0, seen_at=0.0))
    ledger.close()


def odd_ask(first: int) -> AskRecord:
    """Genotypes that are a JSON null, numbers, texts and nested, and a memory that is a number."""
    record = ask(1, first, 5)
    record.genotypes = [None, 7, 0.1, "7", {"b": [1.0, 1e-9], "a": None}]
    record.memory = 3
    return record


def content(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every copied table, JSON parsed, in the order of the keys."""
    engine = open_engine(url, create=False)
    with engine.connect() as connection:
        found = {}
        for table in moving.tables():
            nulls = [sa.cast(c, sa.Text).is_(None) for c in table.columns if isinstance(c.type, sa.JSON)]
            query = sa.select(*table.columns, *nulls).order_by(*table.primary_key.columns)
            found[table.name] = [tuple(row) for row in connection.execute(query)]
    engine.dispose()
    return found


def test_there_and_back_every_row_is_equal(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_CHUNK", 3)
    monkeypatch.setattr(moving, "_CHUNK_OF_BYTES", 1)
    first, server, back = f"sqlite:///{tmp_path}/a.db", postgres.empty(), str(tmp_path / "b.db")
    fill(first, monkeypatch)
    before = content(first)
    assert min(len(rows) for rows in before.values()) >= 1
    told: list[tuple[str, int, int]] = []
    counted = move(first, server, lambda *step: told.append(step))
    assert counted == {name: len(rows) for name, rows in before.items()}
    assert ("candidates", 3, len(before["candidates"])) in told
    assert told[-1][1] == told[-1][2]
    assert content(server) == before
    move(server, back)
    assert content(back) == before == content(first)
    for url in (server, back):
        ledger = Ledger.open(url)
        with ledger.engine.connect() as connection:
            for table in ("leases", "controllers"):
                assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0
            for job_id in (1, 2):
                assert columns.check_chunks(connection, job_id) == []
            # A null of JSON is a genotype, a null of SQL is an absent memory.
            null = sa.select(sa.func.count()).select_from(AskRow).where(sa.cast(AskRow.memory, sa.Text).is_(None))
            assert connection.execute(null).scalar() == 1
        assert ledger.create_job("third", SPEC, "s") == 3, "the next identity follows the highest"
        assert ledger.begin_run(3, {}) == 3
        ledger.close()


def stopped_after(steps: int) -> Callable[[], bool]:
    calls = itertools.count()
    return lambda: next(calls) >= steps


def test_a_moved_job_goes_on_as_if_it_had_not_been_moved(tmp_path: Path, postgres: Postgres, plugin: Path) -> None:
    spec = synthetic_job(60, evaluator={"fidelities": [1, 3]})
    whole = archfront.run(spec, db=tmp_path / "whole.db", plugins=[plugin])

    first, server, back = str(tmp_path / "a.db"), postgres.empty(), str(tmp_path / "b.db")
    begun = Ledger.open(first)
    job_id = submit(begun, parse_spec(spec), read_plugins([plugin]))
    states = []
    for url in (first, server):
        job = archfront.Job(url, job_id, plugins=[plugin])
        assert job.resume(stop=stopped_after(12)) == "stopped"
        states.append(job.status()["evaluations"])
        move(url, back if url == server else server)
    assert 0 < states[0]["done"] < states[1]["done"] < 60
    last = archfront.Job(back, job_id, plugins=[plugin])
    assert last.resume() == "budget"
    assert differences(dump(whole.ledger, whole.id), dump(last.ledger, job_id)) == []
    assert list(last.front()) == list(whole.front())


def refused(source: object, target: object) -> str:
    with pytest.raises(ArchfrontError) as error:
        move(str(source), str(target))
    return str(error.value)


def test_refusals_change_nothing(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.db", tmp_path / "new.db"
    assert re.match("FROM: .*does not exist", refused(source, target))
    fill(str(source), monkeypatch)
    assert "TO: " in refused(source, f"sqlite:///{tmp_path}/../{tmp_path.name}/a.db")
    assert re.match("FROM: .* is of an unknown kind", refused("mysql://x/y", target))
    assert re.match("TO: .* is of an unknown kind", refused(source, "mysql://x/y"))
    assert re.match("TO: the folder .* does not exist", refused(source, tmp_path / "none" / "x.db"))
    server = postgres.empty()
    assert re.match("FROM: .* is empty", refused(server, target))
    assert not sa.inspect(sa.create_engine(server.replace("postgresql:", "postgresql+psycopg:"))).get_table_names()
    for full in (str(tmp_path / "full.db"), postgres.ledger()):
        ledger = Ledger.open(full)
        ledger.create_job("mine", SPEC, "s")
        assert re.match("TO: .* is not empty: it holds rows of jobs", refused(source, full))
        assert len(content(full)["jobs"]) == 1
        ledger.close()
    for text in ("not a database " * 100, ""):
        (tmp_path / "odd.db").write_text(text)
        assert re.match("FROM: ", refused(tmp_path / "odd.db", target))
    assert not target.exists()


@pytest.mark.parametrize(("version", "words"), [("v9.9", "newer archfront"), ("v0.1.0", "older schema")])
def test_a_source_of_another_schema_is_refused(tmp_path: Path, version: str, words: str) -> None:
    ledger = Ledger.open(str(tmp_path / "a.db"))
    with write(ledger.engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :v"), {"v": _revision(version)})
    ledger.close()
    message = refused(tmp_path / "a.db", tmp_path / "new.db")
    assert message.startswith("FROM: ")
    assert words in message
    assert not (tmp_path / "new.db").exists()


def _revision(version: str) -> str:
    from alembic.script import ScriptDirectory

    from archfront.db.connection import alembic_config

    base = ScriptDirectory.from_config(alembic_config()).get_base()
    return str(base) if version == "v0.1.0" else version


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_job_that_is_being_driven_is_refused(kind: str, tmp_path: Path, postgres: Postgres) -> None:
    source = str(tmp_path / "a.db") if kind == "sqlite" else postgres.ledger()
    ledger = Ledger.open(source)
    job = ledger.create_job("busy", SPEC, "s" * 32)
    run = ledger.begin_run(job, {})
    message = refused(source, tmp_path / "new.db")
    assert re.match(f"FROM: .* job {job} is being driven by process", message)
    assert not (tmp_path / "new.db").exists()
    ledger.end_run(job, run, "stopped", None, "running")
    assert move(source, str(tmp_path / "new.db"))["jobs"] == 1
    ledger.close()


def _overlong(ledger: Ledger) -> None:
    with write(ledger.engine) as connection:
        connection.execute(sa.update(Evaluation).where(Evaluation.number == 5).values(worker="w" * 300))


def _with_nul(ledger: Ledger) -> None:
    with write(ledger.engine) as connection:
        connection.execute(sa.update(Evaluation).where(Evaluation.number == 5).values(error="a\0b"))


@pytest.mark.parametrize("spoil", [_overlong, _with_nul])
def test_a_row_that_the_target_cannot_take_leaves_it_empty(
    spoil: Callable[[Ledger], None], tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = str(tmp_path / "a.db"), postgres.empty()
    fill(source, monkeypatch)
    ledger = Ledger.open(source)
    spoil(ledger)
    ledger.close()
    message = refused(source, target)
    assert re.match("TO: .* cannot take a row of evaluations: .*Nothing was copied", message, re.DOTALL)
    assert not any(content(target).values())


def test_nobody_writes_to_the_source_meanwhile(tmp_path: Path, postgres: Postgres) -> None:
    source = postgres.ledger()
    Ledger.open(source).create_job("one", SPEC, "s")
    impatient = sa.create_engine(
        source.replace("postgresql:", "postgresql+psycopg:"), connect_args={"options": "-c lock_timeout=100"}
    )
    blocked = []

    def interfere(table: str, rows: int, total: int) -> None:
        if table == "jobs" and not rows:
            try:
                with impatient.begin() as connection:
                    connection.exec_driver_sql("UPDATE jobs SET name = 'two'")
            except sa.exc.OperationalError:
                blocked.append(table)

    move(source, str(tmp_path / "b.db"), interfere)
    assert blocked == ["jobs"]
    impatient.dispose()


def test_no_password_is_printed(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path / "a.db"), monkeypatch)
    url = parse_url(postgres.empty())
    # The server asks for none, or takes the right one, which stands first.
    password = url.password or "se/cret"
    target = url.set(drivername="postgresql", password=password).render_as_string(hide_password=False)
    printed = CliRunner().invoke(app, ["db", "move", str(tmp_path / "a.db"), target], env={"COLUMNS": "400"})
    assert printed.exit_code == 0, printed.output
    messages = [
        printed.output,
        refused(tmp_path / "a.db", target),
        refused(target, target),
        refused(sa.make_url(target).set(database=parse_url(postgres.empty()).database).render_as_string(False), "x.db"),
    ]
    for message in messages:
        assert "***" in message
        assert password not in message
        assert password.replace("/", "%2F") not in message


def test_the_command_prints_the_rows_of_each_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path / "a.db"), monkeypatch)
    arguments = ["db", "move", str(tmp_path / "a.db"), str(tmp_path / "b.db")]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert printed.exit_code == 0, printed.output
    assert re.search(r"evaluations\s*│\s*22\b", printed.stdout)
    again = CliRunner().invoke(app, arguments)
    assert "is not empty" in str(again.exception)
