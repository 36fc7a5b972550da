"""Commands about a ledger's schema."""

from __future__ import annotations

import sqlalchemy as sa
import typer
from alembic import command
from alembic.runtime.migration import MigrationContext

from archfront.cli.common import EXIT_INPUT, AsJson, Database, console, errors, print_json, shown_database
from archfront.client import DEFAULT_DB
from archfront.db.columns import check_chunks
from archfront.db.connection import alembic_config, ledger_errors, open_engine
from archfront.db.schema import Job

app = typer.Typer(no_args_is_help=True)


@app.command()
def upgrade(db: Database = DEFAULT_DB) -> None:
    """Bring a ledger to this version's schema."""
    engine = open_engine(db, create=True, check_schema=False)
    with ledger_errors(db):
        command.upgrade(alembic_config(engine), "head")
    console.print(f"{shown_database(db)} has this version's schema.", highlight=False)


@app.command()
def current(db: Database = DEFAULT_DB, json: AsJson = False) -> None:
    """Print the schema version of a ledger."""
    engine = open_engine(db, create=False, check_schema=False)
    with ledger_errors(db), engine.connect() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    if json:
        print_json({"schema": revision})
    else:
        console.print(revision or "none", highlight=False)


@app.command()
def check(db: Database = DEFAULT_DB, json: AsJson = False) -> None:
    """Check that the packed columns of every job equal its rows."""
    engine = open_engine(db, create=False)
    with ledger_errors(db), engine.connect() as connection:
        ids = connection.execute(sa.select(Job.id)).scalars().all()
        wrong = [line for job_id in ids for line in check_chunks(connection, job_id)]
    if json:
        print_json({"wrong": wrong})
    elif not wrong:
        console.print(f"{shown_database(db)}: the packed columns of {len(ids)} jobs equal their rows.", highlight=False)
    else:
        errors.print("\n".join(wrong), highlight=False, markup=False)
    if wrong:
        raise typer.Exit(EXIT_INPUT)
