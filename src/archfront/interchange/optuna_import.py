"""An Optuna study as a job of the ledger: each trial one evaluation of its number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from archfront.db.columns import FIXED
from archfront.db.ledger import Ledger
from archfront.db.schema import PROVENANCES
from archfront.db.schema import Job as JobRow
from archfront.errors import InputError, suggestion
from archfront.interchange.optuna_export import STEP
from archfront.interchange.optuna_storage import finite, open_storage, study_names
from archfront.search.recording import Ending, Recorder, Trial
from archfront.search.strategies.optuna_study import quiet

SOURCE = "optuna"
_CHUNK = 1000
_MOST_STEPS = 200
"""With more steps than this in a study, only the last report of each trial becomes a metric: each costs a column."""

_LONGEST_NAME = 100
_TAKEN = {*FIXED, "evaluation", "key", "genotype"}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import brought: trials by how they ended here (done, failed, cancelled)."""

    job_id: int
    name: str
    endings: dict[str, int]


def import_study(ledger: Ledger, storage: str, study_name: str, name: str | None = None) -> Imported:
    """Enter a study as a new job.

    Args:
        storage: database URL, SQLite file or journal file.
        name: of the job; the study's if None.

    Raises:
        InputError: no such storage or study, nothing that can be a job, or it was imported under this name before.
            Nothing was stored.
    """
    study, place = find_study(storage, study_name)
    with quiet():
        trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
        objectives = _objectives(study)
    job_name = study_name if name is None else name
    _refuse_twice(ledger, job_name, study_name, place)
    reading = _Reader([metric for metric, _ in objectives], trials)
    about = {"study": study_name, "storage": place, "distributions": reading.distributions()}
    try:
        recorder = Recorder(ledger, job_name, source=SOURCE, objectives=objectives, about=about)
    except InputError as error:
        if error.field == "name":
            raise InputError("--name", job_name, error.problem, f"{error.remedy} Give another with --name.") from None
        raise
    endings = {"done": 0, "failed": 0, "cancelled": 0}
    with recorder:
        for chunk in _chunks(trials):
            numbers = recorder.start([Trial(genotype=reading.genotype(t), fidelity=_fidelity(t)) for t in chunk])
            made = [reading.ending(number, trial) for number, trial in zip(numbers, chunk, strict=True)]
            recorder.finish(made)
            for ending in made:
                endings["cancelled" if ending.cancelled else "done" if ending.error is None else "failed"] += 1
    return Imported(job_id=recorder.job_id, name=job_name, endings=endings)


def find_study(storage: str, study_name: str) -> tuple[optuna.Study, str]:
    """A study, and its storage in words that hold no password.

    Raises:
        InputError: no such storage or study.
    """
    with quiet():
        opened, place = open_storage(storage, "STORAGE", create=False)
        known = study_names(opened)
        if study_name not in known:
            raise InputError("STUDY", study_name, "is no study of this storage", suggestion(study_name, known))
        return optuna.load_study(study_name=study_name, storage=opened), place


