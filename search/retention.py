"""Which checkpoints stay: a job's ``keep`` rule, applied by ``archfront gc``."""

from __future__ import annotations

from typing import Any

import fsspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.db.connection import write
from archfront.db.ledger import Ledger
from archfront.db.queries import FrontQuery, front_numbers
from archfront.db.reuse import borrowed
from archfront.db.schema import Benchmark, Evaluation, Job

_STEP = 500


def collect(db: str, reference: str, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Delete what the jobs' rules do not keep. A job that is being driven is skipped: it may need any of it.

    Args:
        reference: id, name, ``last`` or ``all``.
    """
    ledger = Ledger.open(db, create=False)
    if reference == "all":
        with ledger.engine.connect() as connection:
            ids = list(connection.execute(sa.select(Job.id).order_by(Job.id)).scalars())
    else:
        ids = [ledger.find_job(reference)]
    return [_collect_job(ledger, job_id, dry_run) for job_id in ids]


def _collect_job(ledger: Ledger, job_id: int, dry_run: bool) -> dict[str, Any]:
    keep = ledger.job(job_id)["spec"]["keep"]
    facts: dict[str, Any] = {"job": job_id, "keep": keep, "files": 0, "bytes": 0, "kept": 0, "skipped": None}
    holder = ledger.holder(job_id)
    if holder is not None:
        return facts | {"skipped": f"driven by process {holder['pid']}"}
    with ledger.engine.connect() as connection:
        present = sa.select(Evaluation.number, Evaluation.checkpoint).where(
            Evaluation.job_id == job_id, Evaluation.checkpoint.is_not(None)
        )
        checkpoints = {number: str(uri) for number, uri in connection.execute(present)}
        kept = _kept(connection, job_id, keep, set(checkpoints))
    dropped = {number: uri for number, uri in checkpoints.items() if number not in kept}
    numbers = list(dropped)
    for start in range(0, len(numbers), _STEP):
        chosen = numbers[start : start + _STEP]
        if not dry_run:
            # The ledger first: it may name no file that is gone, while a file that it does not name harms nobody.
            with write(ledger.engine) as connection:
                gone = sa.update(Evaluation).where(Evaluation.job_id == job_id, Evaluation.number.in_(chosen))
                connection.execute(gone.values(checkpoint=None))
        for number in chosen:
            facts["bytes"] += _delete(dropped[number], dry_run)
    return facts | {"files": len(dropped), "kept": len(checkpoints) - len(dropped)}


def _kept(connection: Connection, job_id: int, keep: str, present: set[int]) -> set[int]:
    if keep == "all":
        return present
    if keep == "none":
        return set()
    members = set(front_numbers(connection, job_id, FrontQuery()))
    members |= _kept_for_others(connection, job_id)
    finalists = connection.execute(sa.select(Benchmark.number).where(Benchmark.job_id == job_id)).scalars()
    return members | set(finalists)


def _kept_for_others(connection: Connection, job_id: int) -> set[int]:
    """Origins of the front members of other jobs that took this one's results."""
    users = borrowed(connection, job_id)
    jobs = {job for pairs in users.values() for job, _ in pairs}
    fronts = {job: set(front_numbers(connection, job, FrontQuery())) for job in jobs}
    return {origin for origin, pairs in users.items() if any(number in fronts[job] for job, number in pairs)}


def _delete(uri: str, dry_run: bool) -> int:
    """Delete a file that may be gone already; its size in bytes."""
    system, path = fsspec.core.url_to_fs(uri)
    if not system.exists(path):
        return 0
    size = int(system.size(path) or 0)
    if not dry_run:
        system.rm(path)
    return size
