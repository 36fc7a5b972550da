"""Conditions that both databases answer quickly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Connection


def fetched(connection: Connection, query: sa.Select[*tuple[Any, ...]]) -> Sequence[Any]:
    """All rows of a query, as plain tuples and as quickly as they come: for thousands of rows of plain columns."""
    if connection.dialect.name == "sqlite":
        return connection.execute(query).all()
    # In binary: as text, bytes come in hexadecimal, twice as many and to be parsed. And past SQLAlchemy's rows, which
    # take as long as the query itself.
    compiled = query.compile(dialect=connection.dialect)
    with connection.connection.driver_connection.cursor(binary=True) as cursor:  # type: ignore[union-attr]
        found: list[Any] = cursor.execute(str(compiled), compiled.params).fetchall()
    return found


def among(connection: Connection, column: Any, numbers: Sequence[int]) -> sa.ColumnElement[bool]:
    """Whether a column is one of any many numbers, as one parameter: thousands of them would have to be written out."""
    found: sa.ColumnElement[bool]
    if connection.dialect.name == "sqlite":
        given = sa.func.json_each(json.dumps(list(numbers))).table_valued("value")
        found = column.in_(sa.select(given.c.value))
        return found
    # As one text: psycopg would look at each number of a list.
    array = sa.cast(sa.func.string_to_array(",".join(map(str, numbers)), ","), ARRAY(sa.BigInteger))
    found = column == sa.any_(array)
    return found
