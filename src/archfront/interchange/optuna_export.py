"""A job as an Optuna study: what optuna-dashboard opens and Optuna goes on with.

An evaluation becomes the trial of its number. Done at the job's top fidelity it is COMPLETE, so that the study's best
trials are the job's front; done at a lower one, or cancelled, it is PRUNED; failed is FAIL. What Optuna has no place
for stands in user attributes that begin with ``archfront:``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)
from optuna.storages import JournalStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection

from archfront.client import Job
from archfront.db.connection import without_password
from archfront.db.queries import job_objectives, top_fidelity
from archfront.db.schema import Candidate, Evaluation
from archfront.db.walking import WALK_ROWS, Walked, snapshot, walk
from archfront.errors import InputError
from archfront.export import space_of
from archfront.interchange.optuna_storage import (
    DatabaseWriter,
    JournalWriter,
    TrialWriter,
    finite,
    open_storage,
    study_names,
)
from archfront.interchange.registry import Written
from archfront.search.strategies.optuna_study import quiet
from archfront.spaces.product import ColumnSpace
from archfront.spaces.space import Space

STEP = "step:"
"""Metrics of this name are what a trial reported at a step."""

_MOST_CHOICES = 1000
_SCALARS = (str, int, float, bool, type(None))


def export_study(job: Job, to: str) -> Written:
    """Write a job to a storage of Optuna, as a new study of the job's name.

    Raises:
        InputError: the storage cannot be used, or has a study of that name.
    """
    with quiet():
        storage, named = open_storage(to, "--to", create=True)
        if job.name in study_names(storage):
            remedy = (
                f"Delete it (optuna delete-study --study-name {job.name!r} --storage ...), or name another storage."
            )
            raise InputError("--to", without_password(to), f"has a study {job.name!r} already", remedy)
        objectives = job_objectives(job.spec)
        better = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
        directions = [better[direction] for _, direction in objectives]
        study = optuna.create_study(storage=storage, study_name=job.name, directions=directions)
        try:
            study.set_metric_names([metric for metric, _ in objectives])
            study.set_user_attr("archfront:job", job.id)
            study.set_user_attr("archfront:spec", job.spec)
            with snapshot(job.ledger.engine) as reading, _writer(storage, study._study_id, to) as writer:
                making = TrialMaker(job, reading)
                count = 0
                for chunk in walk(reading, job.id):
                    writer.write([making.trial(walked) for walked in chunk])
                    count += len(chunk)
        except BaseException:
            storage.delete_study(study._study_id)
            raise
    return Written(what=f"the study {job.name!r} with {count:,} trials", to=named)


@contextmanager
def _writer(storage: Any, study_id: int, to: str) -> Iterator[TrialWriter]:
    if isinstance(storage, JournalStorage):
        yield JournalWriter(to, study_id)
        return
    assert isinstance(storage, RDBStorage)
    with storage.engine.begin() as connection:
        yield DatabaseWriter(connection, study_id)


class TrialMaker:
    """Makes the trials of one job."""

    def __init__(self, job: Job, connection: Connection) -> None:
        self._objectives = [metric for metric, _ in job_objectives(job.spec)]
        self._top = top_fidelity(connection, job.id)
        self._created_at = float(job.row["created_at"])
        bad = sa.select(sa.literal(1)).where(Evaluation.job_id == job.id, Evaluation.violation > 0).limit(1)
        self._constrained = bool(job.spec["constraints"]) or connection.execute(bad).first() is not None
        self._space: Space | None = None
        if job.spec["space"]["name"] == "recorded":
            self._distributions = _recorded(job.spec) or _observed(connection, job.id)
            return
        space = space_of(job)
        self._distributions = {}
        if isinstance(space, ColumnSpace):
            self._space = space
            self._distributions = {
                column.name: CategoricalDistribution([_choice(choice) for choice in column.choices])
                for column in space.columns
            }

    def trial(self, walked: Walked) -> FrozenTrial:
        row = walked.row
        params, attrs = self._params(walked.genotype)
        attrs |= {"archfront:key": walked.key}
        state = self._state(row)
        values = None
        found = [walked.metrics[name].value for name in self._objectives if name in walked.metrics]
        # A pruned trial of Optuna's own has its last report as its value.
        if row["state"] == "done" or (row["state"] == "cancelled" and len(found) == len(self._objectives)):
            values = found
        shown = {"fidelity": row["fidelity"], "worker": row["worker"], "error": row["error"]}
        attrs |= {f"archfront:{name}": value for name, value in shown.items() if value is not None}
        if state == TrialState.PRUNED:
            attrs["archfront:state"] = row["state"]
        steps: dict[int, float] = {}
        for name, metric in walked.metrics.items():
            if name.startswith(STEP) and name[len(STEP) :].isdecimal():
                steps[int(name[len(STEP) :])] = metric.value
            elif (values is None or name not in self._objectives) and finite(metric.value):
                attrs[name] = metric.value
        for fact, usual in (("std", None), ("provenance", "measured")):
            stated = {name: getattr(metric, fact) for name, metric in walked.metrics.items()}
            if unusual := {name: value for name, value in stated.items() if value != usual}:
                attrs[f"archfront:{fact}"] = unusual
        constraints = {"constraints": [row["violation"]]} if self._constrained and row["violation"] is not None else {}
        started, finished = self._times(row)
        return FrozenTrial(
            number=walked.number,
            state=state,
            value=None,
            values=values,
            datetime_start=started,
            datetime_complete=finished,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs=attrs,
            system_attrs=constraints,
            intermediate_values=steps,
            trial_id=-1,
        )

    def _state(self, row: Mapping[str, Any]) -> TrialState:
        if row["state"] == "done":
            return TrialState.COMPLETE if row["fidelity"] == self._top else TrialState.PRUNED
        return {"failed": TrialState.FAIL, "cancelled": TrialState.PRUNED, "running": TrialState.RUNNING}[row["state"]]

    def _times(self, row: Mapping[str, Any]) -> tuple[datetime, datetime | None]:
        finished = row["finished_at"]
        if finished is None:
            return datetime.fromtimestamp(row["started_at"] or self._created_at), None
        started = row["started_at"] or finished - (row["duration_s"] or 0.0)
        # Hosts' clocks differ: the one of the worker may be ahead of the database's.
        return datetime.fromtimestamp(min(started, finished)), datetime.fromtimestamp(finished)

    def _params(self, genotype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, and the genotype as an attribute where they do not hold all of it. A decision that does not
        count is no parameter of the trial, as Optuna has it."""
        if isinstance(self._space, ColumnSpace):
            rows = self._space.from_json([genotype])
            decided = zip(self._space.columns, rows[0], self._space.active(rows)[0], strict=True)
            return {column.name: _choice(column.choices[i]) for column, i, active in decided if active}, {}
        params = {}
        if isinstance(genotype, dict):
            for name, value in genotype.items():
                distribution = self._distributions.get(name)
                if distribution is not None and _contains(distribution, _choice(value)):
                    params[name] = _choice(value)
        return params, {} if params == genotype else {"archfront:genotype": genotype}


