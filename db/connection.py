"""Opening a ledger database: engine settings, the schema's version, and the errors that a user can act on."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from archfront.errors import InputError, LedgerError, MissingExtraError

PASSWORD_FILE = "ARCHFRONT_DB_PASSWORD_FILE"
"""Environment variable: a file with the password of a database URL that has none."""

_BUSY_TIMEOUT_MS = 30_000
SQLITE_NOW = "(julianday('now') - 2440587.5) * 86400.0"
POSTGRES_NOW = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
"""Seconds since 1970 by the database's clock, in its SQL."""

PATIENCE_S = 60.0
"""How long a database may be away before its users give up (resumable)."""

# A server whose host vanished is noticed within half a minute instead of TCP's quarter of an hour.
_POSTGRES_ARGUMENTS = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
    "application_name": "archfront",
}
_UP_TO_AT = re.compile(r"(:/+[^:]*):.*@", re.DOTALL)
"""Of a URL that is hard to read: all that may be its password, and rather more than less."""

_SECRET_OPTION = re.compile(r"([?&][^=&]*(?:passw|passphrase|pwd)[^=&]*=)[^&]*", re.IGNORECASE)
_MIGRATING = 0x61726368
"""Key of the advisory lock of migrations: no other use of this database may take it."""

_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "afs", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p")


def parse_url(text: str) -> URL:
    """A database URL; a bare path means a SQLite file.

    Raises:
        InputError: neither.
    """
    if "://" not in text:
        text = f"sqlite:///{text}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise InputError(
            "--db", without_password(text), "is no database URL", "Give a path or sqlite:///FILE."
        ) from None
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg", password=url.password or _password_of_file())
    elif url.get_backend_name() != "sqlite":
        raise InputError(
            "--db", without_password(text), "is of an unknown kind", "Use sqlite:///FILE or postgresql://HOST/NAME."
        )
    return url


def without_password(text: str) -> str:
    """A database URL, or what was meant as one, as it may be shown."""
    shown = text
    try:
        url = make_url(text)
        if url.password is not None:
            shown = url.render_as_string(hide_password=True)
        # An @ of a password that should have been written %40 leaves the password's end in the host or the path.
        whole = url.get_backend_name() == "sqlite" or "@" not in f"{url.host}{url.database}"
    except (ArgumentError, ValueError):
        whole = False
    if not whole:
        shown = _UP_TO_AT.sub(r"\1:***@", text)
    return _SECRET_OPTION.sub(r"\1***", shown)


def _password_of_file() -> str | None:
    """What a secret of a container holds: passwords belong neither on command lines nor in the environment."""
    path = os.environ.get(PASSWORD_FILE)
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError(PASSWORD_FILE, path, f"cannot be read ({error.strerror})", "Name a readable file.") from None


def open_engine(text: str, *, create: bool, check_schema: bool = True) -> Engine:
    """An engine on a database whose schema is this version's; an empty database gets the schema.

    Args:
        text: URL, or path of a SQLite file.
        create: make a missing SQLite file; without it a missing file is an error.
        check_schema: bring an empty database to this version's schema and refuse any other.

    Raises:
        LedgerError: unreachable, corrupt, read-only, of another schema version, or on a network file system.
    """
    url = parse_url(text)
    if url.get_backend_name() == "sqlite":
        _check_sqlite_file(url, create=create)
    server = url.get_backend_name() != "sqlite"
    try:
        arguments = _POSTGRES_ARGUMENTS if server else {}
        engine = sa.create_engine(url, pool_pre_ping=server, connect_args=arguments, hide_parameters=True)
    except ModuleNotFoundError:
        raise MissingExtraError("PostgreSQL", "postgres") from None
    if url.get_backend_name() == "sqlite":
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    else:
        sa.event.listen(engine, "connect", _configure_postgres)
    if check_schema:
        with ledger_errors(text):
            _bring_schema(engine, text)
    return engine


