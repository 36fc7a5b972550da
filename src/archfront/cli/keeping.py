"""Commands that write files from a ledger, or clean up after it: export, report, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archfront.cli.common import AsJson, Database, JobReference, PluginFiles, console, print_json
from archfront.client import DEFAULT_DB, Job
from archfront.errors import InputError


def export(
    job: JobReference,
    candidate: Annotated[
        str | None,
        typer.Argument(metavar="[CANDIDATE]", help="Evaluation number, or the key's beginning.", show_default=False),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="Of a candidate: FILE.json, FILE.safetensors, FILE.pt2 (torch.export) or FILE.onnx, both in float32. "
            "Of the whole job: optuna:URL (or a journal's path), tensorboard:FOLDER, csv:FOLDER or parquet:FOLDER."
        ),
    ] = "",
    db: Database = DEFAULT_DB,
    plugin: PluginFiles = None,
    json: AsJson = False,
) -> None:
    """Write one candidate (genotype, weights, program or ONNX), or a whole job for other tools."""
    from archfront.export import export_candidate
    from archfront.interchange.registry import FORMS, export_job, scheme_of

    if not to:
        raise InputError("--to", to, "names no place", f"Name a file for a candidate, or for the job {FORMS}.")
    scheme = scheme_of(to)
    found = Job(db, job, plugins=plugin or [])
    if candidate is None:
        if scheme is None:
            remedy = f"Name one (`archfront front {job}` shows them), or export the whole job: {FORMS}."
            raise InputError("CANDIDATE", None, "is missing", remedy)
        everything = export_job(found, to)
        if json:
            print_json({"job": found.id, "what": everything.what, "to": everything.to})
        else:
            console.print(f"Wrote {everything.what} to {everything.to}.", highlight=False, markup=False, soft_wrap=True)
        return
    if scheme is not None:
        problem = f"cannot be exported alone to {scheme}"
        raise InputError("CANDIDATE", candidate, problem, "Leave it out to export the whole job, or name a file.")
    written = export_candidate(found, candidate, Path(to))
    if json:
        print_json(written)
    else:
        console.print(f"Wrote {written['what']} of evaluation {written['evaluation']} to {to}.", highlight=False)


def report(
    job: JobReference = "last",
    to: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    db: Database = DEFAULT_DB,
    plugin: PluginFiles = None,
) -> None:
    """Write a self-contained HTML report: front, history, finalists."""
    from archfront.report.page import write_report

    found = Job(db, job, plugins=plugin or [])
    write_report(found, to)
    console.print(f"Wrote the report on job {found.id} to {to}.", highlight=False)


def gc(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id, name, 'last' or 'all'.")] = "all",
    db: Database = DEFAULT_DB,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    json: AsJson = False,
) -> None:
    """Delete the checkpoints that a job's `keep` rule does not hold."""
    from archfront.search.retention import collect

    found = collect(db, job, dry_run=dry_run)
    if json:
        print_json(found)
        return
    for row in found:
        verb = "would delete" if dry_run else "deleted"
        console.print(
            f"job {row['job']} (keep: {row['keep']}): {verb} {row['files']} checkpoints, {row['bytes'] / 1e6:.1f} MB; "
            f"{row['kept']} kept" + (f"; skipped: {row['skipped']}" if row["skipped"] else ""),
            highlight=False,
        )
