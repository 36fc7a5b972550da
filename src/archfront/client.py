"""Archfront from Python: ``archfront.run(spec)`` and ``archfront.Job(db, "last").front().to_pandas()``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archfront.db.ledger import Ledger
from archfront.db.queries import (
    FrontQuery,
    counts,
    failures,
    front_numbers,
    front_table,
    job_objectives,
    latest_predictor,
    seq_at,
    seq_of,
    top_fidelity,
)
from archfront.db.reuse import count_reused
from archfront.db.walking import snapshot
from archfront.errors import InputError, suggestion

if TYPE_CHECKING:
    import pandas as pd

    from archfront.search.job import JobSpec
    from archfront.search.progress import Progress

DEFAULT_DB = "archfront.db"


def default_db() -> str:
    """The database of a call that names none: ``ARCHFRONT_DB``, or ``archfront.db`` in the working folder."""
    return os.environ.get("ARCHFRONT_DB") or DEFAULT_DB


class Front:
    """Members of a Pareto front: a sequence of mappings with evaluation, key, genotype, fidelity, metrics by name.

    Attributes:
        objectives: ``(metric, direction)`` pairs that the front is one of.
    """

    def __init__(self, rows: list[dict[str, Any]], objectives: Sequence[tuple[str, str]]) -> None:
        self.objectives = list(objectives)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the members: the objectives first, the others in alphabetical order."""
        names = {name for row in self._rows for name in row} - {"evaluation", "key", "genotype", "fidelity"}
        first = [name for name, _ in self.objectives]
        return [*first, *sorted(names - set(first))]

    def to_pandas(self) -> pd.DataFrame:
        """One row a member; genotypes as they are in the ledger."""
        import pandas as pd

        return pd.DataFrame(self._rows, columns=["evaluation", "key", "genotype", "fidelity", *self.metrics])


