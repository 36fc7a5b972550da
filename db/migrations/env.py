"""Alembic's entry: runs the migrations on the engine that ``connection.alembic_config`` hands over."""

from __future__ import annotations

from alembic import context

from archfront.db.connection import one_migration, write
from archfront.db.schema import Base

with write(context.config.attributes["engine"]) as connection:
    # Before the revision is read: another process may just have brought this database to it.
    one_migration(connection)
    # SQLite cannot alter most things in place: batch mode copies the table instead.
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
