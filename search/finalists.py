"""Finalists: front members spread over the front, trained longer, then measured on the device.

Each step's result is a row of ``benchmarks``, committed when it is there; a run that was killed goes on behind the
last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from archfront.db.expressions import Condition
from archfront.db.ledger import Ledger
from archfront.db.queries import FrontQuery, find_evaluation, front, job_objectives
from archfront.evaluators.evaluator import Task
from archfront.evaluators.latency.device import LOCAL_CPU
from archfront.evaluators.latency.evaluator import Latency
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.job import COMPILED_BACKENDS, FLOAT_BACKENDS, Finalists
from archfront.search.resolve import ResolvedJob, check_backends
from archfront.spaces.policies.policy_chain import has_policies

_MEASURE_S = 900.0


def choose(rows: list[dict[str, Any]], objectives: list[tuple[str, str]], count: int) -> list[dict[str, Any]]:
    """Members spread over a front: the best in the first objective, then always the one farthest from those chosen
    (in objectives scaled to the front's extent). In the order of their choice."""
    if not rows:
        return []
    signs = [-1.0 if direction == "max" else 1.0 for _, direction in objectives]
    points = np.array([[s * row["metrics"][n] for s, (n, _) in zip(signs, objectives, strict=True)] for row in rows])
    extent = points.max(axis=0) - points.min(axis=0)
    scaled = (points - points.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    chosen = [int(np.lexsort((*points.T[:0:-1], points[:, 0]))[0])]
    distance = np.linalg.norm(scaled - scaled[chosen[0]], axis=1)
    while len(chosen) < min(count, len(rows)) and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
    return [rows[i] for i in chosen]


def run_finalists(
    ledger: Ledger,
    job_id: int,
    run_id: int,
    job: ResolvedJob,
    executor: Executor,
    *,
    plan: Finalists,
    candidates: Sequence[str] = (),
    announce: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    """Train and measure what is not trained and measured yet. Returns whether it came to its end.

    Args:
        plan: the job's own, or another.
        candidates: evaluation numbers or beginnings of keys to take in place of the plan's choice.

    Raises:
        InputError: no such candidate, or a backend that the space's candidates cannot run on.
    """
    check_backends(plan, job.space)
    finalists = _named(ledger, job_id, candidates) if candidates else _chosen(ledger, job_id, plan)
    if not finalists:
        announce("no front member holds the conditions for finalists")
        return True
    if plan.epochs is not None and not _train(
        ledger, job_id, run_id, job, executor, plan.epochs, finalists, announce, stop
    ):
        return False
    # Nothing else of ours may run on the device while it is measured.
    executor.rest()
    return _measure(ledger, job_id, run_id, job, executor, plan, finalists, announce, stop)


def _named(ledger: Ledger, job_id: int, candidates: Sequence[str]) -> list[dict[str, Any]]:
    with ledger.engine.connect() as connection:
        found = [find_evaluation(connection, job_id, candidate) for candidate in candidates]
    return list({row["evaluation"]: row for row in found}.values())


def _chosen(ledger: Ledger, job_id: int, plan: Finalists) -> list[dict[str, Any]]:
    with ledger.engine.connect() as connection:
        members = front(connection, job_id, FrontQuery())
    if plan.where is not None and members:
        names = sorted({name for row in members for name in row["metrics"]})
        columns = {n: np.array([row["metrics"].get(n, math.nan) for row in members], dtype=float) for n in names}
        mask = Condition(plan.where, names, "finalists.where").mask(columns)
        members = [row for row, holds in zip(members, mask, strict=True) if holds]
    return choose(members, job_objectives(ledger.job(job_id)["spec"]), plan.count)


def _train(
    ledger: Ledger,
    job_id: int,
    run_id: int,
    job: ResolvedJob,
    executor: Executor,
    epochs: int,
    finalists: list[dict[str, Any]],
    announce: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    settings = {"epochs": epochs}
    waiting = [row for row in finalists if not _is_there(ledger, job_id, row, "training", settings)]
    under_way: dict[int, dict[str, Any]] = {}
    tried: dict[int, int] = {}
    top = max(job.fidelities)
    limit_s = job.spec.workers.timeout_s * max(1.0, epochs / max(top, 1))
    if waiting:
        announce(f"training {len(waiting)} finalists for {epochs} epochs")
    while waiting or under_way:
        while waiting and len(under_way) < executor.slots:
            row = waiting.pop(0)
            under_way[row["evaluation"]] = row
            executor.submit(row["evaluation"], [_final_task(job, row, epochs)], limit_s)
        if stop():
            return False
        for result in executor.wait(0.25):
            row = under_way.pop(result.batch)
            if result.lost:
                waiting.append(row)  # nobody's fault, as in the search
                continue
            content = _trained(result)
            tried[result.batch] = tried.get(result.batch, 0) + 1
            if "error" in content and tried[result.batch] < job.spec.workers.attempts:
                announce(f"finalist {row['key'][:8]}, attempt {tried[result.batch]}: {_words(content)}")
                waiting.append(row)
                continue
            ledger.store_benchmark(job_id, run_id, row["evaluation"], "training", settings, content, None)
            announce(f"finalist {row['key'][:8]} trained: {_words(content)}")
    return True


def _trained(result: BatchResult) -> dict[str, Any]:
    """What a finalist's training gave, or why it gave nothing."""
    outcome = result.outcomes[0] if result.outcomes else None
    if outcome is not None and outcome.metrics is not None:
        values = {name: metric.value for name, metric in outcome.metrics.items()}
        return _finite(values | {"checkpoint": outcome.checkpoint, "duration_s": outcome.duration_s})
    failure = result.death if outcome is None else outcome.failure
    return {"error": "it gave no result" if failure is None else failure.message}


def _measure(
    ledger: Ledger,
    job_id: int,
    run_id: int,
    job: ResolvedJob,
    executor: Executor,
    plan: Finalists,
    finalists: list[dict[str, Any]],
    announce: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    name, threads, latency_device = _measuring(job)
    device = plan.device or latency_device
    # Rows that name no device are the processor's, as all once were.
    place = {} if device == LOCAL_CPU else {"device": device}
    policies = has_policies(job.space)
    # What the network itself runs on, to compare with the fastest of them.
    floats = [backend for backend in plan.backends if backend in FLOAT_BACKENDS] if policies else []
    for batch in plan.batches:
        missing = [
            (row, settings)
            for backend in plan.backends
            for row in (finalists[: plan.compiled] if backend in COMPILED_BACKENDS else finalists)
            if not _is_there(
                ledger,
                job_id,
                row,
                "latency",
                settings := {"backend": backend, "batch": batch, "threads": threads, **place},
            )
        ]
        if not missing:
            continue
        if stop():
            return False
        backends = list(dict.fromkeys(str(settings["backend"]) for _, settings in missing))
        count = len({row["evaluation"] for row, _ in missing})
        announce(f"measuring {count} finalists: {', '.join(backends)}, batch {batch}, {threads} threads, {device}")
        items: list[dict[str, Any]] = [
            {"genotype": row["genotype"], "batch": batch, "backend": settings["backend"]} for row, settings in missing
        ]
        items += [{"untouched": True, "batch": batch, "backend": backend} for backend in floats]
        # Measured together, interleaved: so a slow spell of the machine meets all finalists and backends alike.
        limit_s = _MEASURE_S * len(backends)
        request = {"items": items, "threads": threads, "timeout_s": limit_s, "device": device}
        timings, environment = executor.call(name, "measure", request, 2 * limit_s)
        baseline = _fastest(floats, timings[len(missing) :])
        for (row, settings), timing in zip(missing, timings[: len(missing)], strict=True):
            content = _finite(timing) | {"environment": environment}
            if baseline is not None:
                content["baseline"] = baseline
            ledger.store_benchmark(
                job_id, run_id, row["evaluation"], "latency", settings, content, environment["device"]
            )
            announce(f"finalist {row['key'][:8]}, {settings['backend']}: {_timing_words(content)}")
    return True


def _measuring(job: ResolvedJob) -> tuple[str, int, str]:
    """On whose worker finalists are measured, with how many threads, on which device: as the job's latency is, if it
    has one."""
    from archfront.evaluators.compression.evaluator import Compression  # loads much that most jobs never need

    latency = next(((n, e) for n, e in job.evaluators if isinstance(e, Latency)), None)
    threads, device = (1, LOCAL_CPU) if latency is None else (latency[1].threads, latency[1].device)
    makers = [n for n, e in job.evaluators if isinstance(e, Compression)]
    if makers:  # who makes networks of policies
        return makers[0], threads, device
    return (job.evaluators[0][0] if latency is None else latency[0]), threads, device


def _fastest(backends: Sequence[str], timings: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of the network itself: the backend that was fastest, and its median; None if it was not measured."""
    found = [(t["median_ms"], b) for b, t in zip(backends, timings, strict=True) if t["error"] is None]
    return dict(zip(("median_ms", "backend"), min(found), strict=True)) if found else None


def _timing_words(content: Mapping[str, Any]) -> str:
    if content["error"]:
        return str(content["error"])
    words = f"{content['median_ms']:.3f} ms [{content['low_ms']:.3f}, {content['high_ms']:.3f}]"
    if content.get("baseline"):
        ratio = content["baseline"]["median_ms"] / content["median_ms"]
        words += f", {ratio:.2f} times as fast as the network itself ({content['baseline']['backend']})"
    if "test_accuracy_drop" in content:
        words += f", {content['test_accuracy_drop']:.2f} points lost on test data"
    return words


def _final_task(job: ResolvedJob, row: Mapping[str, Any], epochs: int) -> Task:
    return Task(
        number=row["evaluation"],
        genotype=row["genotype"],
        key=row["key"],
        fidelity=epochs,
        repeat=row["repeat"],
        seed=job.task_seed(row["key"], row["repeat"]),
        final=True,
    )


def _is_there(ledger: Ledger, job_id: int, row: Mapping[str, Any], kind: str, settings: Mapping[str, Any]) -> bool:
    mine = [b for b in ledger.benchmarks(job_id) if b["number"] == row["evaluation"] and b["kind"] == kind]
    return any(b["settings"] == settings and not b["content"].get("error") for b in mine)


def _finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what could not be measured is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}


def _words(content: Mapping[str, Any]) -> str:
    if "error" in content:
        return f"failed: {content['error']}"
    shown = [f"{name} {content[name]:.2f}" for name in ("accuracy", "test_accuracy") if name in content]
    return ", ".join(shown) or "done"
