"""The tables of the ledger (SQLAlchemy 2.1 typed ORM). Times are seconds since 1970, UTC, by the database's clock.

Rows of one job are keyed by (job, number) with numbers that the job itself counts, not by identities that a server
hands out: so a job that was killed and resumed holds the very rows of one that never was.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

JOB_STATES = ("queued", "running", "done", "failed", "cancelled")
EVALUATION_STATES = ("running", "done", "failed", "cancelled")
PROVENANCES = ("measured", "predicted", "computed")
WORKER_LENGTH, NAME_LENGTH, DEVICE_LENGTH = 255, 100, 64
"""The most characters of a worker's name, of a metric's or predictor's, and of a device's digest."""


# On SQLite these rows lie in the order of their key: one B-tree to write instead of two, and a job's rows in sequence.
_CLUSTERED = {"sqlite_with_rowid": False}


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can name it too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012 - SQLAlchemy's own hook


class Job(Base):
    """One search. ``spec`` is the validated job file with every default written out.

    ``managed`` jobs belong to controllers, others to the shell that runs them. Jobs of one ``work_digest`` measure the
    same of a candidate, so that their results may serve each other. ``files`` is where checkpoints go.
    """

    __tablename__ = "jobs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), index=True)
    spec: Mapped[dict[str, Any]]
    space_digest: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str | None] = mapped_column(Text)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    managed: Mapped[bool] = mapped_column(default=False, server_default=false())
    work_digest: Mapped[str | None] = mapped_column(String(32), index=True)
    files: Mapped[str | None] = mapped_column(Text)
    __table_args__ = (CheckConstraint(_one_of("state", JOB_STATES), name="state"),)


class Run(Base):
    """One driver's attempt at a job, and the code that it ran."""

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    pid_started: Mapped[float]
    code: Mapped[dict[str, Any]]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(32))


class Lease(Base):
    """Who drives a job: at most one run, until a moment by the database's clock.

    ``commits`` counts the run's commits: after a lost connection it tells whether the last one took place.
    """

    __tablename__ = "leases"
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    expires_at: Mapped[float]
    commits: Mapped[int] = mapped_column(default=0, server_default="0")


class Controller(Base):
    """A controller and its last sign of life."""

    __tablename__ = "controllers"
    id: Mapped[int] = mapped_column(primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    ray: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    started_at: Mapped[float]
    seen_at: Mapped[float]
    ended_at: Mapped[float | None]


class AskRow(Base):
    """One question to the strategy: what it knew (``told`` results) and what it answered (evaluations from ``first``).

    What was in flight then is the evaluations numbered below ``first`` whose ``seq`` is null or above ``told``.
    ``predictor`` is the version that its evaluations predict with, a row of ``predictors``; null before the first.
    """

    __tablename__ = "asks"
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    told: Mapped[int]
    first: Mapped[int]
    count: Mapped[int]
    source: Mapped[str] = mapped_column(String(32))
    memory: Mapped[Any | None] = mapped_column(JSON)
    predictor: Mapped[str | None] = mapped_column(String(64))
    asked_at: Mapped[float]
    __table_args__ = (_CLUSTERED,)


class PredictorRow(Base):
    """A version of what predicts in a job that learns while it runs: fitted to its first ``pairs`` measured pairs.

    ``state`` is what a prediction follows from, besides what the evaluator prepared.
    """

    __tablename__ = "predictors"
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    pairs: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[str] = mapped_column(String(64))
    evaluator: Mapped[str] = mapped_column(String(NAME_LENGTH))
    state: Mapped[dict[str, Any]]
    made_at: Mapped[float]
    __table_args__ = (UniqueConstraint("job_id", "version"), _CLUSTERED)


class Candidate(Base):
    """One canonical genotype of one space."""

    __tablename__ = "candidates"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    space_digest: Mapped[str] = mapped_column(String(32))
    key: Mapped[str] = mapped_column(String(32))
    genotype: Mapped[Any] = mapped_column(JSON)
    __table_args__ = (UniqueConstraint("space_digest", "key"),)


class Evaluation(Base):
    """One candidate at one fidelity in one job. ``seq`` counts the finished ones in the order of their commits."""

    __tablename__ = "evaluations"
    job_id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    ask: Mapped[int]
    candidate_id: Mapped[int] = mapped_column(ForeignKey("candidates.id"))
    fidelity: Mapped[int]
    repeat: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    seq: Mapped[int | None]
    attempts: Mapped[int]
    violation: Mapped[float | None]
    worker: Mapped[str | None] = mapped_column(String(WORKER_LENGTH))
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    duration_s: Mapped[float | None]
    error: Mapped[str | None] = mapped_column(Text)
    checkpoint: Mapped[str | None] = mapped_column(Text)
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "ask"], ["asks.job_id", "asks.number"], ondelete="CASCADE"),
        UniqueConstraint("job_id", "candidate_id", "fidelity", "repeat"),
        UniqueConstraint("job_id", "seq"),
        CheckConstraint(_one_of("state", EVALUATION_STATES), name="state"),
        CheckConstraint("(state = 'running') = (seq IS NULL)", name="seq"),
        _CLUSTERED,
    )


