"""Opening Optuna's storages, and writing trials to them in bulk.

Optuna's own ``add_trial`` counts all earlier trials for each new one, and its journal keeps all of them in memory:
neither serves a million rows. So trials go to the tables of its schema, and to its journal as the very lines that it
writes. Both are fixed by Optuna's own migrations within a major version; the tests read everything back through it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from archfront.db.connection import without_password
from archfront.errors import InputError

_SQLITE = b"SQLite format 3\0"


def open_storage(text: str, field: str, *, create: bool) -> tuple[BaseStorage, str]:
    """A storage of Optuna: a database URL, a SQLite file, or a journal file.

    Args:
        field: what the user calls it, for messages.
        create: make what is missing; a path that does not exist then becomes a journal.

    Returns:
        the storage, and its name for the records: absolute, without a password.

    Raises:
        InputError: missing, of an unknown kind, something else than Optuna's, or of another Optuna's schema.
    """
    if "://" not in text:
        path = Path(text)
        if path.is_file() and _begins(path, _SQLITE):
            text = f"sqlite:///{path}"
        else:
            return _open_journal(path, field, create=create)
    return _open_database(text, field, create=create)


def _open_journal(path: Path, field: str, *, create: bool) -> tuple[BaseStorage, str]:
    if not path.exists() and not create:
        raise InputError(
            field, without_password(str(path)), "does not exist", "Give a database URL, or the path of a journal file."
        )
    if not path.absolute().parent.is_dir():
        raise InputError(
            field, without_password(str(path)), "lies in a folder that does not exist", "Make the folder first."
        )
    if path.is_dir():
        raise InputError(
            field, without_password(str(path)), "is a folder", "Give a database URL, or the path of a journal file."
        )
    try:
        return JournalStorage(JournalFileBackend(str(path))), str(path.resolve())
    except (ValueError, KeyError, TypeError, AssertionError):
        raise InputError(
            field, without_password(str(path)), "is no journal of Optuna", "Give another file, or a database URL."
        ) from None


def _open_database(text: str, field: str, *, create: bool) -> tuple[BaseStorage, str]:
    shown = without_password(text)
    remedy = "Give e.g. sqlite:///study.db, postgresql+psycopg://HOST/NAME, or the path of a journal file."
    try:
        url = make_url(text)
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise InputError(field, shown, "is no database URL", remedy) from None
    except ImportError as error:
        raise InputError(field, shown, f"needs a driver that is not installed ({error})", remedy) from None
    named = without_password(url.render_as_string(hide_password=False))
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "").absolute()
        if not url.database or (not path.exists() and not create):
            raise InputError(field, shown, "does not exist", remedy)
        if not path.parent.is_dir():
            raise InputError(field, shown, "lies in a folder that does not exist", "Make the folder first.")
        named = f"sqlite:///{path.resolve()}"
    try:
        engine = sa.create_engine(url)
        with engine.connect() as connection:
            tables = set(sa.inspect(connection).get_table_names())
        engine.dispose()
        own = "trials" in tables and "studies" in tables
        if not own and (tables or not create):
            # Optuna would put its tables among those of another program, and a version of its own.
            raise InputError(field, shown, "holds no studies of Optuna", "Name another database.")
        return RDBStorage(text, skip_table_creation=own), named
    except ImportError as error:
        raise InputError(field, shown, f"needs a driver that is not installed ({error})", remedy) from None
    except RuntimeError as error:
        raise InputError(field, shown, f"cannot be used: {error}", "Bring it to this Optuna's schema first.") from None
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", error)).strip()
        raise InputError(field, shown, f"cannot be used: {cause}", "Check that it can be reached.") from None


class TrialWriter(ABC):
    """Appends trials to a study that nobody else writes to; their numbers follow the order."""

    @abstractmethod
    def write(self, trials: Sequence[FrozenTrial]) -> None:
        """Append trials; ``datetime_start`` and ``datetime_complete`` are naive local times, as Optuna has them."""


class DatabaseWriter(TrialWriter):
    """Rows of Optuna's schema, in a transaction that the caller holds."""

    def __init__(self, connection: sa.Connection, study_id: int) -> None:
        self._connection = connection
        self._study_id = study_id
        self._count = 0

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        if not trials:
            return
        rows = [
            {
                "number": self._count + i,
                "study_id": self._study_id,
                "state": trial.state,
                "datetime_start": _utc(trial.datetime_start),
                "datetime_complete": _utc(trial.datetime_complete),
            }
            for i, trial in enumerate(trials)
        ]
        self._count += len(trials)
        ids = self._ids(rows)
        values, params, steps = models.TrialValueModel, models.TrialParamModel, models.TrialIntermediateValueModel
        self._insert(
            values,
            [
                {"trial_id": id_, "objective": i} | _stored(("value", "value_type"), values.value_to_stored_repr(v))
                for id_, trial in zip(ids, trials, strict=True)
                for i, v in enumerate(trial.values or [])
            ],
        )
        self._insert(
            params,
            [
                {
                    "trial_id": id_,
                    "param_name": name,
                    "param_value": trial.distributions[name].to_internal_repr(value),
                    "distribution_json": _as_json(trial.distributions[name]),
                }
                for id_, trial in zip(ids, trials, strict=True)
                for name, value in trial.params.items()
            ],
        )
        names = ("intermediate_value", "intermediate_value_type")
        self._insert(
            steps,
            [
                {"trial_id": id_, "step": step} | _stored(names, steps.intermediate_value_to_stored_repr(v))
                for id_, trial in zip(ids, trials, strict=True)
                for step, v in trial.intermediate_values.items()
            ],
        )
        for model, attribute in (
            (models.TrialUserAttributeModel, "user_attrs"),
            (models.TrialSystemAttributeModel, "system_attrs"),
        ):
            self._insert(
                model,
                [
                    {"trial_id": id_, "key": key, "value_json": json.dumps(value)}
                    for id_, trial in zip(ids, trials, strict=True)
                    for key, value in getattr(trial, attribute).items()
                ],
            )

    def _ids(self, rows: list[dict[str, Any]]) -> list[int]:
        table = models.TrialModel.__table__
        if self._connection.dialect.insert_executemany_returning_sort_by_parameter_order:
            insert = sa.insert(table).returning(table.c.trial_id, sort_by_parameter_order=True)
            return [int(i) for i in self._connection.execute(insert, rows).scalars()]
        # MySQL gives back no keys of many rows.
        self._insert(models.TrialModel, rows)
        numbers = [row["number"] for row in rows]
        mine = (table.c.study_id == self._study_id) & (table.c.number >= numbers[0])
        found = sa.select(table.c.trial_id).where(mine).order_by(table.c.number)
        return [int(i) for i in self._connection.execute(found).scalars()]

    def _insert(self, model: Any, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._connection.execute(sa.insert(model.__table__), rows)


class JournalWriter(TrialWriter):
    """Lines of Optuna's journal, many in one append."""

    def __init__(self, path: str, study_id: int) -> None:
        self._backend = JournalFileBackend(path)
        self._study_id = study_id

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        if trials:
            self._backend.append_logs([self._line(trial) for trial in trials])

    def _line(self, trial: FrozenTrial) -> dict[str, Any]:
        several = trial.values is not None and len(trial.values) > 1
        line = {
            "op_code": int(JournalOperation.CREATE_TRIAL),
            "worker_id": "archfront",
            "study_id": self._study_id,
            "datetime_start": _zoned(trial.datetime_start),
            "state": int(trial.state),
            "value": None if several or not trial.values else trial.values[0],
            "values": trial.values if several else None,
            "distributions": {name: _as_json(d) for name, d in trial.distributions.items()},
            "params": {name: trial.distributions[name].to_internal_repr(v) for name, v in trial.params.items()},
            "user_attrs": trial.user_attrs,
            "system_attrs": trial.system_attrs,
            "intermediate_values": trial.intermediate_values,
        }
        if trial.datetime_complete is not None:
            line["datetime_complete"] = _zoned(trial.datetime_complete)
        return line


_texts: dict[int, tuple[BaseDistribution, str]] = {}


def _as_json(distribution: BaseDistribution) -> str:
    # One distribution serves all trials of a study: it is written out once. Kept with its text, so that its id stays
    # its own.
    found = _texts.get(id(distribution))
    if found is None:
        if len(_texts) > 100_000:
            _texts.clear()
        found = _texts[id(distribution)] = (distribution, distribution_to_json(distribution))
    return found[1]


def _stored(names: tuple[str, str], pair: tuple[Any, Any]) -> dict[str, Any]:
    return dict(zip(names, pair, strict=True))


def _utc(local: datetime | None) -> datetime | None:
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _zoned(local: datetime | None) -> str | None:
    return None if local is None else local.astimezone(UTC).isoformat(timespec="microseconds")


def _begins(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def study_names(storage: BaseStorage) -> list[str]:
    return sorted(study.study_name for study in storage.get_all_studies())


def finite(value: Any) -> bool:
    """Whether a value is a number that JSON and a float can hold; truth values are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
