"""A job of a million evaluations: is it as fast at its end as at its beginning, and as quick to look at and to resume?

One NSGA-II job (22 decisions, four metrics, two objectives) runs through engine and ledger with the inline executor,
which leaves out Ray's workers alone. On SQLite and on PostgreSQL: rate, memory and CPU of the driver in every window
of 100,000 evaluations; then, through `archfront.Job.front`, the stored front, fronts of other metrics under
conditions, and fronts of past moments; then how long a job of 100,000 that was killed takes to go on. Optuna's
`best_trials` beside it at the sizes that it can bear.

    python benchmarks/million.py [--quick] [--evaluations 1000000] [--postgres URL] [--only sqlite]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from databases import Databases, databases, settings, size_bytes
from machine import machine, show, write_json
from noop_job import CHOICES, DECISIONS, objectives
from peers import optuna_storage

PHASES = Path(__file__).with_name("million_phases.py")


def phase(name: str, url: str, *, dies: bool = False, **arguments: Any) -> dict[str, Any]:
    """Run a phase in a fresh process. Returns what it found, nothing if it was to die and did."""
    command = [sys.executable, str(PHASES), name, url, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=not dies)
    if dies:
        assert done.returncode == -signal.SIGKILL, done.returncode
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def archfront(made: Databases, kind: str, evaluations: int, window: int, killed_at: int) -> dict[str, Any]:
    with made.fresh(kind) as url:
        print(f"{kind}: {evaluations:,} evaluations")
        found = phase("fill", url, evaluations=evaluations, window=window, kill=False)
        found["bytes_each"] = size_bytes(url) / evaluations
        found["settings"] = settings(url)
        found["queries"] = phase("queries", url)
        found["resume_all"] = phase("resume", url, more=1000)
    with made.fresh(kind) as url:
        phase("fill", url, dies=True, evaluations=killed_at, window=window, kill=True)
        found["resume_killed"] = phase("resume", url, more=0)
    return found | {"killed_at": killed_at}


def optuna_best_trials(made: Databases, kind: str, trials: int) -> dict[str, Any]:
    """Seconds of ``best_trials`` in a study of so many trials: the first call of a fresh study, and the next one."""
    import optuna

    with made.fresh(kind) as url:
        storage = optuna_storage(url)
        # Only reading is timed here, so that filling need not be durable.
        weak = "PRAGMA synchronous=OFF" if kind == "sqlite" else "SET synchronous_commit=off"

        @sa.event.listens_for(storage.engine, "connect")
        def relax(connection: Any, _record: Any) -> None:
            connection.cursor().execute(weak)

        storage.engine.dispose()
        study = optuna.create_study(storage=storage, directions=["minimize", "minimize"], study_name="peer")
        kinds: dict[str, Any] = {
            f"x{i}": optuna.distributions.CategoricalDistribution(list(range(CHOICES))) for i in range(DECISIONS)
        }
        sampler = optuna.samplers.RandomSampler(seed=0)
        throwaway = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
        for _ in range(trials):
            trial = throwaway.ask(kinds)
            params = dict(trial.params)
            values = objectives(list(params.values()))
            study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, values=values))
        size = size_bytes(url)
        storage.engine.dispose()
        again = optuna_storage(url)
        fresh = optuna.load_study(storage=again, study_name="peer")
        times = []
        for _ in range(2):
            start = time.perf_counter()
            members = len(fresh.best_trials)
            times.append(time.perf_counter() - start)
        again.engine.dispose()
    row = {"kind": kind, "trials": trials, "first_s": times[0], "warm_s": times[1], "members": members}
    return row | {"bytes_each": size / trials}


def report(found: dict[str, dict[str, Any]], peers: list[dict[str, Any]]) -> None:
    for kind, result in found.items():
        columns = ("until", "per_second", "driver_ms", "rss_mb", "front")
        titles: tuple[str, ...] = ("evaluations until", "per second", "driver CPU ms each", "driver RSS MB", "front")
        mean, spread = result["mean_per_second"], result["spread"]
        title = f"{kind}: {mean:,.0f} a second, windows within {spread:.0%}; {result['bytes_each']:,.0f} bytes each"
        show(title, titles, [[f"{row['until']:,}", *(row[c] for c in columns[1:])] for row in result["windows"]])
    heads = ("front", *(f"{kind} {call} ms" for kind in found for call in ("first", "warm")), "members")
    names = next(iter(found.values()))["queries"]
    rows = []
    for i, name in enumerate(names):
        # The past moments are the same evaluations on both databases.
        each = [list(result["queries"].values())[i] for result in found.values()]
        rows.append([name, *(call[c] for call in each for c in ("first_ms", "warm_ms")), each[0]["members"]])
    show("Fronts", heads, rows)
    rows = []
    for kind, result in found.items():
        whole = result["windows"][-1]["until"]
        for count, times in ((result["killed_at"], result["resume_killed"]), (whole, result["resume_all"])):
            rows.append([f"{kind}, {count:,} evaluations", times["dispatch_s"], times["peak_rss_mb"]])
    show("Resume", ("", "first dispatch after s", "peak RSS MB"), rows)
    titles = ("", "first call s", "next call s", "members", "bytes each")
    said = ("first_s", "warm_s", "members", "bytes_each")
    rows = [[f"{peer['kind']}, {peer['trials']:,} trials", *(peer[name] for name in said)] for peer in peers]
    show("Optuna: best_trials", titles, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1_000_000)
    parser.add_argument("--killed-at", type=int, default=100_000, help="evaluations of the job that is killed")
    parser.add_argument("--trials", default="1000,10000", help="of Optuna's studies")
    parser.add_argument("--postgres", metavar="URL", help="a server to use; an embedded one by default")
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--quick", action="store_true", help="some thousand evaluations: a smoke test")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    evaluations, killed_at = options.evaluations, options.killed_at
    trials = [int(count) for count in options.trials.split(",") if count]
    if options.quick:
        evaluations, killed_at, trials = 5_000, 2_000, [50]
    window = max(evaluations // 10, 1)
    facts = machine()
    with databases(options.postgres, sqlite_only=options.only == "sqlite") as made:
        kinds = [kind for kind in made.kinds if options.only in (None, kind)]
        found = {kind: archfront(made, kind, evaluations, window, killed_at) for kind in kinds}
        peers = [optuna_best_trials(made, kind, count) for kind in kinds for count in trials]
    report(found, peers)
    write_json(options.json, facts, archfront=found, optuna=peers)


if __name__ == "__main__":
    main()
