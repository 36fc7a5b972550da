"""The phases of ``million.py``, each in a process of its own, so that memory and first calls are those of that phase.

Each prints one line of JSON:

    python benchmarks/million_phases.py PHASE URL JSON_ARGUMENTS
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from machine import Window, rss_mb
from noop_job import PLUGIN, noop_job

POPULATION = 250
FIRST = 1_000


def fill(url: str, evaluations: int, window: int, kill: bool) -> dict[str, Any]:
    """Run a job of so many evaluations; rate, memory and CPU in each window of ``window``, from the 1,000th on.

    Args:
        kill: die by SIGKILL at the end instead, with the budget half spent.
    """
    import archfront

    windows: list[dict[str, Any]] = []
    current = Window()
    ends = window

    def observe(progress: Any) -> None:
        nonlocal current, ends
        if not current.is_open:
            if progress.finished >= FIRST:
                current.open(progress.finished)
            return
        if progress.finished >= ends:
            current.close(progress.finished)
            row = {"until": progress.finished, "per_second": current.per_second, "driver_ms": current.cpu_ms}
            windows.append(row | {"rss_mb": rss_mb(), "front": len(progress.front)})
            print(f"  {row['until']:>9,}: {row['per_second']:,.0f} a second", file=sys.stderr, flush=True)
            current = Window()
            current.open(progress.finished)
            ends += window
        if kill and progress.finished >= evaluations:
            os.kill(os.getpid(), signal.SIGKILL)

    strategy = {"name": "nsga2", "population": POPULATION}
    budget = 2 * evaluations if kill else evaluations
    before = rss_mb()
    job = archfront.run(
        noop_job(budget, strategy, "inline", evaluator="four-sums"), db=url, plugins=[PLUGIN], observe=observe
    )
    job.ledger.close()
    rates = [row["per_second"] for row in windows]
    mean = statistics.fmean(rates)
    spread = max(abs(rate / mean - 1) for rate in rates)
    return {"windows": windows, "mean_per_second": mean, "spread": spread, "rss_before_mb": before}


def queries(url: str) -> dict[str, Any]:
    """Milliseconds of every kind of front: the first call of a fresh connection, and the median of five more."""
    import archfront

    job = archfront.Job(url)
    with job.ledger.engine.connect() as connection:
        text = "SELECT max(seq) FROM evaluations"
        last = int(connection.execute(sa.text(text)).scalar_one())
        moments = {
            seq: connection.execute(sa.text("SELECT finished_at FROM evaluations WHERE seq = :s"), {"s": seq}).scalar()
            for seq in (last // 1000, last // 10, last // 2, last - 1)
        }
    job.ledger.close()
    asked: dict[str, dict[str, Any]] = {
        "stored front": {},
        "front of a, b where c and d": {"where": "c <= 330 and d <= 480"},
        "front of c, d where a": {"objectives": ["-c", "-d"], "where": "a <= 480"},
        "front of a, c, d where b": {"objectives": ["-a", "-c", "-d"], "where": "b <= 1600"},
        "front of a, b, c, d where b": {"objectives": ["-a", "-b", "-c", "-d"], "where": "b <= 1600"},
    }
    for seq, moment in moments.items():
        asked[f"--at evaluation {seq:,}"] = {"at": seq}
        asked[f"--at the time of {seq:,}"] = {"at": datetime.fromtimestamp(float(moment or 0), UTC)}
    found: dict[str, Any] = {}
    for name, arguments in asked.items():
        job = archfront.Job(url, plugins=[PLUGIN])
        first, members = timed(lambda job=job, arguments=arguments: len(job.front(**arguments)))  # type: ignore[misc]
        warm = [timed(lambda job=job, arguments=arguments: job.front(**arguments))[0] for _ in range(5)]  # type: ignore[misc]
        found[name] = {"first_ms": first, "warm_ms": statistics.median(warm), "members": members}
        if not arguments:
            # A job on an open ledger that has read none of the members yet.
            new = [timed(lambda job=job: archfront.Job(job.ledger).front())[0] for _ in range(5)]  # type: ignore[misc]
            unread = {"first_ms": new[0], "warm_ms": statistics.median(new), "members": members}
        job.ledger.close()
    found["stored front, no row read before"] = unread
    return found


def resume(url: str, more: int) -> dict[str, float]:
    """Seconds from the start of ``drive`` to the first batch that is sent to a worker, and memory at its most."""
    import archfront
    from archfront.search.executors.inline import InlineExecutor

    sent: list[float] = []
    submit = InlineExecutor.submit

    def first(self: InlineExecutor, *arguments: Any) -> None:
        sent.append(time.perf_counter())
        submit(self, *arguments)

    InlineExecutor.submit = first  # type: ignore[assignment, method-assign]
    job = archfront.Job(url, plugins=[PLUGIN])
    began = time.perf_counter()
    # Whoever changes the code while a long benchmark runs shall not lose it.
    job.resume(evaluations=more, stop=lambda: bool(sent), accept_changes=lambda _: True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"dispatch_s": sent[0] - began, "peak_rss_mb": peak}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds that a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


if __name__ == "__main__":
    phases: dict[str, Callable[..., dict[str, Any]]] = {"fill": fill, "queries": queries, "resume": resume}
    print(json.dumps(phases[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3]))))
