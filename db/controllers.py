"""Who drives jobs on nobody's order: controllers, their signs of life, and their parts of a cluster."""

from __future__ import annotations

import os
import socket
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archfront.db.connection import now
from archfront.db.ledger import Ledger
from archfront.db.schema import Controller, Lease, Run

FRESH_S = 30.0
"""A controller that was seen within so many seconds is taken for alive."""


def enter_controller(ledger: Ledger, ray: str | None) -> int:
    """Note this process as a controller. Returns its id."""

    def step(connection: Connection) -> int:
        moment = now(connection)
        row = {"host": socket.gethostname(), "pid": os.getpid(), "ray": ray, "state": "starting"}
        row |= {"started_at": moment, "seen_at": moment}
        return int(connection.execute(sa.insert(Controller).values(row).returning(Controller.id)).scalar_one())

    return ledger.write(step)


def beat_controller(ledger: Ledger, controller: int, state: str, *, ended: bool = False) -> None:
    """A sign of life, with a word on how things stand; or the last one."""

    def step(connection: Connection) -> None:
        moment = now(connection)
        values = {"seen_at": moment, "state": state, "ended_at": moment if ended else None}
        connection.execute(sa.update(Controller).where(Controller.id == controller).values(values))

    ledger.write(step)


def controller_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """Controllers that have not ended, the newest first.

    Each with ``id``, ``host``, ``pid``, ``ray``, ``state``, ``started_at``, ``silent_s`` (since its last sign),
    ``alive`` and the ``jobs`` that it holds.
    """

    def step(connection: Connection) -> list[dict[str, Any]]:
        moment = now(connection)
        held = _held(connection, moment)
        query = sa.select(Controller).where(Controller.ended_at.is_(None)).order_by(Controller.id.desc())
        found = []
        for row in connection.execute(query).mappings():
            silent_s = moment - row["seen_at"]
            shown = {key: row[key] for key in ("id", "host", "pid", "ray", "state", "started_at")}
            jobs = held.get((row["host"], row["pid"]), [])
            found.append(shown | {"silent_s": silent_s, "alive": silent_s < FRESH_S, "jobs": jobs})
        return found

    return ledger.read(step)


def fair_part(ledger: Ledger) -> float:
    """The part of a shared cluster that this process may use: its jobs among all that are driven now."""

    def step(connection: Connection) -> float:
        held = _held(connection, now(connection))
        mine = len(held.get((socket.gethostname(), os.getpid()), []))
        total = sum(len(jobs) for jobs in held.values())
        return mine / total if mine else 1.0

    return ledger.read(step)


def _held(connection: Connection, moment: float) -> dict[tuple[str, int], list[int]]:
    """Jobs that are driven now by (host, pid)."""
    query = sa.select(Run.host, Run.pid, Lease.job_id).join(Lease, Lease.run_id == Run.id)
    held: dict[tuple[str, int], list[int]] = {}
    for host, pid, job_id in connection.execute(query.where(Lease.expires_at >= moment).order_by(Lease.job_id)):
        held.setdefault((host, pid), []).append(job_id)
    return held
