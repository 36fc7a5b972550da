"""How many workers can one driver keep busy? Synthetic workers, no real work, one evaluation in a batch as in training.

1. The driver, in real time: real engine, ledger, hub and pipe; behind the pipe a process with N virtual workers whose
   evaluations take as long as said. Measured: how long workers stand idle between two evaluations.
2. The gateway's own code: its pool with actors that answer at once, at N slots.
3. Ray itself: the real gateway with some dozens of real actors that sleep: CPU of the gateway for each evaluation.

    python benchmarks/scale.py [--quick] [--seconds 8] [--actors 32] [--postgres URL] [--only sqlite]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from databases import databases
from machine import Window, cell, machine, show, write_json
from noop_job import PLUGIN, noop_job
from scale_plot import draw

HERE = Path(__file__).parent
_LENGTHS = (1, 10, 60)

_ENOUGH = 20
"""Evaluations that must have begun in a measurement for its idle times to mean something."""


def run_driver(
    url: str, gateway: str, workers: int, length_s: float, seconds: float, wanted: int | None = None
) -> dict[str, Any]:
    """Drive a job on a stand-in gateway for some seconds, from when all workers are busy; what the driver used.

    Args:
        wanted: results to wait for first, so that start-up is over; one a worker by default, if they are short.
    """
    from archfront.db.ledger import Ledger
    from archfront.plugins import read_plugins
    from archfront.search.driver import DriveOptions, drive, submit
    from archfront.search.executors import ray_hub

    window = Window()
    gateway_cpu: list[float] = []
    stop_at = [float("inf")]
    if wanted is None:
        wanted = workers if length_s < seconds / 2 else 0

    def observe(progress: Any) -> None:
        if not window.is_open and progress.running >= 0.5 * workers and progress.finished >= wanted:
            window.open(progress.finished)
            gateway_cpu.append(_children_cpu(gateway))
            stop_at[0] = time.monotonic() + seconds
        elif window.is_open:
            window.close(progress.finished)

    def stop() -> bool:
        over = time.monotonic() > stop_at[0]
        if over and len(gateway_cpu) == 1:
            window.close(max(window.finished, 0) + window.begun)
            gateway_cpu.append(_children_cpu(gateway))
        return over

    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        os.environ["ARCHFRONT_BENCH_SECONDS"], os.environ["ARCHFRONT_BENCH_FILE"] = str(length_s), str(notes)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        ledger = Ledger.open(url)
        with closing(ledger), patch.object(ray_hub, "_GATEWAY", gateway), closing(ray_hub.RayHub(None)) as hub:
            job = noop_job(10**8, {"name": "nsga2", "population": 50}, "ray", workers, evaluator="single")
            job["workers"] |= {"cpus": 0.001, "timeout_s": 10**6}
            sources = read_plugins([PLUGIN])
            while not hub.ready:
                time.sleep(0.1)
            began = time.monotonic()
            driving = DriveOptions(plugins=sources, hub=hub, observe=observe, stop=stop)
            drive(ledger, submit(ledger, job, sources), driving)
        idle = json.loads(notes.read_text())["idle"] if notes.exists() else []
    begun_at = stop_at[0] - seconds
    within = [waited for at, waited in idle if begun_at <= at <= stop_at[0]]
    row: dict[str, Any] = {
        "workers": workers,
        "length_s": length_s,
        "evaluations": window.finished,
        "per_second": window.per_second,
    }
    row |= {"driver_ms": window.cpu_ms, "driver_busy": window.cpu_s / max(window.wall_s, 1e-9)}
    row |= {"idle_ms": statistics.fmean(within) * 1e3 if len(within) >= _ENOUGH else None, "begun": len(within)}
    row |= {"gateway_ms": (gateway_cpu[-1] - gateway_cpu[0]) / max(window.finished, 1) * 1e3}
    return row | {"start_s": begun_at - began}


def _children_cpu(gateway: str) -> float:
    """CPU seconds of the gateway process."""
    total = 0.0
    for child in psutil.Process().children():
        if gateway in " ".join(child.cmdline()):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def utilised(rows: list[dict[str, Any]]) -> None:
    """Add to each row the part of their time that workers were busy.

    Where too few evaluations began to say, the idle time of the next shorter length serves: it can only be longer, for
    the driver had more to do.
    """
    known: dict[int, float] = {}
    for row in rows:
        if row["idle_ms"] is None:
            row["inferred"] = True
            row["idle_ms"] = known.get(row["workers"])
        else:
            known[row["workers"]] = row["idle_ms"]
        if row["idle_ms"] is not None:
            row["utilisation"] = row["length_s"] / (row["length_s"] + row["idle_ms"] / 1e3)


def pool_cost(slots: int, evaluations: int) -> dict[str, Any]:
    """CPU of the gateway's own code for each evaluation, with actors that answer at once."""
    import ray

    from archfront.search.executors import ray_pool
    from archfront.search.executors.ray_options import PoolOptions

    class Answer:
        def __init__(self, value: Any) -> None:
            self._value = value

        def future(self) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(self._value)
            return done

    class Method:
        def __init__(self, value: Any) -> None:
            self._value = value

        def remote(self, *_: Any) -> Answer:
            return Answer(self._value)

    class Actor:
        hello = Method({"host": "here", "node": "here", "code": {}})
        evaluate_packed = Method(b"outcomes")

    waiting: list[Any] = []
    options, ended = PoolOptions(slots=slots), list[Any]()
    with ExitStack() as held:
        for target, name, value in (
            (ray_pool, "differences", lambda *_: []),
            (ray_pool.Pool, "_actor", lambda *_: Actor()),
            (ray, "put", lambda value: value),
            (ray, "kill", lambda _: None),
        ):
            held.enter_context(patch.object(target, name, value))
        pool = ray_pool.Pool(options, {}, lambda _, result: ended.append(result), lambda *one: waiting.append(one))
        pool.start(b"")
        pool.resize(slots)
        for then, future in waiting:
            then(future)
        waiting.clear()
        for batch in range(slots):
            pool.evaluate(batch, b"", 1.0)
        start = time.process_time()
        for batch in range(slots, slots + evaluations):
            then, future = waiting[batch - slots]
            then(future)
            pool.evaluate(batch, b"", 1.0)
        spent = time.process_time() - start
        start = time.process_time()
        pool.tick(time.monotonic(), 1.0)
        pool.resize(slots)
        tick = time.process_time() - start
    return {"workers": slots, "pool_ms": spent / evaluations * 1e3, "tick_ms": tick * 1e3}


