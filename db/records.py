"""Plain rows that the engine hands to the ledger, and the ones it gets back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class MetricValue(NamedTuple):
    """One metric as it is stored; the fields are those of the table ``metrics``."""

    value: float
    std: float | None
    provenance: str
    predictor: str | None
    device: str | None


@dataclass(slots=True, kw_only=True)
class AskRecord:
    """One ask and the evaluations that it makes, numbered from ``first``; all parallel sequences.

    Attributes:
        told: how many results the strategy knew (the highest ``seq`` told).
        source: ``strategy``, ``seeds`` or ``warm_start``.
        keys: hex digests of the candidates.
        genotypes: plain data.
        memory: what the strategy wants back on replay.
        predictor: version that its evaluations predict with, in a job that learns while it runs.
    """

    number: int
    told: int
    first: int
    source: str
    keys: Sequence[str]
    genotypes: Sequence[Any]
    fidelities: Sequence[int]
    repeats: Sequence[int]
    memory: Any = None
    predictor: str | None = None

    @property
    def count(self) -> int:
        return len(self.keys)


@dataclass(slots=True, kw_only=True)
class FinishedRecord:
    """The end of one evaluation.

    Attributes:
        objectives: oriented so that less is better, finite; None unless ``state`` is ``done``.
        violation: summed relative violation of the constraints, 0 if feasible; None unless ``done``.
        attempts: how many were made, this one included.
        origin: (job, evaluation) whose result this is, if it was reused.
    """

    number: int
    fidelity: int
    state: str
    attempts: int
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)
    objectives: Sequence[float] | None = None
    violation: float | None = None
    worker: str | None = None
    started_at: float | None = None
    duration_s: float | None = None
    error: str | None = None
    checkpoint: str | None = None
    origin: tuple[int, int] | None = None


@dataclass(slots=True, kw_only=True)
class AttemptRecord:
    """One failed attempt: ``kind`` is ``error``, ``non-finite``, ``timeout``, ``memory`` or ``died``; attempt 0,
    ``suspect``: its batch died, and it is tried alone at no charge."""

    number: int
    attempt: int
    kind: str
    message: str
    traceback: str | None = None
    worker: str | None = None


@dataclass(slots=True, kw_only=True)
class PredictorRecord:
    """A version of an evaluator's predictor, fitted to the job's first ``pairs`` measured pairs; ``state`` is JSON."""

    pairs: int
    version: str
    evaluator: str
    state: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class StoredEvaluation:
    """An evaluation as the ledger has it: what a replay needs."""

    number: int
    ask: int
    key: str
    genotype: Any
    fidelity: int
    repeat: int
    seq: int | None
    state: str
    attempts: int
    violation: float | None