class _Reader:
    """Reads the trials of one study.

    Raises:
        InputError: an attribute that no metric can be named after.
    """

    def __init__(self, objectives: Sequence[str], trials: Sequence[FrozenTrial]) -> None:
        self._objectives = objectives
        self._trials = trials
        steps = {step for trial in trials for step in trial.intermediate_values}
        self._all_steps = len(steps) <= _MOST_STEPS and all(step >= 0 for step in steps)
        for name in {name for trial in trials for name, value in trial.user_attrs.items() if finite(value)}:
            if len(name) > _LONGEST_NAME:
                remedy = f"Give it a name of at most {_LONGEST_NAME} characters in the study."
                raise InputError("STUDY", name, "is a user attribute with too long a name for a metric", remedy)

    def distributions(self) -> dict[str, str]:
        """The first distribution of each parameter, as Optuna's JSON: what an export makes parameters of again."""
        found: dict[str, str] = {}
        for trial in self._trials:
            for name, distribution in trial.distributions.items():
                if name not in found:
                    found[name] = distribution_to_json(distribution)
        return found

    def genotype(self, trial: FrozenTrial) -> Any:
        if "archfront:genotype" in trial.user_attrs:
            return _plain(trial.user_attrs["archfront:genotype"])
        # A trial that waits has none yet but those that it was enqueued with.
        return _plain(dict(trial.params) or dict(trial.system_attrs.get("fixed_params", {})))

    def ending(self, number: int, trial: FrozenTrial) -> Ending:
        attrs = trial.user_attrs
        state = _state(trial)
        error = None
        if state == "failed":
            told = attrs.get("archfront:error") or trial.system_attrs.get("fail_reason") or "failed in Optuna"
            error = str(told).replace("\0", "")
        metrics = self._metrics(trial)
        if state == "done":
            missing = [name for name in self._objectives if not math.isfinite(metrics.get(name, math.nan))]
            error = f"no finite {', '.join(missing)}" if missing else None
        started, ended = trial.datetime_start, trial.datetime_complete
        return Ending(
            number=number,
            metrics=metrics,
            std={n: v for n, v in _mapping(attrs, "archfront:std").items() if n in metrics and finite(v)},
            provenance={n: v for n, v in _mapping(attrs, "archfront:provenance").items() if v in PROVENANCES},
            error=error,
            cancelled=state == "cancelled",
            violation=sum(_excess(value) for value in trial.constraints.values()),
            worker=_text(attrs.get("archfront:worker")),
            started_at=None if started is None else started.timestamp(),
            duration_s=None if started is None or ended is None else (ended - started).total_seconds(),
        )

    def _metrics(self, trial: FrozenTrial) -> dict[str, float]:
        metrics = {
            _free(n): float(v) for n, v in trial.user_attrs.items() if finite(v) and not n.startswith("archfront:")
        }
        reported = trial.intermediate_values
        if self._all_steps:
            metrics |= {f"{STEP}{step}": float(value) for step, value in reported.items()}
        elif reported:
            last = max(reported)
            metrics |= {"last_step": float(last), "last_reported": float(reported[last])}
        if trial.values is not None:
            metrics |= dict(zip(self._objectives, map(float, trial.values), strict=True))
        return metrics


def _state(trial: FrozenTrial) -> str:
    own = trial.user_attrs.get("archfront:state")
    if trial.state == TrialState.COMPLETE or (own == "done" and trial.values is not None):
        return "done"
    return "failed" if trial.state == TrialState.FAIL else "cancelled"


def _fidelity(trial: FrozenTrial) -> int:
    given = trial.user_attrs.get("archfront:fidelity", 0)
    return given if isinstance(given, int) and abs(given) < 2**31 else 0


def _objectives(study: optuna.Study) -> list[tuple[str, str]]:
    directions = {StudyDirection.MAXIMIZE: "max", StudyDirection.MINIMIZE: "min"}
    if any(direction not in directions for direction in study.directions):
        raise InputError("STUDY", study.study_name, "has no directions", "Only a study that optimises values is a job.")
    several = len(study.directions) > 1
    names = study.metric_names or [f"value_{i}" if several else "value" for i in range(len(study.directions))]
    if len(set(names)) < len(names) or any(not 0 < len(name) <= _LONGEST_NAME for name in names):
        remedy = f"Give each another one, of 1 to {_LONGEST_NAME} characters, with study.set_metric_names."
        raise InputError("STUDY", study.study_name, f"names its values {names}", remedy)
    return [(_free(name), directions[d]) for name, d in zip(names, study.directions, strict=True)]


def _refuse_twice(ledger: Ledger, name: str, study: str, place: str) -> None:
    query = sa.select(JobRow.id, JobRow.spec).where(JobRow.name == name, JobRow.state != "failed")
    with ledger.engine.connect() as connection:
        for job_id, spec in connection.execute(query):
            about = spec["evaluators"][0] if spec.get("evaluators") else {}
            if (about.get("name"), about.get("study"), about.get("storage")) == (SOURCE, study, place):
                remedy = "Give another name with --name to import it once more, as it is now."
                raise InputError("STUDY", study, f"was imported as job {job_id} of the name {name!r}", remedy)


def _chunks(trials: Sequence[FrozenTrial]) -> Iterator[Sequence[FrozenTrial]]:
    for start in range(0, len(trials), _CHUNK):
        yield trials[start : start + _CHUNK]


def _free(name: str) -> str:
    """A metric's name that is no column of the ledger's own tables."""
    return f"user_{name}" if name in _TAKEN else name


def _plain(value: Any) -> Any:
    """A genotype with numbers that JSON does not have as text: "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mapping(attrs: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = attrs.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:255].replace("\0", "")


def _excess(constraint: float) -> float:
    """How far a constraint is violated: Optuna takes a trial for feasible where all are at most 0."""
    return max(constraint, 0.0) if constraint == constraint else math.inf
