"""Copying a whole ledger into another database, SQLite or PostgreSQL on either side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError

from archfront.db.bulk import bulk_of
from archfront.db.connection import ledger_errors, open_engine, parse_url, without_password, write
from archfront.db.ledger import Ledger
from archfront.db.schema import Base, Controller, Lease
from archfront.errors import InputError, LedgerError

Progress = Callable[[str, int, int], None]
"""Told (table, rows copied so far, rows of the table)."""

_LEFT_BEHIND = {Lease.__tablename__, Controller.__tablename__}
"""Who is at work right now, on the source: that means nothing in the target."""

_CHUNK, _CHUNK_OF_BYTES = 1000, 16
"""Rows in memory at a time; fewer where each may hold hundreds of kilobytes."""


def move(source: str, target: str, progress: Progress = lambda *_: None) -> dict[str, int]:
    """Copy everything but leases and controllers. The source stays as it is; nobody can write to it meanwhile.

    All rows come in one transaction, so a target in which this failed or was killed holds none of them.

    Args:
        source: URL or path of a ledger of this version's schema that no driver is at work in.
        target: URL or path; empty, or a ledger without any row.

    Returns:
        rows by table, as counted in the target.

    Raises:
        InputError, LedgerError: it cannot be; the message names FROM or TO and says why. Nothing was copied.
    """
    if _same(source, target):
        raise InputError("TO", without_password(target), "is the same database as FROM", "Name another one.")
    shown = without_password(source), without_password(target)
    with ExitStack() as stack:
        stack.enter_context(_speaking_of("FROM"))
        _refuse_empty(source)
        origin = open_engine(source, create=False)
        stack.callback(origin.dispose)
        with ledger_errors(source), _frozen(origin) as reading:
            _refuse_driven(Ledger(origin, source), reading, shown[0])
            with _speaking_of("TO"):
                goal = open_engine(target, create=True)
                stack.callback(goal.dispose)
                with ledger_errors(target), write(goal) as writing:
                    _refuse_filled(writing, shown[1])
                    return _copy_all(reading, writing, shown, progress)
    raise AssertionError("unreachable")


def tables() -> list[sa.Table]:
    """What is copied, referenced tables before those that refer to them."""
    return [table for table in Base.metadata.sorted_tables if table.name not in _LEFT_BEHIND]


def _copy_all(reading: Connection, writing: Connection, names: tuple[str, str], progress: Progress) -> dict[str, int]:
    source, target = names
    counted: dict[str, int] = {}
    for table in tables():
        total = _count(reading, table)
        progress(table.name, 0, total)
        copied = 0
        try:
            for rows in _chunks(reading, source, table):
                _insert(writing, table, rows)
                copied += len(rows)
                progress(table.name, copied, total)
        except (DataError, IntegrityError) as error:
            raise LedgerError(
                f"TO: {target!r} cannot take a row of {table.name}: {str(error.orig).strip()}. Nothing was copied; "
                "mend that row in FROM."
            ) from error
        counted[table.name] = _count(writing, table)
        if counted[table.name] != total:
            raise LedgerError(
                f"TO: {target!r} holds {counted[table.name]} rows of {table.name} where FROM holds {total}. "
                "Nothing was copied; check both with `archfront db check`."
            )
    if writing.dialect.name == "postgresql":
        _set_sequences(writing)
    bulk_of(writing.dialect.name).refresh_plans(writing)
    return counted


def _chunks(reading: Connection, source: str, table: sa.Table) -> Iterator[list[tuple[Any, ...]]]:
    """All rows of a table as the target's driver takes them, some at a time."""
    holds_bytes = any(isinstance(column.type, sa.LargeBinary) for column in table.columns)
    query = sa.select(*[_raw(column, reading.dialect.name) for column in table.columns])
    query = query.execution_options(yield_per=_CHUNK_OF_BYTES if holds_bytes else _CHUNK)
    documents = [i for i, column in enumerate(table.columns) if isinstance(column.type, sa.JSON)]
    # Said here, because what surrounds it takes an error for one of the target's.
    with _speaking_of("FROM"), ledger_errors(source):
        for rows in reading.execute(query).partitions():
            yield [_with_texts(row, documents) for row in rows]


