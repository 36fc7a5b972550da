"""Commands that bring other tools' results into a ledger."""

from __future__ import annotations

from typing import Annotated

import typer

from archfront.cli.common import AsJson, Database, console, print_json
from archfront.client import DEFAULT_DB
from archfront.db.connection import without_password

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Without it, a single command would take the place of the whole group."""


@app.command()
def optuna(
    storage: Annotated[str, typer.Argument(metavar="STORAGE", help="Database URL, SQLite file or journal file.")],
    study: Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")],
    name: Annotated[str | None, typer.Option(help="Name of the job; the study's if unset.")] = None,
    db: Database = DEFAULT_DB,
    json: AsJson = False,
) -> None:
    """Enter an Optuna study as a job: its trials, their values, attributes and constraints."""
    from archfront.db.ledger import Ledger
    from archfront.interchange.optuna_import import find_study, import_study

    find_study(storage, study)  # before a ledger is made for nothing
    imported = import_study(Ledger.open(db), storage, study, name)
    if json:
        print_json({"id": imported.job_id, "name": imported.name, "evaluations": imported.endings})
        return
    counts = ", ".join(f"{count:,} {state}" for state, count in imported.endings.items())
    console.print(
        f"Imported the study as job {imported.job_id} {imported.name!r}: {counts}. "
        f"See its front with: archfront front {imported.job_id} --db {without_password(db)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
