"""Any run of Ray Tune, with anyone's trainable and search, written to the ledger as a job."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray.tune import Callback

from archfront.db.columns import FIXED
from archfront.db.ledger import Ledger
from archfront.errors import InputError
from archfront.search.recording import Ending, Recorder, Trial
from archfront.search.tune.objectives import read_objectives

_RESERVED = {*FIXED, "evaluation", "key", "genotype"}
_NOT_METRICS = {
    "pid", "timestamp", "done", "trial_id", "date", "hostname", "node_ip", "config", "experiment_tag",
    "time_since_restore", "timesteps_since_restore", "iterations_since_restore", "checkpoint_dir_name",
    "should_checkpoint",
}  # fmt: skip
_LONGEST_NAME = 100


class LedgerCallback(Callback):
    """Records a Tune run: one evaluation for each trial, its configuration as the candidate.

    Every trial is written ahead when it starts and committed when it ends, with the numbers of its last result; a
    trial that raised is a failed evaluation with its error. A driver that is killed leaves all that was committed. A
    restored run is recorded as a job of its own.

    Args:
        db: path of a SQLite file, or a database URL.
        name: of the job.
        metric: the metric, or metrics, whose front is kept.
        mode: ``min`` or ``max``, for each metric.
        every_result: record every result as an evaluation at the fidelity ``training_iteration``, instead of each
            trial's last.

    Raises:
        InputError: a metric or mode that no job can have.
    """

    def __init__(
        self,
        db: str | Path,
        name: str,
        metric: str | Sequence[str],
        mode: str | Sequence[str],
        *,
        every_result: bool = False,
    ) -> None:
        self._objectives = read_objectives(metric, mode)
        for given, _ in self._objectives:
            if given in _RESERVED or given in _NOT_METRICS:
                raise InputError("metric", given, "is no metric of a trial", "Report the metric under another name.")
        # Tune may change the working directory between now and the start.
        self._db = str(db) if "://" in str(db) else str(Path(db).absolute())
        self._name = name
        self._every_result = every_result
        self._job_id: int | None = None
        self._recorder: Recorder | None = None
        self._held = ExitStack()
        self._numbers: dict[str, int] = {}
        self._started_at: dict[str, float] = {}

    @property
    def job_id(self) -> int | None:
        """Of the job, once the run has begun."""
        return self._job_id

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        self._numbers.clear()
        self._started_at.clear()
        ledger = Ledger.open(self._db)
        self._held.callback(ledger.close)
        recorder = Recorder(ledger, self._name, source="ray-tune", objectives=self._objectives)
        self._recorder = self._held.enter_context(recorder)
        self._job_id = recorder.job_id

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started_at.setdefault(trial.trial_id, time.time())
        if not self._every_result:
            self._number(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._every_result and self._recorder is not None:
            fidelity = int(result.get("training_iteration", 0))
            [number] = self._recorder.start([Trial(genotype=plain(trial.config), fidelity=fidelity)])
            self._finish(number, trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._every_result:
            result = trial.last_result or {}
            self._finish(self._number(trial), trial, result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._number(trial)
        result = trial.last_result or {}
        # With every result recorded, the numbers of the last one stand at its own evaluation.
        metrics = {} if self._every_result else numeric(result)
        words = _text(_error_of(trial))
        self._end(Ending(number=number, metrics=metrics, error=words, **self._facts(trial, result)))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._held.close()
        self._recorder = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks with the experiment; a connection does not travel.
        return self.__dict__ | {"_recorder": None, "_held": None, "_numbers": {}, "_started_at": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = ExitStack()

    def _number(self, trial: Any) -> int:
        """The evaluation of a trial that has not ended, written ahead if it is new."""
        assert self._recorder is not None
        if trial.trial_id not in self._numbers:
            fidelity = int((trial.last_result or {}).get("training_iteration", 0)) + 1 if self._every_result else 0
            entry = Trial(genotype=plain(trial.config), fidelity=fidelity)
            [self._numbers[trial.trial_id]] = self._recorder.start([entry])
        return self._numbers[trial.trial_id]

    def _finish(self, number: int, trial: Any, result: Mapping[str, Any]) -> None:
        self._end(Ending(number=number, metrics=numeric(result), **self._facts(trial, result)))
        self._numbers.pop(trial.trial_id, None)

    def _end(self, ending: Ending) -> None:
        assert self._recorder is not None
        self._recorder.finish([ending])

    def _facts(self, trial: Any, result: Mapping[str, Any]) -> dict[str, Any]:
        duration = result.get("time_this_iter_s" if self._every_result else "time_total_s")
        return {
            "worker": f"{result.get('node_ip', 'unknown')}:{result.get('pid', 0)}",
            "started_at": self._started_at.get(trial.trial_id),
            "duration_s": duration if isinstance(duration, float) and math.isfinite(duration) else None,
        }


def numeric(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a Tune result, nested ones by ``outer/inner``, without what Tune says of the process."""
    found: dict[str, float] = {}

    def take(prefix: str, entries: Mapping[str, Any]) -> None:
        for key, value in entries.items():
            name = f"{prefix}{key}"
            if name in _RESERVED or name in _NOT_METRICS or len(name) > _LONGEST_NAME:
                continue
            if isinstance(value, Mapping):
                take(f"{name}/", value)
            elif isinstance(value, numbers.Real) and not isinstance(value, bool):
                found[name] = float(value)

    take("", result)
    return found


def plain(value: Any) -> Any:
    """A configuration as JSON; what JSON lacks (objects, NaN) as its ``repr``."""
    if isinstance(value, Mapping):
        return {_text(str(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return _text(repr(value))


def _error_of(trial: Any) -> str:
    """The last line of a failed trial's error, which names the exception."""
    try:
        # The driver's own copy: it reaches the run's storage later.
        lines = Path(trial.error_file).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except (OSError, TypeError):
        lines = []
    return lines[-1] if lines else "the trial failed"


def _text(words: str) -> str:
    """Text that every database takes."""
    return words.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
