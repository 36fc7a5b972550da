"""Keeping a job's lease while its driver is busy with something long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from archfront.db.connection import now, write
from archfront.db.schema import Lease

LEASE_S = 30.0
"""A driver that has given no sign for so long may be taken over."""

_BEAT_S = LEASE_S / 6


@contextmanager
def kept_lease(engine: Engine, job_id: int, run_id: int) -> Iterator[None]:
    """Prolong a run's lease from a thread of its own, for as long as the block takes.

    A lease that was lost is not taken back: the driver's next commit finds that out (``LeaseLostError``).
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT_S):
            try:
                with write(engine) as connection:
                    mine = (Lease.job_id == job_id) & (Lease.run_id == run_id)
                    connection.execute(sa.update(Lease).where(mine).values(expires_at=now(connection) + LEASE_S))
            except SQLAlchemyError:
                # The database is away for a moment; several beats fit into a lease.
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
