"""Commands about a ledger as a whole: its schema, its soundness, its move to another database."""

from __future__ import annotations

from typing import Annotated

import sqlalchemy as sa
import typer
from alembic import command
from alembic.runtime.migration import MigrationContext
from rich.table import Table

from archfront.cli.common import EXIT_INPUT, AsJson, Database, console, errors, print_json
from archfront.client import DEFAULT_DB
from archfront.db.columns import check_chunks
from archfront.db.connection import alembic_config, ledger_errors, open_engine, without_password
from archfront.db.moving import move as move_ledger
from archfront.db.schema import Job

app = typer.Typer(no_args_is_help=True)


@app.command()
def upgrade(db: Database = DEFAULT_DB) -> None:
    """Bring a ledger to this version's schema."""
    engine = open_engine(db, create=True, check_schema=False)
    with ledger_errors(db):
        command.upgrade(alembic_config(engine), "head")
    console.print(f"{without_password(db)} has this version's schema.", highlight=False)


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
        console.print(
            f"{without_password(db)}: the packed columns of {len(ids)} jobs equal their rows.", highlight=False
        )
    else:
        errors.print("\n".join(wrong), highlight=False, markup=False)
    if wrong:
        raise typer.Exit(EXIT_INPUT)


@app.command()
def move(
    source: Annotated[str, typer.Argument(metavar="FROM", help="SQLite file or database URL of the ledger.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same of an empty database.")],
    json: AsJson = False,
) -> None:
    """Copy a whole ledger between SQLite and PostgreSQL; FROM stays as it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=errors, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(table: str, rows: int, total: int) -> None:
            if table not in tasks:
                tasks[table] = bars.add_task(table)
            bars.update(tasks[table], completed=rows, total=total)

        moved = move_ledger(source, target, show)
    if json:
        print_json({"rows": moved})
        return
    table = Table("table", "rows")
    for name, rows in moved.items():
        table.add_row(name, f"{rows:,}")
    console.print(table)
    console.print(
        f"{without_password(target)} holds all of it, counted; {without_password(source)} is unchanged. "
        "Checkpoints stay in the folders where they are.",
        highlight=False,
        soft_wrap=True,
    )
