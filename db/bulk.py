"""Writing many rows through the driver itself: the ORM costs several times more a row.

SQLite takes prepared statements row by row; PostgreSQL takes COPY for new rows and one UPDATE over arrays for changed
ones, so that a commit of any size costs a handful of round trips.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from archfront.db.connection import POSTGRES_NOW, SQLITE_NOW
from archfront.db.schema import Base

Rows = Sequence[tuple[Any, ...]]


class Bulk(ABC):
    """The two ways of one dialect to write rows inside of a transaction that the caller holds."""

    @abstractmethod
    def insert(self, connection: Connection, table: str, columns: Sequence[str], rows: Rows) -> None:
        """Insert new rows; JSON columns as text."""

    @abstractmethod
    def update(
        self, connection: Connection, table: str, columns: Sequence[str], keys: Sequence[str], rows: Rows, only: str
    ) -> int:
        """Set ``columns`` where ``keys`` match and ``only`` (SQL on the table's columns) holds.

        Args:
            rows: values of the columns, then of the keys.

        Returns:
            how many rows changed.
        """

    @abstractmethod
    def candidates(self, connection: Connection, space_digest: str, rows: Sequence[tuple[str, Any]]) -> dict[str, int]:
        """Enter candidates ``(key, genotype)`` that are not there yet. Returns the ids of all by key."""

    def prolong(
        self, connection: Connection, job_id: int, run_id: int, commits: int, lease_s: float
    ) -> tuple[float, bool] | None:
        """Prolong the lease of a run that has made so many commits, count one more, and hold it to the end of the
        transaction, all in one statement.

        Returns:
            the time by the database's clock and whether the job is to be cancelled; None where there is no such lease.
        """
        with _cursor(connection) as cursor:
            cursor.execute(self._prolong, (lease_s, job_id, run_id, commits))
            row = cursor.fetchone()
        return None if row is None else (row[0] - lease_s, bool(row[1]))

    _prolong: ClassVar[str]

    def refresh_plans(self, connection: Connection) -> None:
        """Let the database look at how its tables have grown."""


_PROLONG = (
    "UPDATE leases SET expires_at = {now} + {mark}, commits = commits + 1 "
    "WHERE job_id = {mark} AND run_id = {mark} AND commits = {mark} "
    "RETURNING expires_at, (SELECT cancel_requested FROM jobs WHERE jobs.id = leases.job_id)"
)


def bulk_of(dialect: str) -> Bulk:
    return SqliteBulk() if dialect == "sqlite" else PostgresBulk()


class SqliteBulk(Bulk):
    """Prepared statements, once a row."""

    _prolong = _PROLONG.format(now=SQLITE_NOW, mark="?")

    def insert(self, connection: Connection, table: str, columns: Sequence[str], rows: Rows) -> None:
        if rows:
            marks = ", ".join("?" * len(columns))
            statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
            with _cursor(connection) as cursor:
                cursor.executemany(statement, rows)

    def update(
        self, connection: Connection, table: str, columns: Sequence[str], keys: Sequence[str], rows: Rows, only: str
    ) -> int:
        if not rows:
            return 0
        changes = ", ".join(f"{name} = ?" for name in columns)
        matches = " AND ".join(f"{name} = ?" for name in keys)
        statement = f"UPDATE {table} SET {changes} WHERE {matches} AND {only}"
        with _cursor(connection) as cursor:
            return int(cursor.executemany(statement, rows).rowcount)

    def candidates(self, connection: Connection, space_digest: str, rows: Sequence[tuple[str, Any]]) -> dict[str, int]:
        find = "SELECT id FROM candidates WHERE space_digest = ? AND key = ?"
        enter = (
            "INSERT INTO candidates (space_digest, key, genotype) VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING id"
        )
        ids: dict[str, int] = {}
        with _cursor(connection) as cursor:
            for key, genotype in rows:
                # Most are new: one statement for those, two for the rest.
                found = cursor.execute(enter, (space_digest, key, json.dumps(genotype))).fetchone()
                ids[key] = (found or cursor.execute(find, (space_digest, key)).fetchone())[0]
        return ids


class PostgresBulk(Bulk):
    """COPY, and statements over arrays."""

    _prolong = _PROLONG.format(now=POSTGRES_NOW, mark="%s")

    def insert(self, connection: Connection, table: str, columns: Sequence[str], rows: Rows) -> None:
        if not rows:
            return
        copy_in = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
        with _cursor(connection) as cursor, cursor.copy(copy_in) as copy:
            for row in rows:
                copy.write_row(row)

    def update(
        self, connection: Connection, table: str, columns: Sequence[str], keys: Sequence[str], rows: Rows, only: str
    ) -> int:
        if not rows:
            return 0
        names = [*columns, *keys]
        arrays = ", ".join(f"%s::{_type(table, name)}[]" for name in names)
        new = [f"new_{name}" for name in names]
        changes = ", ".join(f"{name} = new_{name}" for name in columns)
        matches = " AND ".join(f"{name} = new_{name}" for name in keys)
        statement = (
            f"UPDATE {table} SET {changes} FROM unnest({arrays}) AS new({', '.join(new)}) WHERE {matches} AND {only}"
        )
        with _cursor(connection) as cursor:
            cursor.execute(statement, [_array(column) for column in zip(*rows, strict=True)])
            return int(cursor.rowcount)

    def candidates(self, connection: Connection, space_digest: str, rows: Sequence[tuple[str, Any]]) -> dict[str, int]:
        if not rows:
            return {}
        # In the order of their keys, so that two jobs of one space never wait for each other in a circle.
        genotypes = {key: json.dumps(genotype) for key, genotype in sorted(rows, key=lambda row: row[0])}
        keys = list(genotypes)
        with _cursor(connection) as cursor:
            cursor.execute(
                "INSERT INTO candidates (space_digest, key, genotype) "
                "SELECT %s, key, genotype::json FROM unnest(%s::text[], %s::text[]) AS new(key, genotype) "
                "ON CONFLICT DO NOTHING",
                (space_digest, _array(keys), _array(list(genotypes.values()))),
            )
            cursor.execute(
                "SELECT key, id FROM candidates WHERE space_digest = %s AND key = ANY(%s::text[])",
                (space_digest, _array(keys)),
            )
            return dict(cursor.fetchall())

    def refresh_plans(self, connection: Connection) -> None:
        # Without statistics PostgreSQL takes every table for a tiny one and checks foreign keys by the wrong index, in
        # time proportional to the job; its own housekeeping would look a minute later.
        connection.exec_driver_sql("ANALYZE candidates, asks, evaluations, metrics, front_members")


@contextmanager
def _cursor(connection: Connection) -> Iterator[Any]:
    """A cursor of the driver itself, inside of the connection's transaction; its errors come as SQLAlchemy's."""
    cursor = connection.connection.cursor()
    driver = connection.dialect.loaded_dbapi
    try:
        yield cursor
    except driver.Error as error:
        gone = connection.dialect.is_disconnect(error, connection.connection.dbapi_connection, None)
        if gone:
            connection.invalidate()
        raise DBAPIError.instance(
            "", None, error, driver.Error, hide_parameters=True, connection_invalidated=gone, dialect=connection.dialect
        ) from error
    finally:
        cursor.close()


def _array(values: Sequence[Any]) -> str:
    """PostgreSQL's text of an array: written here at a fifth of what the driver's own way takes a value."""
    if any(isinstance(value, str) for value in values):
        quoted = ['"' + v.replace("\\", "\\\\").replace('"', '\\"') + '"' if v is not None else "NULL" for v in values]
        return "{" + ",".join(quoted) + "}"
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def _type(table: str, column: str) -> str:
    """PostgreSQL's name of a column's type, for the array that carries new values of it."""
    kind = Base.metadata.tables[table].columns[column].type
    if isinstance(kind, sa.Integer):
        return "bigint"
    if isinstance(kind, sa.Float):
        return "float8"
    if isinstance(kind, sa.JSON):
        return "json"
    return "boolean" if isinstance(kind, sa.Boolean) else "text"