def _choice(value: Any) -> Any:
    """A choice as Optuna takes it: its own kinds of scalars, anything else as JSON."""
    return value if isinstance(value, _SCALARS) else json.dumps(value)


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (ValueError, TypeError):
        return False


def _recorded(spec: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The distributions of the study that a job was imported from."""
    kept: Mapping[str, str] = spec["evaluators"][0].get("distributions", {})
    return {name: json_to_distribution(text) for name, text in kept.items()}


def _observed(connection: Connection, job_id: int) -> dict[str, BaseDistribution]:
    """Distributions that hold everything that was tried: of configurations whose space nobody wrote down."""
    seen: dict[str, dict[str, Any]] = {}
    query = (
        sa.select(Candidate.genotype)
        .join(Evaluation, Evaluation.candidate_id == Candidate.id)
        .where(Evaluation.job_id == job_id)
        .execution_options(yield_per=WALK_ROWS)
    )
    for genotype in connection.execute(query).scalars():
        for name, value in genotype.items() if isinstance(genotype, dict) else ():
            _see(seen.setdefault(name, {"kinds": set(), "low": value, "high": value, "values": {}}), value)
    return {name: found for name, facts in seen.items() if (found := _spanned(facts)) is not None}


def _see(facts: dict[str, Any], value: Any) -> None:
    kind = type(value) if finite(value) else str
    facts["kinds"].add(kind)
    if facts["kinds"] <= {int, float}:
        facts["low"], facts["high"] = min(facts["low"], value), max(facts["high"], value)
    if len(facts["values"]) <= _MOST_CHOICES:
        facts["values"][json.dumps(_choice(value))] = _choice(value)


def _spanned(facts: Mapping[str, Any]) -> BaseDistribution | None:
    if facts["kinds"] == {int}:
        return IntDistribution(facts["low"], facts["high"])
    if facts["kinds"] <= {int, float}:
        return FloatDistribution(facts["low"], facts["high"])
    choices: Sequence[Any] = list(facts["values"].values())
    return CategoricalDistribution(choices) if len(choices) <= _MOST_CHOICES else None