def summary(found: dict[str, list[dict[str, Any]]], ray_row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What one driver can do at most: evaluations a second by CPU of the driver and of the gateway."""
    rows = []
    for kind, measured in found.items():
        # Where the driver had no rest its rate is the most that it can do.
        most = max(row["per_second"] for row in measured)
        rows.append({"what": f"driver on {kind}", "per_second": most})
    if ray_row is not None:
        rows.append({"what": "gateway to Ray (1 / CPU)", "per_second": 1e3 / ray_row["gateway_ms"]})
    for row in rows:
        row["workers"] = {length: int(row["per_second"] * length) for length in _LENGTHS}
    return rows


def report(
    found: dict[str, list[dict[str, Any]]],
    pools: list[dict[str, Any]],
    ray_row: dict[str, Any] | None,
    most: list[dict[str, Any]],
) -> None:
    columns: tuple[str, ...] = ("workers", "length_s", "per_second", "driver_busy", "driver_ms", "idle_ms")
    titles: tuple[str, ...] = ("workers", "evaluation s", "per second", "driver CPU", "CPU ms each", "idle ms each")
    for kind, rows in found.items():
        shown = [[*(row[c] for c in columns), _percent(row)] for row in rows]
        show(f"One driver, {kind}", (*titles, "utilisation"), shown)
    show("The gateway's own code", ("slots", "CPU ms each", "tick ms"), [list(row.values()) for row in pools])
    if ray_row is not None:
        titles = ("real actors", "per second", "gateway CPU ms each", "driver CPU ms each")
        columns = ("workers", "per_second", "gateway_ms", "driver_ms")
        show("Ray", titles, [[ray_row[c] for c in columns]])
    titles = ("at most", "per second", *(f"workers at {s} s" for s in _LENGTHS))
    show("What one driver bears", titles, [[r["what"], r["per_second"], *r["workers"].values()] for r in most])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--workers", default="10,100,1000,10000")
    parser.add_argument("--lengths", default="0.1,1,10,60,600,3600", help="of evaluations, in seconds")
    parser.add_argument("--actors", type=int, default=32, help="real ones, on Ray; 0 for none")
    parser.add_argument("--postgres", metavar="URL", help="a server to use; an embedded one by default")
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--quick", action="store_true", help="two small measurements: a smoke test")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--png", type=Path, default=HERE.parent / "docs" / "scale.png")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    counts, lengths = [int(n) for n in options.workers.split(",")], [float(s) for s in options.lengths.split(",")]
    seconds, actors = options.seconds, options.actors
    if options.quick:
        counts, lengths, seconds, actors = [10, 100], [0.2, 60.0], 1.0, 0
    facts = machine()
    found: dict[str, list[dict[str, Any]]] = {}
    ray_row = None
    with databases(options.postgres, sqlite_only=options.only == "sqlite") as made:
        for kind in (kind for kind in made.kinds if options.only in (None, kind)):
            rows = found[kind] = []
            for workers in counts:
                for length in lengths:
                    with made.fresh(kind) as url:
                        rows.append(run_driver(url, "virtual_gateway", workers, length, seconds))
                    print(kind, " ".join(f"{name} {cell(value)}" for name, value in rows[-1].items()), flush=True)
            utilised(rows)
        if actors:
            with made.fresh("sqlite") as url:
                # Ray takes a while to bring them all up.
                ray_row = run_driver(url, "sleeping_gateway", actors, 0.02, seconds, wanted=200 * actors)
    pool_cost(10, 100)  # the first call pays for imports
    pools = [pool_cost(slots, 2_000) for slots in counts]
    report(found, pools, ray_row, most := summary(found, ray_row))
    draw(options.png, found)
    write_json(options.json, facts, driver=found, pool=pools, ray=ray_row, most=most)


def _percent(row: dict[str, Any]) -> str:
    if "utilisation" not in row:
        return ""
    return f"{row['utilisation']:.1%}" + (" (inferred)" if row.get("inferred") else "")


if __name__ == "__main__":
    main()