class Job:
    """A job in a ledger.

    Args:
        db: URL or path of the ledger, or an open one; ``default_db()`` if None.
        reference: id, name (the newest of that name) or ``last``.
        plugins: files of the user's own components, which resuming needs.

    Raises:
        LedgerError: the database cannot be used.
        InputError: no such job.
    """

    def __init__(
        self,
        db: str | Path | Ledger | None = None,
        reference: str | int = "last",
        *,
        plugins: Sequence[str | Path] = (),
    ) -> None:
        self.ledger = db if isinstance(db, Ledger) else Ledger.open(str(db or default_db()), create=False)
        self.id = self.ledger.find_job(reference)
        self.plugins = list(plugins)
        self._rows: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"<archfront.Job {self.id} {self.name!r}: {self.state}>"

    @property
    def row(self) -> dict[str, Any]:
        return self.ledger.job(self.id)

    @property
    def name(self) -> str:
        return str(self.row["name"])

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.row["spec"])

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``stopped`` (resumable, nobody drives it), ``done``, ``failed`` or ``cancelled``."""
        state = str(self.row["state"])
        return "stopped" if state == "running" and self.ledger.holder(self.id) is None else state

    def front(
        self,
        *,
        objectives: Sequence[str] | None = None,
        where: str | None = None,
        fidelity: str | int = "top",
        at: int | datetime | None = None,
    ) -> Front:
        """The Pareto front.

        Args:
            objectives: metrics; the job's own if None. ``-name`` or ``+name`` sets a direction (min, max) for a
                metric that is no objective of the job.
            where: a condition such as ``latency_ms <= 2 and params < 1e5``.
            fidelity: ``top``, ``any`` or a number.
            at: as it was when this evaluation was committed, or at this moment.

        Raises:
            InputError: something of it is unknown or cannot be parsed.
        """
        level = _fidelity(fidelity)
        with snapshot(self.ledger.engine) as connection:
            seq = None
            if isinstance(at, datetime):
                seq = seq_at(connection, self.id, at.timestamp())
            elif at is not None:
                seq = seq_of(connection, self.id, at)
            pairs = None if objectives is None else self._directions(objectives)
            query = FrontQuery(objectives=pairs, where=where, fidelity=level, seq=seq)  # type: ignore[arg-type]
            rows = front_table(connection, self.id, query, self._rows)
        # Of a front that is looked at again and again, only what is new is read.
        self._rows = {row["evaluation"]: dict(row) for row in rows}
        return Front(rows, pairs or job_objectives(self.spec))

    def status(self, tracebacks: int = 5) -> dict[str, Any]:
        """What stands in the ledger about the job, as plain data."""
        row = self.row
        holder = self.ledger.holder(self.id)
        with snapshot(self.ledger.engine) as connection:
            states = counts(connection, self.id)
            failed = failures(connection, self.id, tracebacks)
            fidelity = top_fidelity(connection, self.id)
            members = len(front_numbers(connection, self.id, FrontQuery()))
            reused = count_reused(connection, self.id)
            predictor = latest_predictor(connection, self.id)
        return {
            "id": self.id,
            "name": row["name"],
            "state": self.state,
            "reason": row["reason"],
            "evaluations": states,
            "reused": reused,
            "budget": row["spec"]["budget"],
            "fidelity": fidelity,
            "front": members,
            "predictor": predictor,
            "created_at": row["created_at"],
            "finished_at": row["finished_at"],
            "driver": None if holder is None else {key: holder[key] for key in ("host", "pid")},
            "failures": failed,
        }

    def resume(self, *, evaluations: int = 0, **options: Any) -> str:
        """Go on where the job stands, with ``evaluations`` more than its budget; see ``DriveOptions`` for the rest.

        Returns:
            why it ended.

        Raises:
            InputError: it was recorded from another tool.
        """
        from archfront.plugins import read_plugins
        from archfront.search.driver import DriveOptions, drive

        self.refuse_recorded()
        settings = DriveOptions(plugins=read_plugins(self.plugins), more_evaluations=evaluations, **options)
        return drive(self.ledger, self.id, settings)

    def refuse_recorded(self) -> None:
        """Nothing here can go on with what another tool proposed.

        Raises:
            InputError: the job was recorded or imported from one.
        """
        space = self.spec["space"]
        if space["name"] == "recorded":
            remedy = f"Go on with it in {space['source']}, and record or import that as a new job."
            raise InputError("JOB", self.name, f"was recorded from {space['source']} and cannot be resumed", remedy)

    def cancel(self) -> bool:
        """End the job for good. Returns whether a driver is at work and will do it within seconds."""
        return self.ledger.request_cancel(self.id)

    def _directions(self, names: Sequence[str]) -> list[tuple[str, str]]:
        known = dict(job_objectives(self.spec))
        pairs = []
        for given in names:
            name = given.lstrip("+-")
            if given[:1] not in "+-" and name not in known:
                # Only then: building evaluators loads what they are made of.
                known |= self._metric_directions()
            if given[:1] in "+-":
                pairs.append((name, "max" if given[0] == "+" else "min"))
            elif name in known:
                pairs.append((name, known[name]))
            else:
                raise InputError("--objectives", given, "is no metric of this job", suggestion(given, known))
        return pairs

    def _metric_directions(self) -> dict[str, str]:
        from archfront.plugins import read_plugins
        from archfront.search.job import JobSpec
        from archfront.search.plugins import load_plugins
        from archfront.search.resolve import build_evaluators

        load_plugins(read_plugins(self.plugins))
        try:
            built = build_evaluators(JobSpec.model_validate(self.spec))
        except InputError:
            # An evaluator of a plug-in that is not at hand: the job's own objectives are still known.
            return {}
        return {metric.name: metric.direction for _, evaluator in built for metric in evaluator.metrics}


def run(
    spec: Mapping[str, Any] | str | Path | JobSpec,
    *,
    db: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    workers: int | None = None,
    observe: Callable[[Progress], None] = lambda _: None,
) -> Job:
    """Submit a job and drive it to its end.

    Args:
        spec: a job as a mapping, or the path of a job file.
        db: ledger; ``default_db()`` if None.
        plugins: files of the user's own components.
        workers: in place of the job's ``workers.count``.

    Raises:
        InputError: the job cannot work; nothing was stored.
        JobFailedError: it failed; what it found is in the ledger.
    """
    from archfront.plugins import read_plugins
    from archfront.search.driver import submit
    from archfront.search.job import parse_spec, read_spec
    from archfront.search.plugins import load_plugins

    sources = read_plugins(plugins)
    load_plugins(sources)
    parsed = read_spec(spec) if isinstance(spec, (str, Path)) else parse_spec(spec)
    if workers is not None:
        parsed = parsed.model_copy(update={"workers": parsed.workers.model_copy(update={"count": workers})})
    ledger = Ledger.open(str(db or default_db()))
    job = Job(ledger, submit(ledger, parsed, sources), plugins=plugins)
    job.resume(observe=observe)
    return job


def _fidelity(given: str | int) -> str | int:
    if given in ("top", "any"):
        return given
    try:
        level = int(given)
        if abs(level) < 2**63:
            return level
        raise ValueError("out of range")
    except ValueError:
        raise InputError("--fidelity", given, "is no fidelity", "Give top, any or a number.") from None
