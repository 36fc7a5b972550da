"""Cheap evaluations per second through the whole stack: archfront, Optuna and Ray Tune in one run.

Every candidate has 22 decisions of 9 choices (FBNet's size) and two objectives; evaluating it costs nothing. All run
one after the other, on the same disk and the same PostgreSQL, with durable commits: SQLite in WAL mode with
synchronous=FULL, PostgreSQL with synchronous_commit=on, Optuna's journal file with an fsync for each append; Ray Tune
as it comes, which promises less.

    python benchmarks/throughput.py [--quick] [--evaluations 30000] [--peer-seconds 40] [--postgres URL]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from databases import Databases, databases, settings
from machine import Window, machine, show, write_json
from noop_job import PLUGIN, noop_job
from peers import WORKERS, run_optuna, run_tune

import archfront

POPULATION, LARGE = 50, 250
_WARM_UP = 0.1


def run_archfront(url: str, evaluations: int, strategy: dict[str, Any], executor: str) -> dict[str, Any]:
    """One job; its rate and CPU from the first tenth of its evaluations to the last one."""
    window = Window()

    def observe(progress: Any) -> None:
        if window.is_open:
            window.close(progress.finished)
        elif progress.finished >= _WARM_UP * evaluations:
            window.open(progress.finished)

    start, cpu = time.perf_counter(), time.process_time()
    job = noop_job(evaluations, strategy, executor, WORKERS if executor == "ray" else 1)
    archfront.run(job, db=url, plugins=[PLUGIN], observe=observe).ledger.close()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    # A job of a commit or two has no window.
    rate, each = evaluations / wall, cpu / evaluations * 1e3
    if window.finished > 0.5 * evaluations:
        rate, each = window.per_second, window.cpu_ms
    return {"evaluations": evaluations, "per_second": rate, "driver_ms": each, "wall_s": wall}


def median(made: Databases, kind: str, repeats: int, *arguments: Any) -> dict[str, Any]:
    """The run with the median rate, each on a database of its own."""
    rows = []
    for _ in range(repeats):
        with made.fresh(kind) as url:
            rows.append(run_archfront(url, *arguments))
    rate = statistics.median_low(row["per_second"] for row in rows)
    return next(row for row in rows if row["per_second"] == rate) | {"rates": [row["per_second"] for row in rows]}


def archfront_rows(made: Databases, executors: list[str], evaluations: int, repeats: int) -> list[dict[str, Any]]:
    strategies: list[tuple[str, dict[str, Any]]] = [
        (f"nsga2, population {POPULATION}", {"name": "nsga2", "population": POPULATION}),
        (f"nsga2, population {LARGE}", {"name": "nsga2", "population": LARGE}),
        ("random", {"name": "random"}),
    ]
    rows = []
    for executor in executors:
        for kind in made.kinds:
            for words, strategy in strategies:
                name = f"archfront {words} ({executor}, {kind})"
                rows.append({"name": name} | median(made, kind, repeats, evaluations, strategy, executor))
    few = max(evaluations // 20, 100)
    optuna = {"name": "optuna:nsgaii", "population_size": POPULATION}
    name = f"archfront optuna:nsgaii ({executors[0]}, sqlite)"
    rows.append({"name": name} | median(made, "sqlite", 1, few, optuna, executors[0]))
    return rows


def peer_rows(made: Databases, seconds: float, *, tune: bool) -> list[dict[str, Any]]:
    rows = []
    for kind in made.kinds:
        with made.fresh(kind) as url:
            rows.append(run_optuna(kind, url, POPULATION, seconds))
    rows.append(run_optuna("journal file", f"journal:{made.folder}/optuna.journal", POPULATION, seconds))
    for reuse in (False, True) if tune else ():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_tune(Path(folder), POPULATION, seconds, reuse))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=30_000)
    parser.add_argument("--peer-seconds", type=float, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="of archfront's runs; the median is reported")
    parser.add_argument("--postgres", metavar="URL", help="a server to use; an embedded one by default")
    parser.add_argument("--executors", default="ray,inline")
    parser.add_argument("--no-tune", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few evaluations inline, seconds of peers: a smoke test")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    n, repeats, seconds = options.evaluations, options.repeats, options.peer_seconds
    executors, tune = options.executors.split(","), not options.no_tune
    if options.quick:
        n, repeats, seconds, executors, tune = 600, 1, 1.0, ["inline"], False
    facts = machine()
    with databases(options.postgres) as made:
        used = {}
        for kind in made.kinds:
            with made.fresh(kind) as url:
                used[kind] = settings(url)
        rows = archfront_rows(made, executors, n, repeats) + peer_rows(made, seconds, tune=tune)
    best = max(row["per_second"] for row in rows if not row["name"].startswith("archfront"))
    for row in rows:
        row["ratio"] = row["per_second"] / best
    columns = ("evaluations", "per_second", "driver_ms", "ratio", "wall_s")
    titles = ("", "evaluations", "per second", "driver CPU ms each", "times the best peer", "whole run, s")
    show("Throughput", titles, [[row["name"], *(row.get(column) for column in columns)] for row in rows])
    write_json(options.json, facts, databases=used, rows=rows)


if __name__ == "__main__":
    main()
