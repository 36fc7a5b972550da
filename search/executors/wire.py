"""Batches on their way to a worker and back, as bytes: made and read at the two ends alone, so that the processes in
between (Ray's actors, the gateway) pass them on unread; and as tuples, which cost a third of the objects."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from archfront.evaluators.evaluator import Metric, Task
from archfront.search.worker import Outcome


def pack_tasks(tasks: Sequence[Task]) -> bytes:
    # Pickle writes what tasks share once: a batch carries each version that it needs a single time.
    rows = [(t.number, t.genotype, t.key, t.fidelity, t.repeat, t.seed, t.final, t.learned) for t in tasks]
    return pickle.dumps(rows, 5)


def unpack_tasks(packed: bytes) -> list[Task]:
    return [
        Task(
            number=number, genotype=genotype, key=key, fidelity=fidelity, repeat=repeat, seed=seed, final=final,
            learned=learned,
        )
        for number, genotype, key, fidelity, repeat, seed, final, learned in pickle.loads(packed)
    ]  # fmt: skip


def pack_outcomes(outcomes: Sequence[Outcome]) -> bytes:
    rows = []
    for o in outcomes:
        metrics = o.metrics
        if metrics is not None:
            found = {n: (m.value, m.provenance, m.std, m.predictor, m.device) for n, m in metrics.items()}
        rows.append((o.number, None if metrics is None else found, o.failure, o.started_at, o.duration_s, o.checkpoint))
    return pickle.dumps(rows, 5)


def unpack_outcomes(packed: bytes) -> list[Outcome]:
    return [
        Outcome(
            number=number,
            metrics=None if metrics is None else {name: Metric(*fields) for name, fields in metrics.items()},
            failure=failure,
            started_at=started_at,
            duration_s=duration_s,
            checkpoint=checkpoint,
        )
        for number, metrics, failure, started_at, duration_s, checkpoint in pickle.loads(packed)
    ]
