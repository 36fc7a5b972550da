"""Commands that drive a job: run, resume, cancel."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from archfront.cli.common import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    AsJson,
    Database,
    JobReference,
    PluginFiles,
    console,
    errors,
    print_json,
)
from archfront.client import DEFAULT_DB, Job
from archfront.db.connection import without_password
from archfront.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from archfront.plugins import Plugin
    from archfront.search.job import JobSpec

RayAddress = Annotated[str | None, typer.Option("--ray", help="Address of a running Ray cluster.")]
Files = Annotated[
    str | None, typer.Option("--files", help="Folder or URI for checkpoints; beside the ledger if unset.")
]


def run(
    file: Annotated[str | None, typer.Argument(metavar="JOB.yaml", help="The job file.")] = None,
    db: Database = DEFAULT_DB,
    recipe: Annotated[
        str | None, typer.Option(help="Begin with this recipe's policies; without a job file, evaluate these alone.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help='Of the recipe, a policy each: "model_mb <= 6.7", "... and gbops <= 3".')
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of the recipe: exported weights, or a mapping in YAML.")] = None,
    data: Annotated[str | None, typer.Option(help="Of the recipe: a data set's name, or a mapping.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="In place of the job's workers.count.")] = None,
    plugin: PluginFiles = None,
    ray: RayAddress = None,
    files: Files = None,
    json: AsJson = False,
) -> None:
    """Submit a job and follow it to its end."""
    from archfront.db.ledger import Ledger
    from archfront.plugins import read_plugins
    from archfront.search.driver import submit

    sources = read_plugins(plugin or [])
    # Before the ledger is opened: a bad file leaves none behind.
    spec = _recipe_spec(file, sources, recipe, budget or [], model, data)
    if workers is not None:
        spec = spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": workers})})
    ledger = Ledger.open(db)
    job = Job(ledger, submit(ledger, spec, sources), plugins=plugin or [])
    _follow(job, db, json, ray=ray, files=files, accept=True)


def resume(
    job: JobReference,
    db: Database = DEFAULT_DB,
    budget: Annotated[str | None, typer.Option(metavar="+N", help="Evaluations to add to the budget.")] = None,
    accept_changes: Annotated[bool, typer.Option(help="Go on although the code changed since the last run.")] = False,
    plugin: PluginFiles = None,
    ray: RayAddress = None,
    files: Files = None,
    json: AsJson = False,
) -> None:
    """Go on with a job where it stands."""
    found = Job(db, job, plugins=plugin or [])
    found.refuse_recorded()
    more = 0
    if budget is not None:
        if not budget.startswith("+") or not (budget[1:].isdecimal() and len(budget) < 12) or int(budget[1:]) < 1:
            raise InputError("--budget", budget, "is no addition", "Write +N with N of at least 1, e.g. +200.")
        more = int(budget[1:])
    if found.state == "cancelled":
        raise InputError("JOB", job, "was cancelled for good", "Start a new job, with warm_start to begin from it.")
    if found.state == "done" and not more:
        raise InputError("JOB", job, "is done", "Extend it with --budget +N.")
    _follow(found, db, json, ray=ray, files=files, accept=accept_changes, evaluations=more)


def cancel(job: JobReference, db: Database = DEFAULT_DB, json: AsJson = False) -> None:
    """End a job for good; what it found stays."""
    found = Job(db, job)
    at_work = found.cancel()
    if json:
        print_json({"id": found.id, "state": found.state, "driver_at_work": at_work})
    elif at_work:
        console.print(f"Job {found.id} is being driven; its driver ends it within seconds.", highlight=False)
    else:
        console.print(f"Job {found.id} is {found.state}.", highlight=False)


def _recipe_spec(
    file: str | None,
    plugins: Sequence[Plugin],
    recipe: str | None,
    budgets: Sequence[str],
    model: str | None,
    data: str | None,
) -> JobSpec:
    """The job of a file, of a recipe, or of a file that a recipe gives its first candidates."""
    for option, given, needs in (("--budget", budgets, recipe), ("--model", model, recipe), ("--data", data, recipe)):
        if given and not needs:
            raise InputError(option, given, "is given without a recipe", "Give --recipe NAME, or leave it out.")
    if recipe is None:
        if file is None:
            raise InputError("JOB.yaml", None, "is missing", "Give a job file, or --recipe with --model and --data.")
        return checked_spec(file, plugins)
    from archfront.search.plugins import load_plugins
    from archfront.search.recipes.seeding import recipe_job, seeded

    if file is not None:
        for option, given in (("--model", model), ("--data", data)):
            if given is not None:
                raise InputError(option, given, "is given beside a job file, which has its own", "Leave one out.")
        return seeded(checked_spec(file, plugins), recipe, budgets)
    load_plugins(plugins)
    for option, given in (("--model", model), ("--data", data)):
        if given is None:
            raise InputError(option, None, "is missing, which a recipe without a job file needs", "Give it.")
    assert model is not None
    assert data is not None
    return recipe_job(recipe, model, data, budgets)


def checked_spec(file: str, plugins: Sequence[Plugin]) -> JobSpec:
    """A job file, read and checked as far as that goes without a ledger; its plug-ins are loaded.

    Raises:
        InputError: the job cannot work.
    """
    from archfront.search.job import read_spec
    from archfront.search.plugins import load_plugins
    from archfront.search.resolve import resolve

    load_plugins(plugins)
    spec = read_spec(file)
    resolve(spec)
    return spec


def follow(
    job: Job,
    db: str,
    shown: Console,
    *,
    ray: str | None = None,
    files: str | None = None,
    accept: bool = False,
    more: int = 0,
) -> str:
    """Drive a job to its end, with its progress on a console. Returns why it ended.

    Raises:
        typer.Exit: it was interrupted; says how to go on.
    """
    from archfront.cli.display import RunDisplay
    from archfront.db.queries import job_objectives

    def agree(changed: list[str]) -> bool:
        if accept or not sys.stdin.isatty():
            return accept
        errors.print(f"Job {job.id} was last run by other code:", highlight=False)
        for line in changed:
            errors.print(f"  {line}", highlight=False)
        return typer.confirm("Go on all the same?", err=True)

    with _interruptible() as interrupted, RunDisplay(shown, job.name, job_objectives(job.spec)) as display:
        display.announce(f"job {job.id} in {without_password(db)}")
        reason = job.resume(
            evaluations=more,
            accept_changes=agree,
            ray_address=ray,
            files=files,
            observe=display.observe,
            announce=display.announce,
            stop=interrupted,
        )
    if reason == "stopped":
        errors.print(
            f"Interrupted; nothing is lost. Go on with: archfront resume {job.id} --db {without_password(db)}",
            highlight=False,
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    return reason


def _follow(
    job: Job, db: str, as_json: bool, *, ray: str | None, files: str | None, accept: bool, evaluations: int = 0
) -> None:
    reason = follow(job, db, errors if as_json else console, ray=ray, files=files, accept=accept, more=evaluations)
    if as_json:
        print_json(job.status() | {"ended": reason})
    if not as_json:
        status = job.status()
        done, failed = status["evaluations"]["done"], status["evaluations"]["failed"]
        why = f" (why: archfront status {job.id} --db {without_password(db)})" if failed else ""
        console.print(
            f"Job {job.id} is {job.state}: {status['reason']}; {done} evaluations done, {failed} failed{why}, "
            f"{status['front']} on the front. See it with: archfront front {job.id} --db {without_password(db)}",
            highlight=False,
            soft_wrap=True,
        )
    raise typer.Exit(EXIT_DONE)


class _Interrupt:
    """Set by the first SIGINT or SIGTERM; the second ends the process the hard way (which loses nothing either)."""

    def __init__(self) -> None:
        self._requested = False

    def __call__(self) -> bool:
        return self._requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        errors.print("Stopping after this step; once more to stop at once. Nothing is lost.", highlight=False)


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = {number: signal.signal(number, interrupt.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
