"""The contract of an evaluator: candidates in, named metrics with their provenance out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from archfront.evaluators.learning import Learned
from archfront.plugins import Plugin
from archfront.spaces.space import Genotype, Space

Provenance = Literal["measured", "predicted", "computed"]
Direction = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """What an evaluator promises to report.

    Attributes:
        name: with its unit as suffix where it has one, e.g. ``latency_ms``.
        unit: for people: ``ms``, ``bytes``, ``1`` for a ratio.
        direction: which way is better.
        has_std: whether values come with a standard deviation, as constraints with a confidence need.
    """

    name: str
    unit: str
    direction: Direction
    has_std: bool = False


@dataclass(frozen=True, slots=True)
class Metric:
    """One value and where it came from.

    Attributes:
        value: in the unit of its ``MetricSpec``.
        provenance: a prediction never passes for a measurement.
        std: standard deviation of the value as an estimate, if known.
        predictor: which predictor and version, for predicted values.
        device: fingerprint of the device that the value holds for, if it depends on one.
    """

    value: float
    provenance: Provenance = "computed"
    std: float | None = None
    predictor: str | None = None
    device: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One evaluation to make.

    Attributes:
        number: the evaluation's number in its job.
        genotype: plain data, canonical.
        key: hex digest of the canonical genotype.
        fidelity: how much to spend, in the job's fidelity unit (epochs for training).
        repeat: 0 for the first evaluation of a candidate at a fidelity.
        seed: function of the job's seed, the candidate and the repeat; the same at every fidelity.
        final: a finalist's long evaluation after the search: only here may the test split be looked at, and what is
            kept is the finished model.
        learned: what the job's learning evaluator knew when this was asked for (see ``learning.Learning``), or None.
    """

    number: int
    genotype: Genotype
    key: str
    fidelity: int
    repeat: int
    seed: int
    final: bool = False
    learned: Learned | None = None


@dataclass(kw_only=True)
class EvaluationContext:
    """What a worker gives its evaluators.

    Attributes:
        space: of the job.
        data: the job file's ``data`` mapping, or None.
        threads: how many threads an evaluation may use.
        files: folder or fsspec URI for checkpoints, or None to keep none.
        artifacts: what ``prepare`` returned, by evaluator name.
        plugins: the user's own files, for processes that evaluators start.
    """

    space: Space
    data: Mapping[str, Any] | None = None
    threads: int = 1
    files: str | None = None
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    plugins: Sequence[Plugin] = ()


@dataclass(slots=True)
class Evaluated:
    """The metrics of one task, and the URI of what was kept of it."""

    metrics: dict[str, Metric]
    checkpoint: str | None = None


class Evaluator(ABC):
    """Turns candidates into metrics. Constructed in each worker from its mapping in the job file.

    The keyword arguments of ``__init__`` are what the job file may set; their types are checked when the job is read.
    An evaluator raises on a candidate that it cannot evaluate: that evaluation fails, with the traceback, and the
    others go on.
    """

    name: ClassVar[str]

    batch_size: int = 1
    """How many tasks a call takes at best: 1 for training, hundreds for table look-ups."""

    fidelities: Sequence[int] | None = None
    """Fidelities in rising order, if this evaluator has them; at most one evaluator of a job may."""

    on_device: bool = False
    """Whether what it reports holds for the device that it runs on, as a latency does: in a job that names devices it
    runs on workers of one."""

    @property
    @abstractmethod
    def metrics(self) -> Sequence[MetricSpec]:
        """What ``evaluate`` reports for each task."""

    def check(self, context: EvaluationContext) -> None:
        """Called when a job is validated, before anything is stored.

        Raises:
            InputError: this evaluator cannot serve the job's space or data.
        """

    def prepare_key(self, context: EvaluationContext) -> str | None:
        """Identity of what ``prepare`` would make, so that it is made once per device and stored; None for nothing."""
        return None

    def device_key(self, context: EvaluationContext) -> str | None:
        """Identity of the device that its figures hold for, where ``on_device`` is true: results of another device do
        not serve in their place."""
        return None

    def prepare(self, context: EvaluationContext) -> dict[str, Any]:
        """Made once, in a worker, before the job's first evaluation (a latency table, say); JSON, kept in the ledger
        and handed to every worker as ``context.artifacts[name]``."""
        return {}

    @contextmanager
    def deployed(
        self, items: Sequence[Mapping[str, Any]], context: EvaluationContext
    ) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """What shall be measured in the place of candidates (files that a backend executes, say), while it is there;
        and what is known of each beside its time, as JSON.

        Args:
            items: as of ``measured_elsewhere``.
        """
        yield [dict(item) for item in items], [{} for _ in items]

    @abstractmethod
    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        """The metrics of each task, in order; an exception in place of a task that failed alone."""