class Reuse(Base):
    """An evaluation whose result was taken from another job's: its origin, which was really evaluated."""

    __tablename__ = "reuses"
    job_id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    origin_job_id: Mapped[int]
    origin_number: Mapped[int]
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["evaluations.job_id", "evaluations.number"], ondelete="CASCADE"),
        ForeignKeyConstraint(
            ["origin_job_id", "origin_number"],
            ["evaluations.job_id", "evaluations.number"],
            name="fk_reuses_origin",
            ondelete="CASCADE",
        ),
        _CLUSTERED,
    )


class Attempt(Base):
    """One failed attempt at an evaluation: why, and the traceback."""

    __tablename__ = "attempts"
    job_id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(Text)
    traceback: Mapped[str | None] = mapped_column(Text)
    worker: Mapped[str | None] = mapped_column(String(WORKER_LENGTH))
    failed_at: Mapped[float]
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["evaluations.job_id", "evaluations.number"], ondelete="CASCADE"),
        _CLUSTERED,
    )


class MetricRow(Base):
    """One metric of one evaluation. ``value`` is null where a metric that is no objective was not a number."""

    __tablename__ = "metrics"
    job_id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    value: Mapped[float | None]
    std: Mapped[float | None]
    provenance: Mapped[str] = mapped_column(String(16))
    predictor: Mapped[str | None] = mapped_column(String(NAME_LENGTH))
    device: Mapped[str | None] = mapped_column(String(DEVICE_LENGTH))
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["evaluations.job_id", "evaluations.number"], ondelete="CASCADE"),
        CheckConstraint(_one_of("provenance", PROVENANCES), name="provenance"),
        _CLUSTERED,
    )


class FrontMember(Base):
    """A stay of an evaluation in the front of its fidelity: from one ``seq`` until, not including, another.

    ``shown`` is what a reader of a front asks of a member, as one JSON text, so that a front is one read of one table:
    rebuildable from the rows, and null in fronts that an older version wrote.
    """

    __tablename__ = "front_members"
    job_id: Mapped[int] = mapped_column(primary_key=True)
    fidelity: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    entered_seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    left_seq: Mapped[int | None]
    shown: Mapped[str | None] = mapped_column(Text)
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["evaluations.job_id", "evaluations.number"], ondelete="CASCADE"),
        _CLUSTERED,
    )


class ColumnChunk(Base):
    """The finished evaluations ``first_seq..last_seq`` as one packed float64 matrix: rebuildable from the rows."""

    __tablename__ = "column_chunks"
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    first_seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    last_seq: Mapped[int]
    names: Mapped[list[Any]]
    data: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str] = mapped_column(String(32))


class Device(Base):
    """A device that something was measured on."""

    __tablename__ = "devices"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[dict[str, Any]]
    first_seen_at: Mapped[float]


class Artifact(Base):
    """What an evaluator prepared once and every job may use again: a latency table of a device, say."""

    __tablename__ = "artifacts"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(128))
    content: Mapped[dict[str, Any]]
    device: Mapped[str | None] = mapped_column(ForeignKey("devices.digest"))
    made_at: Mapped[float]
    __table_args__ = (UniqueConstraint("kind", "key"),)


class Benchmark(Base):
    """One finalist measured on one device with one backend: every raw timing is kept in ``content``."""

    __tablename__ = "benchmarks"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int]
    number: Mapped[int]
    kind: Mapped[str] = mapped_column(String(32))
    settings: Mapped[dict[str, Any]]
    content: Mapped[dict[str, Any]]
    device: Mapped[str | None] = mapped_column(ForeignKey("devices.digest"))
    measured_at: Mapped[float]
    __table_args__ = (
        ForeignKeyConstraint(["job_id", "number"], ["evaluations.job_id", "evaluations.number"], ondelete="CASCADE"),
        Index("ix_benchmarks_job_id", "job_id"),
    )


Index("ix_evaluations_candidate_id", Evaluation.candidate_id)
Index("ix_front_members_job_id_fidelity_left_seq", FrontMember.job_id, FrontMember.fidelity, FrontMember.left_seq)
_DONE = text("state = 'done'")
Index(
    "ix_evaluations_done",
    Evaluation.job_id,
    Evaluation.fidelity,
    Evaluation.seq,
    sqlite_where=_DONE,
    postgresql_where=_DONE,
)
