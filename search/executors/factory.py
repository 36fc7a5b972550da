"""The executor that a job asks for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from archfront.search.executors.executor import Executor
from archfront.search.executors.inline import InlineExecutor
from archfront.search.executors.process import ProcessExecutor
from archfront.search.executors.ray import PATIENCE_S, RayExecutor
from archfront.search.executors.ray_hub import RayHub
from archfront.search.executors.ray_options import PoolOptions
from archfront.search.executors.staged import StagedExecutor
from archfront.search.job import JobSpec, WorkerNeeds
from archfront.search.resolve import resolve
from archfront.search.tune.executor import TuneExecutor
from archfront.search.tune.options import TuneOptions
from archfront.search.worker import WorkerSetup


@contextmanager
def made_executor(
    spec: JobSpec,
    setup: WorkerSetup,
    *,
    hub: RayHub | None = None,
    ray_address: str | None = None,
    announce: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    apart: bool = False,
) -> Iterator[Executor]:
    """An executor, closed at the end of the block.

    Args:
        hub: a way to Ray that is there already and stays; jobs on it wait for Ray for ever. One of this job's own, at
            ``ray_address`` or the environment's RAY_ADDRESS, if None.
        announce: called with a line on what the workers wait for.
        stop: polled while something waits for a worker outside of the search itself; true raises ``StoppedError``.
        apart: never in this process, which serves other jobs too: ``inline`` becomes one child process.
    """
    workers = spec.workers
    setup.threads = threads_of(workers)
    if workers.executor == "inline" and not apart:
        yield InlineExecutor(setup)
        return
    with ExitStack() as held:
        if workers.executor in ("process", "inline"):
            slots = workers.count if workers.executor == "process" else InlineExecutor.slots
            process = ProcessExecutor(setup, slots=slots, threads=setup.threads, memory_mb=workers.memory_mb)
            yield held.enter_context(closing(process))
            return
        if spec.engine == "tune":
            address = hub.address if hub is not None else ray_address or os.environ.get("RAY_ADDRESS")
            options = _tune_options(spec, address)
            patience = PATIENCE_S if hub is None else None
            tuned = TuneExecutor(options, setup, announce=announce, stop=stop, patience_s=patience)
            yield held.enter_context(closing(tuned))
            return
        kinds = _kinds(spec)
        patience_s = PATIENCE_S if hub is None else None
        if hub is None:
            cores = math.ceil(sum(needs.count * needs.cpus for needs, _ in kinds))
            hub = held.enter_context(closing(RayHub(ray_address or os.environ.get("RAY_ADDRESS"), cores)))
        stages: list[tuple[Executor, Collection[str]]] = []
        for needs, names in kinds:
            mine = setup if len(kinds) == 1 else replace(setup, evaluators=names, threads=threads_of(needs))
            executor = RayExecutor(hub, mine, _options(needs), announce=announce, stop=stop, patience_s=patience_s)
            stages.append((held.enter_context(closing(executor)), names))
        yield stages[0][0] if len(stages) == 1 else StagedExecutor(stages)


def threads_of(needs: WorkerNeeds) -> int:
    """Threads of an evaluation."""
    return max(1, int(needs.cpus))


def _kinds(spec: JobSpec) -> list[tuple[WorkerNeeds, list[str]]]:
    """What workers take, with the evaluators that they run, in the order in which those first appear."""
    kinds: dict[str | None, tuple[WorkerNeeds, list[str]]] = {}
    for evaluator in spec.evaluators:
        name = str(evaluator["name"])
        kind = spec.workers.class_of(name)
        kinds.setdefault(kind, (spec.workers.needs_of(name), []))[1].append(name)
    return list(kinds.values())


def _tune_options(spec: JobSpec, address: str | None) -> TuneOptions:
    # Importing Tune takes a second, which other jobs need not spend.
    from archfront.search.tune.schedulers import scheduler_settings

    job = resolve(spec)
    objectives = [(o.metric, o.direction) for o in spec.objectives]
    scheduler = scheduler_settings(spec.tune.scheduler, objectives, job.fidelities)
    cores = math.ceil(spec.workers.count * spec.workers.cpus)
    return TuneOptions(
        address=address,
        local_cpus=max(os.cpu_count() or 1, cores),
        pool=_options(spec.workers),
        scheduler=scheduler,
        objectives=job.signs,
        metric=scheduler.get("metric"),
        needed=sorted({o.metric for o in spec.objectives} | {c.metric for c in job.constraints}),
        fidelities=job.fidelities,
        seed=spec.seed,
    )


def _options(needs: WorkerNeeds) -> PoolOptions:
    return PoolOptions(
        slots=needs.count,
        cpus=needs.cpus,
        gpus=needs.gpus,
        memory_mb=needs.memory_mb,
        resources=needs.resources,
        device=needs.device,
    )