@contextmanager
def ledger_errors(text: str) -> Iterator[None]:
    """Turn a driver's error into one that says what to do."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause = str(getattr(error, "orig", error)).strip()
        if "not a database" in cause or "malformed" in cause:
            remedy = "The file is damaged or no SQLite file: restore a backup, or name another file with --db."
        elif "readonly" in cause or "read-only" in cause or "unable to open" in cause:
            remedy = "The file or its folder cannot be written: change its permissions, or name another with --db."
        elif "no space" in cause or "disk is full" in cause or "disk I/O" in cause:
            remedy = "Free some disk space and resume: what was committed is safe."
        elif isinstance(error, DatabaseError):
            remedy = "Check that the server runs and that the URL is right."
        else:
            raise
        raise LedgerError(f"--db: {without_password(text)!r} cannot be used: {cause}. {remedy}") from error


def _configure_postgres(connection: Any, _record: Any) -> None:
    """Rows are fetched by their keys, from memory or flash: the planner's default, made for discs that turn, reads a
    whole table of candidates instead. As a statement, because not every pooler takes it as a start-up option."""
    connection.execute("SET random_page_cost = 1.1")
    connection.commit()


class Patience:
    """Waiting for a database that is busy, restarts or cannot be reached for a while.

    Attributes:
        begun: whether there was anything to wait for.
    """

    def __init__(self, seconds: float = PATIENCE_S) -> None:
        self.begun = False
        self._pause = 0.05
        self._until = time.monotonic() + seconds

    def wait_or_raise(self, error: DBAPIError, text: str) -> None:
        """Wait a little longer each time.

        Raises:
            LedgerError: it took too long, or no waiting will help.
        """
        if isinstance(error, (IntegrityError, ProgrammingError, DataError)):
            raise error
        passing = isinstance(error, (OperationalError, InterfaceError)) or error.connection_invalidated
        words = str(error.orig)
        hopeless = any(sign in words for sign in ("full", "disk I/O", "malformed", "not a database", "readonly"))
        if not passing or hopeless or time.monotonic() > self._until:
            with ledger_errors(text):
                raise error
        self.begun = True
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, 2.0)


def write(engine: Engine) -> Any:
    """A context manager: one write transaction, holding SQLite's write lock from its start."""
    return engine.execution_options(archfront_write=True).begin()


def now(connection: Connection) -> float:
    """Seconds since 1970 by the database's clock: hosts' clocks may differ, this one is shared."""
    clock = SQLITE_NOW if connection.dialect.name == "sqlite" else POSTGRES_NOW
    return float(connection.exec_driver_sql(f"SELECT {clock}").scalar_one())


def alembic_config(engine: Engine | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["engine"] = engine
    return config


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver opens no transactions of its own: _begin_sqlite says which kind is opened.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA cache_size=-65536")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A write that starts as a read can fail at its first write; IMMEDIATE queues for the lock instead.
    immediate = connection.get_execution_options().get("archfront_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _check_sqlite_file(url: URL, *, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise InputError("--db", str(url), "would be lost at exit", "Name a file.")
    path = Path(url.database).absolute()
    if not path.exists():
        if not create:
            raise LedgerError(f"--db: {str(path)!r} does not exist. Run a job first, or name another with --db.")
        if not path.parent.is_dir():
            raise LedgerError(f"--db: the folder {str(path.parent)!r} does not exist. Make it, or name another file.")
    kind = _file_system(path)
    if kind.startswith(_NETWORK_FILE_SYSTEMS):
        raise LedgerError(
            f"--db: {str(path)!r} lies on a network file system ({kind}), where SQLite's locks do not hold. "
            "Name a file on a local disk, or use PostgreSQL."
        )


def _file_system(path: Path) -> str:
    """Type of the file system that holds a path, e.g. ``ext4``; empty where it cannot be told."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[str(folder)] for folder in [path, *path.resolve().parents] if str(folder) in mounts), "")


def one_migration(connection: Connection) -> None:
    """Wait until no other process migrates this database, and let none begin until this transaction ends."""
    if connection.dialect.name == "postgresql":  # a write to SQLite has the only lock there is
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATING})")


def _bring_schema(engine: Engine, text: str) -> None:
    script = ScriptDirectory.from_config(alembic_config())
    head = script.get_current_head()
    with engine.connect() as connection:
        # In this order: another process may bring the schema in between, and tables without a revision are no ledger.
        tables = sa.inspect(connection).get_table_names()
        current = MigrationContext.configure(connection).get_current_revision()
    if current == head:
        return
    if current is None and not tables:
        # Looks at the revision again once it is alone.
        command.upgrade(alembic_config(engine), "head")
        return
    known = {revision.revision for revision in script.walk_revisions()}
    if current is None:
        raise LedgerError(
            f"--db: {without_password(text)!r} holds other tables and is no archfront ledger. Name another database."
        )
    if current not in known:
        raise LedgerError(
            f"--db: {without_password(text)!r} has schema {current!r}, which this version does not know "
            f"(its own is {head!r}). It was written by a newer archfront: upgrade archfront, or name another database."
        )
    raise LedgerError(
        f"--db: {without_password(text)!r} has the older schema {current!r} (this version's is {head!r}). "
        "Make a copy of it, then run: archfront db upgrade."
    )
