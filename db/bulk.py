"""Writing many rows through the driver itself: the ORM costs several times more a row.

SQLite takes prepared statements row by row; PostgreSQL takes COPY for new rows and one UPDATE over arrays for changed
ones, so that a commit of any size costs a handful of round trips.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

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

    def refresh_plans(self, connection: Connection) -> None:
        """Let the database look at how its tables have grown."""


def bulk_of(dialect: str) -> Bulk:
    return SqliteBulk() if dialect == "sqlite" else PostgresBulk()


class SqliteBulk(Bulk):
    """Prepared statements, once a row."""

    def insert(self, connection: Connection, table: str, columns: Sequence[str], rows: Rows) -> None:
        if rows:
            marks = ", ".join("?" * len(columns))
            statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
            connection.exec_driver_sql(statement, list(rows))

    def update(
        self, connection: Connection, table: str, columns: Sequence[str], keys: Sequence[str], rows: Rows, only: str
    ) -> int:
        if not rows:
            return 0
        changes = ", ".join(f"{name} = ?" for name in columns)
        matches = " AND ".join(f"{name} = ?" for name in keys)
        statement = f"UPDATE {table} SET {changes} WHERE {matches} AND {only}"
        return connection.exec_driver_sql(statement, list(rows)).rowcount

    def candidates(self, connection: Connection, space_digest: str, rows: Sequence[tuple[str, Any]]) -> dict[str, int]:
        # The driver's own cursor: a result object of SQLAlchemy for each look-up would cost more than the look-up.
        find = "SELECT id FROM candidates WHERE space_digest = ? AND key = ?"
        enter = "INSERT INTO candidates (space_digest, key, genotype) VALUES (?, ?, ?)"
        ids: dict[str, int] = {}
        with _cursor(connection) as cursor:
            for key, genotype in rows:
                found = cursor.execute(find, (space_digest, key)).fetchone()
                if found is None:
                    cursor.execute(enter, (space_digest, key, json.dumps(genotype)))
                ids[key] = int(cursor.lastrowid) if found is None else found[0]
        return ids


class PostgresBulk(Bulk):
    """COPY, and statements over arrays."""

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
            cursor.execute(statement, [list(column) for column in zip(*rows, strict=True)])
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
                (space_digest, keys, list(genotypes.values())),
            )
            cursor.execute(
                "SELECT key, id FROM candidates WHERE space_digest = %s AND key = ANY(%s)", (space_digest, keys)
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