def _insert(writing: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
    quote = writing.dialect.identifier_preparer.quote
    columns = [quote(column.name) for column in table.columns]
    bulk_of(writing.dialect.name).insert(writing, quote(table.name), columns, rows)


def _raw(column: sa.Column[Any], dialect: str) -> sa.ColumnElement[Any]:
    """A column as the database has it: a JSON document as its text, so that no digit and no null of it changes."""
    if not isinstance(column.type, sa.JSON):
        return column
    return sa.type_coerce(column, sa.Text) if dialect == "sqlite" else sa.cast(column, sa.Text)


def _with_texts(row: Sequence[Any], documents: Sequence[int]) -> tuple[Any, ...]:
    """A row whose JSON columns are text or None: SQLite keeps a document that is one number as a number."""
    values = list(row)
    for i in documents:
        if values[i] is not None and not isinstance(values[i], str):
            values[i] = json.dumps(values[i])
    return tuple(values)


def _set_sequences(connection: Connection) -> None:
    """Let the next identity follow the highest that was copied."""
    for table in tables():
        column = table.autoincrement_column
        if column is not None:
            highest = connection.execute(sa.select(sa.func.max(column))).scalar()
            sequence = sa.func.pg_get_serial_sequence(table.name, column.name)
            if highest is not None:
                connection.execute(sa.select(sa.func.setval(sequence, highest)))


@contextmanager
def _frozen(engine: Engine) -> Iterator[Connection]:
    """A connection that reads one moment of a database which nobody can change until it ends."""
    if engine.dialect.name == "sqlite":
        with write(engine) as connection:
            yield connection
        return
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        # Before the first query: the transaction's moment is that of its first one.
        connection.exec_driver_sql(f"LOCK TABLE {_all_tables(connection)} IN SHARE MODE")
        yield connection


def _refuse_empty(source: str) -> None:
    """Before it is opened in earnest, which would give an empty database this version's tables."""
    engine = open_engine(source, create=False, check_schema=False)
    try:
        with ledger_errors(source), engine.connect() as connection:
            if not sa.inspect(connection).get_table_names():
                raise LedgerError(
                    f"FROM: {without_password(source)!r} is empty. Name the database that holds the ledger."
                )
    finally:
        engine.dispose()


def _refuse_driven(ledger: Ledger, reading: Connection, source: str) -> None:
    for job_id in reading.execute(sa.select(Lease.job_id).order_by(Lease.job_id)).scalars().all():
        holder = ledger.holder(job_id)
        if holder is not None:
            raise LedgerError(
                f"FROM: in {source!r} job {job_id} is being driven by process {holder['pid']} on {holder['host']}. "
                "Stop it first (Ctrl-C loses nothing); a dead driver's job is free half a minute later."
            )


def _refuse_filled(writing: Connection, target: str) -> None:
    if writing.dialect.name == "postgresql":
        writing.exec_driver_sql(f"LOCK TABLE {_all_tables(writing)} IN EXCLUSIVE MODE")
    for table in Base.metadata.sorted_tables:
        if writing.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            raise LedgerError(
                f"TO: {target!r} is not empty: it holds rows of {table.name}. A whole ledger can only be moved to an "
                "empty database: name another one."
            )


def _all_tables(connection: Connection) -> str:
    quote = connection.dialect.identifier_preparer.quote
    return ", ".join(quote(table.name) for table in Base.metadata.sorted_tables)


def _count(connection: Connection, table: sa.Table) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def _same(source: str, target: str) -> bool:
    """Whether two URLs name one database, as far as that can be told from them."""
    with _speaking_of("FROM"):
        first = parse_url(source)
    with _speaking_of("TO"):
        second = parse_url(target)
    if first.get_backend_name() != second.get_backend_name():
        return False
    if first.get_backend_name() == "sqlite":
        return Path(first.database or "").resolve() == Path(second.database or "").resolve()

    def place(url: sa.URL) -> tuple[Any, ...]:
        host = url.host or url.query.get("host") or "localhost"
        return host, url.port or url.query.get("port") or 5432, url.database

    return place(first) == place(second)


@contextmanager
def _speaking_of(field: str) -> Iterator[None]:
    """Let errors about ``--db``, as every other command calls its database, speak of this argument."""
    try:
        yield
    except InputError as error:
        named = field if error.field == "--db" else error.field
        raise InputError(named, error.value, error.problem, error.remedy) from error
    except LedgerError as error:
        raise LedgerError(str(error).replace("--db", field)) from error
