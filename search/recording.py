"""Writing a search that another tool runs, or ran, to the ledger as a job."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from archfront.db.lease import kept_lease
from archfront.db.ledger import Ledger
from archfront.db.records import AskRecord, FinishedRecord, MetricValue
from archfront.search.code_identity import code_identity
from archfront.search.job import parse_spec
from archfront.spaces.recorded import Recorded


@dataclass(kw_only=True)
class Trial:
    """What another tool tried.

    Attributes:
        genotype: any JSON.
        fidelity: how much was spent, in the tool's unit; 0 where it has none.
    """

    genotype: Any
    fidelity: int = 0


@dataclass(kw_only=True)
class Ending:
    """How a trial ended.

    Attributes:
        number: as ``start`` gave it.
        metrics: by name; all of the job's objectives if it is done.
        std: deviations of some of them.
        provenance: of those that were not measured.
        error: why it failed, or None.
        cancelled: ended by the tool before it had a result.
        violation: summed violation of constraints, 0 if feasible.
    """

    number: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    std: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    cancelled: bool = False
    violation: float = 0.0
    worker: str | None = None
    started_at: float | None = None
    duration_s: float | None = None


class Recorder:
    """One job in the ledger whose evaluations somebody else makes. A context manager: it holds the job's lease.

    Args:
        name: of the job.
        source: the tool, e.g. ``ray-tune``.
        objectives: ``(metric, direction)`` pairs, direction ``max`` or ``min``.
        about: kept with the job, for people: a study's name, say.

    Raises:
        InputErrors: a name or an objective that no job can have.
    """

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        *,
        source: str,
        objectives: Sequence[tuple[str, str]],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._space = Recorded(source=source)
        self._signs = [(metric, -1 if direction == "max" else 1) for metric, direction in objectives]
        document = {
            "name": name,
            "space": {"name": "recorded", "source": source},
            "evaluators": [{"name": source, **(about or {})}],
            "objectives": [{"metric": metric, "direction": direction} for metric, direction in objectives],
            "strategy": {"name": source},
            "budget": {"evaluations": 10**9},
            "exact_resume": False,
        }
        spec = parse_spec(document).model_dump(mode="json")
        self._ledger = ledger
        self.job_id = ledger.create_job(name, spec, self._space.digest)
        self._run_id = ledger.begin_run(self.job_id, code_identity([]))
        self._writer = ledger.writer(self.job_id, self._run_id, self._signs)
        self._asks = 0
        self._started = 0
        self._fidelity: dict[int, int] = {}
        self._repeats: Counter[tuple[str, int]] = Counter()
        self._held = ExitStack()

    def __enter__(self) -> Recorder:
        self._held.enter_context(kept_lease(self._ledger.engine, self.job_id, self._run_id))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the job: what has no result is cancelled."""
        self.finish([Ending(number=number, cancelled=True) for number in sorted(self._fidelity)])
        self._held.close()
        outcome, state = ("recorded", "done") if error is None else ("interrupted", "failed")
        words = f"recorded from {self._space.source}" if error is None else repr(error)
        spec = self._ledger.job(self.job_id)["spec"]
        spec["budget"]["evaluations"] = max(self._started, 1)
        self._ledger.change_job(self.job_id, spec=spec)
        self._ledger.end_run(self.job_id, self._run_id, outcome, words, state)

    def start(self, trials: Sequence[Trial]) -> list[int]:
        """Write trials ahead, committed when it returns. Returns their numbers in the job."""
        keys = [key.hex() for key in self._space.keys(self._space.from_json([t.genotype for t in trials]))]
        repeats = []
        for key, trial in zip(keys, trials, strict=True):
            repeats.append(self._repeats[key, trial.fidelity])
            self._repeats[key, trial.fidelity] += 1
        ask = AskRecord(
            number=self._asks,
            told=self._writer.next_seq - 1,
            first=self._started,
            source="strategy",
            keys=keys,
            genotypes=[trial.genotype for trial in trials],
            fidelities=[trial.fidelity for trial in trials],
            repeats=repeats,
        )
        self._writer.commit([ask])
        numbers = list(range(self._started, self._started + len(trials)))
        self._fidelity.update(zip(numbers, ask.fidelities, strict=True))
        self._asks += 1
        self._started += len(trials)
        return numbers

    def finish(self, endings: Sequence[Ending]) -> None:
        """Commit results, and the front that they change. A result without a finite objective is a failure."""
        if endings:
            self._writer.commit(finished=[self._record(ending) for ending in endings])

    def _record(self, ending: Ending) -> FinishedRecord:
        missing = [name for name, _ in self._signs if not math.isfinite(ending.metrics.get(name, math.nan))]
        error = ending.error
        if error is None and not ending.cancelled and missing:
            error = f"no finite {', '.join(missing)}"
        done = error is None and not ending.cancelled
        return FinishedRecord(
            number=ending.number,
            fidelity=self._fidelity.pop(ending.number),
            state="cancelled" if ending.cancelled else "done" if done else "failed",
            attempts=1,
            metrics={
                name: MetricValue(
                    float(value), ending.std.get(name), ending.provenance.get(name, "measured"), None, None
                )
                for name, value in ending.metrics.items()
            },
            objectives=[sign * ending.metrics[name] for name, sign in self._signs] if done else None,
            violation=ending.violation if done else None,
            worker=ending.worker,
            started_at=ending.started_at,
            duration_s=ending.duration_s,
            error=error,
        )
