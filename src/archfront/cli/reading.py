"""Commands that read a ledger: jobs, status, front."""

from __future__ import annotations

import csv
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.markup import escape
from rich.table import Table

from archfront.cli.common import (
    AsJson,
    Database,
    JobReference,
    PluginFiles,
    console,
    moment,
    number,
    plain,
    print_json,
)
from archfront.client import DEFAULT_DB, Front, Job
from archfront.db.connection import without_password
from archfront.db.ledger import Ledger
from archfront.errors import InputError


class Format(StrEnum):
    """How a front is printed."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


def jobs(db: Database = DEFAULT_DB, json: AsJson = False) -> None:
    """List the jobs of a ledger, the newest first."""
    from archfront.db.schema import Job as JobRow

    ledger = Ledger.open(db, create=False)
    with ledger.engine.connect() as connection:
        ids = connection.execute(sa.select(JobRow.id).order_by(JobRow.id.desc())).scalars().all()
    rows = [Job(ledger, job_id).status(tracebacks=0) for job_id in ids]
    if json:
        print_json(rows)
        return
    table = Table("id", "name", "state", "done", "budget", "failed", "front", "created")
    for row in rows:
        done, failed = row["evaluations"]["done"], row["evaluations"]["failed"]
        cells = [row["id"], escape(row["name"]), row["state"], done, row["budget"]["evaluations"], failed, row["front"]]
        table.add_row(*map(str, cells), moment(row["created_at"]))
    console.print(table if rows else f"{without_password(db)} holds no job yet.")


def status(
    job: JobReference = "last",
    db: Database = DEFAULT_DB,
    tracebacks: Annotated[int, typer.Option(min=0, help="Newest failed attempts to show.")] = 3,
    json: AsJson = False,
) -> None:
    """Show how far a job is, who drives it, and what failed."""
    facts = Job(db, job).status(tracebacks)
    if json:
        print_json(facts)
        return
    states = facts["evaluations"]
    console.print(f"[bold]Job {facts['id']} {escape(facts['name'])}[/bold]: {facts['state']}", highlight=False)
    if facts["reason"]:
        console.print(facts["reason"], highlight=False, markup=False, soft_wrap=True)
    reused = f"; {facts['reused']} taken from other jobs" if facts["reused"] else ""
    console.print(
        f"{states['done']} of {facts['budget']['evaluations']} evaluations done, {states['running']} written ahead, "
        f"{states['failed']} failed, {states['cancelled']} cancelled; {facts['front']} on the front{reused}",
        highlight=False,
        soft_wrap=True,
    )
    if facts["predictor"]:
        console.print(_learned(facts["predictor"]), highlight=False, markup=False, soft_wrap=True)
    if facts["driver"]:
        console.print(f"driven by process {facts['driver']['pid']} on {facts['driver']['host']}", highlight=False)
    for failure in facts["failures"]:
        head = f"evaluation {failure['number']}, attempt {failure['attempt']}, {failure['kind']}: {failure['message']}"
        console.print(f"\n[red]failed[/red] {moment(failure['failed_at'])}", highlight=False)
        console.print(head, markup=False, highlight=False, soft_wrap=True)
        if failure["traceback"]:
            console.print(failure["traceback"].rstrip(), markup=False, highlight=False, soft_wrap=True)


def _learned(predictor: dict[str, Any]) -> str:
    words = f"{predictor['evaluator']} learned from {predictor['pairs']} measured candidates"
    if isinstance(predictor["error"], float) and isinstance(predictor["error_before"], float):
        words += f": median error {predictor['error']:.1%}, {predictor['error_before']:.1%} before"
    return f"{words} (version {predictor['version']})"


def front(
    job: JobReference = "last",
    db: Database = DEFAULT_DB,
    objectives: Annotated[
        str | None, typer.Option(help="Metrics, e.g. accuracy,latency_ms; +m or -m to maximise or minimise others.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="E.g. 'latency_ms <= 2 and params < 1e5'.")] = None,
    fidelity: Annotated[str, typer.Option(help="top, any or a number.")] = "top",
    at: Annotated[str | None, typer.Option(metavar="TIME|EVALUATION", help="As it was then.")] = None,
    format: Annotated[Format, typer.Option(help="How to print it.")] = Format.table,
    to: Annotated[Path | None, typer.Option(help="Write there instead of to the terminal.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: FILE.html or FILE.png.")] = None,
    plugin: PluginFiles = None,
    json: AsJson = False,
) -> None:
    """Show the Pareto front of a job, now or at any past moment."""
    found = Job(db, job, plugins=plugin or [])
    chosen = None if objectives is None else [name.strip() for name in objectives.split(",") if name.strip()]
    if chosen is not None and not chosen:
        raise InputError("--objectives", objectives, "names no metric", "Write e.g. accuracy,latency_ms.")
    members = found.front(objectives=chosen, where=where, fidelity=fidelity, at=_moment(at))
    if plot is not None:
        from archfront.plots import plot_front

        plot_front(members, found, plot)
    _write(members, Format.json if json else format, to)


def _write(members: Front, form: Format, to: Path | None) -> None:
    if form is Format.parquet:
        if to is None:
            raise InputError("--format", "parquet", "cannot go to a terminal", "Name a file with --to.")
        frame = members.to_pandas()
        frame["genotype"] = [_json(genotype) for genotype in frame["genotype"]]
        frame.to_parquet(to)
    elif form is Format.csv:
        with open(to, "w", newline="", encoding="utf-8") if to else _standard_output() as file:
            writer = csv.writer(file)
            names = ["evaluation", "key", "genotype", "fidelity", *members.metrics]
            writer.writerow(names)
            for row in members:
                writer.writerow([_json(row[n]) if n == "genotype" else row.get(n) for n in names])
    elif form is Format.json:
        if to is None:
            print_json(list(members))
        else:
            to.write_text(_json(list(members)), encoding="utf-8")
    else:
        names = [name for name, _ in members.objectives]
        hidden = [name for name in members.metrics if name not in names]
        more = (
            f"Also there, with the genotypes: {', '.join(hidden)} (--format json, csv or parquet)" if hidden else None
        )
        table = Table("evaluation", "key", "fidelity", *names, caption=more, caption_justify="left")
        for row in _sorted(members):
            cells = [str(row["evaluation"]), row["key"][:8], str(row["fidelity"])]
            table.add_row(*cells, *(number(row.get(name)) for name in names))
        if not len(members):
            console.print("The front is empty: no feasible evaluation is done yet, or none holds the conditions.")
        elif to is None:
            console.print(table)
        else:
            from rich.console import Console

            with open(to, "w", encoding="utf-8") as file:
                Console(file=file, width=200).print(table)


def _sorted(members: Front) -> list[dict[str, Any]]:
    """Best first in the first objective."""
    name, direction = members.objectives[0]
    return sorted(members, key=lambda row: row[name] * (-1 if direction == "max" else 1))


def _standard_output() -> Any:
    from contextlib import nullcontext

    return nullcontext(sys.stdout)


def _json(data: Any) -> str:
    import json

    return json.dumps(plain(data))


def _moment(text: str | None) -> int | datetime | None:
    if text is None:
        return None
    if text.isdecimal() and len(text) < 18:
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
        moment.timestamp()
        return moment
    except (ValueError, OverflowError):
        raise InputError(
            "--at", text, "is neither an evaluation nor a time", "Give a number, or e.g. 2026-01-31T12:00:00."
        ) from None
