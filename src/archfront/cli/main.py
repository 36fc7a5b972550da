"""The entry point ``archfront``: commands by name, errors as one clear message and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import click
import typer

from archfront import __version__
from archfront.cli import (
    benching,
    catalog,
    cluster,
    database,
    importing,
    keeping,
    optimising,
    profiling,
    reading,
    running,
)
from archfront.cli.common import EXIT_INPUT, EXIT_INTERRUPTED, errors, print_json
from archfront.errors import ArchfrontError

app = typer.Typer(
    help="Neural architecture and compression-policy search: measured Pareto fronts, nothing lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    running.run,
    running.resume,
    running.cancel,
    cluster.submit,
    cluster.controller,
    cluster.controllers,
    cluster.supervise,
    reading.jobs,
    reading.status,
    reading.front,
    benching.bench,
    optimising.optimize,
    keeping.export,
    keeping.report,
    keeping.gc,
    profiling.profile,
    catalog.spaces,
    catalog.evaluators,
    catalog.strategies,
    catalog.schema,
    catalog.validate,
):
    app.command()(command)
app.add_typer(importing.app, name="import", help="Bring in what another tool found.")
app.add_typer(database.app, name="db", help="A ledger as a whole: its schema, its soundness, its move.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"archfront {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of archfront itself."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 2 bad input, 3 the job failed, 130 interrupted.
    """
    try:
        code = app(standalone_mode=False)
    except ArchfrontError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort, typer.Abort):
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`archfront front | head`): not an error, but Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'A file'}: {error.strerror or error}", EXIT_INPUT)
    except Exception as error:
        # Typer carries a copy of click with exceptions of its own; a wrong option or argument comes as one of either.
        words = getattr(error, "format_message", None)
        if words is None:
            raise
        _fail(str(words()), EXIT_INPUT)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    if "--json" in sys.argv:
        print_json({"error": message, "exit_code": code})
    else:
        errors.print(f"[bold red]error[/bold red] {_escaped(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
