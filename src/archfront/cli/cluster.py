"""Commands of a cluster: submit, controller, controllers, supervise."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import typer
from rich.table import Table

from archfront.cli.common import EXIT_FAILED, AsJson, Database, PluginFiles, console, print_json
from archfront.cli.running import Files, checked_spec
from archfront.client import DEFAULT_DB
from archfront.db.connection import without_password
from archfront.errors import InputError


def submit(
    file: Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    db: Database = DEFAULT_DB,
    files: Files = None,
    plugin: PluginFiles = None,
    json: AsJson = False,
) -> None:
    """Queue a job for a controller; see `archfront controller`.

    Plug-in files serve to check the job here. They do not travel: a controller runs those that its operator gave it.
    """
    from archfront.db.ledger import Ledger
    from archfront.plugins import read_plugins
    from archfront.search import driver

    plugins = read_plugins(plugin or [])
    # Before the ledger is opened: a bad file leaves none behind.
    spec = checked_spec(file, plugins)
    job_id = driver.submit(Ledger.open(db), spec, plugins, managed=True, files=files)
    if json:
        print_json({"id": job_id, "state": "queued"})
    else:
        console.print(
            f"Job {job_id} is queued. Watch it with: archfront status {job_id} --db {without_password(db)}",
            highlight=False,
        )


def controller(
    db: Database = DEFAULT_DB,
    ray: Annotated[str | None, typer.Option(help="Address of the Ray cluster; one of its own if not set.")] = None,
    join: Annotated[
        bool, typer.Option(help="This host has no part in the cluster yet: join it, without lending it any cores.")
    ] = False,
    files: Files = None,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs that it drives at most at the same time.")] = 8,
    plugin: PluginFiles = None,
) -> None:
    """Drive queued jobs, and those whose driver died, until stopped. Several controllers may run."""
    from archfront.db.ledger import Ledger
    from archfront.plugins import read_plugins
    from archfront.search.controller import Controller, ControllerOptions

    if join and ray is None:
        raise InputError("--join", True, "needs a cluster to join", "Give its address with --ray.")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    options = ControllerOptions(
        ray_address=ray, files=files, jobs=jobs, plugins=read_plugins(plugin or []), log=_log, stop=ended.is_set
    )
    with ExitStack() as held:
        if join:
            held.enter_context(_joined(str(ray)))
        Controller(Ledger.open(db), options).run()


def controllers(
    db: Database = DEFAULT_DB,
    check: Annotated[bool, typer.Option(help="Exit with 3 unless a controller of this host is alive.")] = False,
    json: AsJson = False,
) -> None:
    """List controllers, and the jobs that they drive."""
    import socket

    from archfront.db.controllers import controller_rows
    from archfront.db.ledger import Ledger

    rows = controller_rows(Ledger.open(db, create=False))
    if json:
        print_json(rows)
    else:
        table = Table("id", "host", "pid", "Ray", "state", "last seen", "jobs")
        for row in rows:
            seen = f"{row['silent_s']:.0f} s ago" + ("" if row["alive"] else " (dead?)")
            jobs = ", ".join(map(str, row["jobs"]))
            table.add_row(str(row["id"]), row["host"], str(row["pid"]), row["ray"] or "own", row["state"], seen, jobs)
        console.print(table)
    if check and not any(row["alive"] and row["host"] == socket.gethostname() for row in rows):
        raise typer.Exit(EXIT_FAILED)


def supervise(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to keep running.")],
) -> None:
    """Run a command, and run it again whenever it ends: `archfront supervise -- ray start --address=... --block`."""
    from archfront.search.supervisor import supervise as keep

    raise typer.Exit(keep(command, _log))


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """A supervised Ray node without cores on this host: whoever speaks with a cluster needs one beside him."""
    from archfront.search.executors.child import signal_with_parent

    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=0", "--num-gpus=0"]
    command = [sys.executable, "-m", "archfront", "supervise", "--", *ray, "--block"]
    # It must not stay behind if this process is killed: a host can be part of a cluster once only.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: signal_with_parent(signal.SIGTERM))
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _log(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)
