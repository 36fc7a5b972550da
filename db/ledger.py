"""The ledger: jobs, their drivers and leases, what evaluators prepared, and what a resumed engine starts from."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from archfront.db.connection import Patience, ledger_errors, now, open_engine, write
from archfront.db.history import History, read_history
from archfront.db.lease import LEASE_S
from archfront.db.schema import (
    Artifact,
    Benchmark,
    Device,
    Evaluation,
    Job,
    Lease,
    Run,
)
from archfront.db.writer import JobWriter
from archfront.errors import InputError, JobBusyError, LeaseLostError

T = TypeVar("T")

_PLACE = "place"


class Ledger:
    """A database of jobs. Objects are cheap; two processes may open the same one."""

    def __init__(self, engine: Engine, url: str) -> None:
        self.engine = engine
        self.url = url

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Ledger:
        """Open a ledger; an empty database gets the schema.

        Raises:
            LedgerError, InputError: it cannot be used; the message says what to do.
        """
        return cls(open_engine(url, create=create), url)

    def close(self) -> None:
        self.engine.dispose()

    def create_job(
        self,
        name: str,
        spec: Mapping[str, Any],
        space_digest: str,
        *,
        managed: bool = False,
        work_digest: str | None = None,
        files: str | None = None,
    ) -> int:
        """Enter a job, queued.

        Args:
            managed: for a controller to drive.
            work_digest: jobs of the same one measure the same of a candidate.
            files: where its checkpoints go, if that is settled.
        """
        with ledger_errors(self.url), write(self.engine) as connection:
            values = {
                "name": name,
                "spec": dict(spec),
                "space_digest": space_digest,
                "state": "queued",
                "cancel_requested": False,
                "created_at": now(connection),
                "managed": managed,
                "work_digest": work_digest,
                "files": files,
            }
            return int(connection.execute(sa.insert(Job).values(values).returning(Job.id)).scalar_one())

    def find_job(self, reference: str | int) -> int:
        """The id behind an id, a name (the newest of that name) or ``last``.

        Raises:
            InputError: no such job.
        """
        text = str(reference)
        query = sa.select(Job.id).order_by(Job.id.desc()).limit(1)
        with self.engine.connect() as connection:
            found = None
            if text == "last":
                found = connection.execute(query).scalar()
            elif text.isdecimal() and len(text) < 10:
                found = connection.execute(query.where(Job.id == int(text))).scalar()
            if found is None:
                found = connection.execute(query.where(Job.name == text)).scalar()
        if found is None:
            raise InputError("JOB", reference, "is no job of this database", "`archfront jobs` lists them.")
        return int(found)

    def job(self, job_id: int) -> dict[str, Any]:
        """The row of a job as a mapping."""
        query = sa.select(Job).where(Job.id == job_id)
        return self.read(lambda connection: dict(connection.execute(query).mappings().one()))

    def change_job(self, job_id: int, **values: Any) -> None:
        """Set columns of a job."""
        self.write(lambda connection: connection.execute(sa.update(Job).where(Job.id == job_id).values(**values)))

    def read(self, step: Callable[[Connection], T]) -> T:
        """Run a step that only reads; a server that is away is waited for.

        Raises:
            LedgerError: it was away for too long.
        """
        waited = Patience()
        while True:
            try:
                with self.engine.connect() as connection:
                    return step(connection)
            except DBAPIError as error:
                waited.wait_or_raise(error, self.url)

    def write(self, step: Callable[[Connection], T]) -> T:
        """The same for a step that writes, and may be done twice without harm."""
        waited = Patience()
        while True:
            try:
                with write(self.engine) as connection:
                    return step(connection)
            except DBAPIError as error:
                waited.wait_or_raise(error, self.url)

    def request_cancel(self, job_id: int) -> bool:
        """Ask a job to stop for good. Returns whether a driver is at work and will do it; else it is done here."""
        with write(self.engine) as connection:
            connection.execute(sa.update(Job).where(Job.id == job_id).values(cancel_requested=True))
            if self._live_lease(connection, job_id) is not None:
                return True
            self._cancel_unfinished(connection, job_id)
            connection.execute(
                sa.update(Job)
                .where(Job.id == job_id, Job.state.in_(("queued", "running")))
                .values(state="cancelled", reason="cancelled by the user", finished_at=now(connection))
            )
            return False

    def _cancel_unfinished(self, connection: Connection, job_id: int) -> None:
        mine = Evaluation.job_id == job_id
        open_numbers = connection.execute(sa.select(Evaluation.number).where(mine, Evaluation.seq.is_(None))).scalars()
        last = connection.execute(sa.select(sa.func.max(Evaluation.seq)).where(mine)).scalar() or 0
        moment = now(connection)
        for seq, number in enumerate(sorted(open_numbers), last + 1):
            ended = sa.update(Evaluation).where(mine, Evaluation.number == number)
            connection.execute(ended.values(state="cancelled", seq=seq, finished_at=moment))

    def begin_run(self, job_id: int, code: Mapping[str, Any], *, claim: bool = False) -> int:
        """Take the lease of a job for this process.

        Args:
            claim: as a controller does, on nobody's order: a cancel that was asked for stays asked for, and a job that
                another controller is just looking at counts as busy instead of being waited for.

        Raises:
            JobBusyError: another driver that is alive, or was until seconds ago, holds it; or it came to its end.
        """
        with ledger_errors(self.url), write(self.engine) as connection:
            locked = sa.select(Job.state).where(Job.id == job_id).with_for_update(skip_locked=claim)
            state = connection.execute(locked).scalar()
            if claim and state not in ("queued", "running"):
                raise JobBusyError(f"Job {job_id} was taken by another controller or has ended.")
            holder = self._live_lease(connection, job_id, lock=True)
            if holder is not None:
                raise JobBusyError(
                    f"Job {job_id} is being driven by process {holder['pid']} on {holder['host']} (run "
                    f"{holder['id']}). Watch it with `archfront status {job_id}`; a dead driver's job is free "
                    f"{max(holder['expires_at'] - now(connection), 0):.0f} s from now."
                )
            if not claim:
                connection.execute(sa.update(Job).where(Job.id == job_id).values(cancel_requested=False))
            return self._take(connection, job_id, code)

    def claimable(self) -> list[int]:
        """Managed jobs that nobody drives: queued, or left by a driver that is dead; the oldest first."""
        free = sa.select(Job.id).where(Job.managed, Job.state.in_(("queued", "running"))).order_by(Job.id)

        def step(connection: Connection) -> list[int]:
            ids = connection.execute(free).scalars().all()
            return [job_id for job_id in ids if self._live_lease(connection, job_id) is None]

        return self.read(step)

    def _take(self, connection: Connection, job_id: int, code: Mapping[str, Any]) -> int:
        moment = now(connection)
        connection.execute(sa.delete(Lease).where(Lease.job_id == job_id))
        run = {
            "job_id": job_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "code": {**code, _PLACE: _place()},
            "started_at": moment,
        }
        run_id = int(connection.execute(sa.insert(Run).values(run).returning(Run.id)).scalar_one())
        connection.execute(sa.insert(Lease).values(job_id=job_id, run_id=run_id, expires_at=moment + LEASE_S))
        begun = {"state": "running", "reason": None, "finished_at": None}
        connection.execute(sa.update(Job).where(Job.id == job_id).values(begun))
        return run_id

    def end_run(self, job_id: int, run_id: int, outcome: str, reason: str | None, job_state: str) -> None:
        """Give the lease back and write down how the run and the job ended."""

        def step(connection: Connection) -> None:
            moment = now(connection)
            connection.execute(sa.update(Run).where(Run.id == run_id).values(ended_at=moment, outcome=outcome))
            held = connection.execute(sa.delete(Lease).where(Lease.job_id == job_id, Lease.run_id == run_id)).rowcount
            if held:
                finished_at = None if job_state in ("queued", "running") else moment
                ended = {"state": job_state, "reason": reason, "finished_at": finished_at}
                connection.execute(sa.update(Job).where(Job.id == job_id).values(ended))

        self.write(step)

    def last_code(self, job_id: int) -> dict[str, Any] | None:
        """The code that the job's latest run recorded."""
        query = sa.select(Run.code).where(Run.job_id == job_id).order_by(Run.id.desc()).limit(1)
        return self.read(lambda connection: connection.execute(query).scalar())

    def holder(self, job_id: int) -> dict[str, Any] | None:
        """The run that drives a job now, if one does."""
        return self.read(lambda connection: self._live_lease(connection, job_id))

    def writer(self, job_id: int, run_id: int, objectives: Sequence[tuple[str, int]]) -> JobWriter:
        """The writer of a job; ``objectives`` are (metric, sign) with sign -1 for those to maximise."""
        return JobWriter(self.engine, job_id, str(self.job(job_id)["space_digest"]), run_id, objectives)

    def history(self, job_id: int, objectives: Sequence[tuple[str, int]]) -> History:
        """All asks and results of a job, to replay."""
        return read_history(self.read, job_id, objectives)

    def artifact(self, kind: str, key: str) -> dict[str, Any] | None:
        query = sa.select(Artifact.content).where(Artifact.kind == kind, Artifact.key == key)
        return self.read(lambda connection: connection.execute(query).scalar())

    def artifacts(self, kind: str, prefix: str) -> list[dict[str, Any]]:
        """All of a kind whose keys begin so, in the order in which they were stored."""
        begins = Artifact.key.startswith(prefix, autoescape=True)
        query = sa.select(Artifact.content).where(Artifact.kind == kind, begins).order_by(Artifact.id)
        return list(self.read(lambda connection: connection.execute(query).scalars().all()))

    def devices_of(self, kind: str) -> list[dict[str, Any]]:
        """Fingerprints of the devices that artifacts of this kind hold for, the newest artifact's first."""
        newest = sa.func.max(Artifact.id)
        query = (
            sa.select(Device.fingerprint)
            .join(Artifact, Artifact.device == Device.digest)
            .where(Artifact.kind == kind)
            .group_by(Device.digest)
            .order_by(newest.desc())
        )
        return list(self.read(lambda connection: connection.execute(query).scalars().all()))

    def store_artifact(self, kind: str, key: str, content: Mapping[str, Any], device: Mapping[str, Any] | None) -> None:
        """Keep what an evaluator prepared; the first of a key stays.

        Args:
            device: fingerprint with its ``digest``, if it holds for one device only.
        """

        def step(connection: Connection) -> None:
            digest = self._store_device(connection, device)
            values = {"kind": kind, "key": key, "content": dict(content), "device": digest, "made_at": now(connection)}
            connection.execute(_insert_new(connection, Artifact, values))

        self.write(step)

    def store_benchmark(
        self,
        job_id: int,
        run_id: int,
        number: int,
        kind: str,
        settings: Mapping[str, Any],
        content: Mapping[str, Any],
        device: Mapping[str, Any] | None,
    ) -> None:
        """Keep what was found of a finalist.

        Raises:
            LeaseLostError: another run holds the job now; nothing was written.
        """

        def step(connection: Connection) -> None:
            held = sa.select(Lease.run_id).where(Lease.job_id == job_id, Lease.run_id == run_id)
            if connection.execute(held).scalar() is None:
                raise LeaseLostError(f"Job {job_id} is driven by another run now; this one stops.")
            row = {"job_id": job_id, "number": number, "kind": kind, "settings": dict(settings)}
            row |= {"content": dict(content), "device": self._store_device(connection, device)}
            connection.execute(sa.insert(Benchmark).values(**row, measured_at=now(connection)))

        self.write(step)

    def benchmarks(self, job_id: int) -> list[dict[str, Any]]:
        query = sa.select(Benchmark).where(Benchmark.job_id == job_id).order_by(Benchmark.id)
        return self.read(lambda connection: [dict(row) for row in connection.execute(query).mappings()])

    def _store_device(self, connection: Connection, device: Mapping[str, Any] | None) -> str | None:
        if device is None:
            return None
        digest = str(device["digest"])
        values = {"digest": digest, "fingerprint": dict(device), "first_seen_at": now(connection)}
        connection.execute(_insert_new(connection, Device, values))
        return digest

    def _live_lease(self, connection: Connection, job_id: int, *, lock: bool = False) -> dict[str, Any] | None:
        query = (
            sa.select(Run.id, Run.host, Run.pid, Run.pid_started, Run.code, Lease.expires_at)
            .join(Lease, Lease.run_id == Run.id)
            .where(Lease.job_id == job_id)
        )
        # Locked where it may be taken over: its holder could be prolonging it at this very moment.
        row = connection.execute(query.with_for_update(of=Lease) if lock else query).mappings().first()
        if row is None or row["expires_at"] < now(connection):
            return None
        # A driver that was killed on this very host need not be waited for.
        if row["code"].get(_PLACE) == _place() and not _is_alive(row["pid"], row["pid_started"]):
            return None
        return dict(row)


def _insert_new(connection: Connection, table: Any, values: Mapping[str, Any]) -> Any:
    """An insert that leaves a row of the same key as it is."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    return insert(table).values(dict(values)).on_conflict_do_nothing()


@cache
def _place() -> str:
    """Where a process number means the same: this boot of this machine, and this namespace of its processes. A host's
    name does not tell: cloned machines and containers share one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def _is_alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 2
    except psutil.NoSuchProcess:
        return False
