"""The schedulers of Ray Tune that a job can name, and what they are told of the job."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.schedulers import create_scheduler
from ray.tune.schedulers.async_hyperband import AsyncHyperBandScheduler
from ray.tune.schedulers.hyperband import HyperBandScheduler
from ray.tune.schedulers.median_stopping_rule import MedianStoppingRule
from ray.tune.schedulers.trial_scheduler import FIFOScheduler, TrialScheduler

from archfront.errors import InputError, suggestion
from archfront.registry import validated_arguments

_CLASSES: dict[str, type[TrialScheduler]] = {
    "fifo": FIFOScheduler,
    "asha": AsyncHyperBandScheduler,
    "async_hyperband": AsyncHyperBandScheduler,
    "asynchyperband": AsyncHyperBandScheduler,
    "hyperband": HyperBandScheduler,
    "median_stopping_rule": MedianStoppingRule,
    "medianstopping": MedianStoppingRule,
}

_REWRITES = "rewrites a trial's configuration while it runs, and a candidate of archfront is one genotype"
_REFUSED = {
    "pbt": _REWRITES,
    "pb2": _REWRITES,
    "pbt_replay": _REWRITES,
    "hb_bohb": "works with Tune's own BOHB searcher alone, and candidates come from the job's strategy",
    "resource_changing": "changes a trial's resources, which `workers` fixes",
}

_TIME = "training_iteration"


def scheduler_settings(
    config: Mapping[str, Any], objectives: Sequence[tuple[str, str]], fidelities: Sequence[int]
) -> dict[str, Any]:
    """A job's scheduler with all its arguments: those given, and what follows from the job.

    Tune's schedulers look at one number: the job's first objective unless ``metric`` names another one. Time is the
    fidelity; ``grace_period`` is the lowest and ``max_t`` the highest one unless given.

    Args:
        config: ``name`` and arguments, as in the job file.
        objectives: ``(metric, direction)`` pairs of the job.
        fidelities: of the job, rising.

    Raises:
        InputError: an unknown or unfit scheduler, or arguments that it refuses.
    """
    field = "tune.scheduler"
    name = str(config.get("name", ""))
    if name in _REFUSED:
        remedy = f"Choose one of: {', '.join(sorted(_CLASSES))}."
        raise InputError(f"{field}.name", name, f"cannot be used: it {_REFUSED[name]}", remedy)
    if name not in _CLASSES:
        raise InputError(f"{field}.name", name, "is no scheduler of Ray Tune", suggestion(name, _CLASSES))
    cls = _CLASSES[name]
    given = {key: value for key, value in config.items() if key != "name"}
    validated_arguments(cls, given, field)
    known = inspect.signature(cls).parameters
    if "metric" not in known:
        return {"name": name, **given}
    directions = dict(objectives)
    metric = given.get("metric") or objectives[0][0]
    if metric not in directions:
        raise InputError(f"{field}.metric", metric, "is no objective of the job", suggestion(metric, directions))
    if given.get("mode") not in (None, directions[metric]):
        problem = f"is not the direction of the objective {metric}"
        raise InputError(f"{field}.mode", given["mode"], problem, f"Leave it out, or give {directions[metric]!r}.")
    if given.get("time_attr", _TIME) != _TIME:
        problem = "is not known: a scheduler's time is the fidelity"
        raise InputError(f"{field}.time_attr", given["time_attr"], problem, "Leave it out.")
    implied = {"grace_period": max(1, fidelities[0]), "max_t": max(1, fidelities[-1])}
    settings = {key: value for key, value in implied.items() if key in known} | given
    settings |= {"metric": metric, "mode": directions[metric], "time_attr": _TIME}
    made = {"name": name, **settings}
    try:
        make_scheduler(made)
    except (AssertionError, ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(field, dict(config), f"is refused by Ray Tune ({error})", "Change its arguments.") from None
    return made


def make_scheduler(settings: Mapping[str, Any]) -> TrialScheduler:
    """The scheduler of ``scheduler_settings``."""
    arguments = {key: value for key, value in settings.items() if key != "name"}
    cls = _CLASSES[settings["name"]]
    # Tune's own factory knows it by another name where we have added a shorter one.
    return cls(**arguments) if settings["name"] == "asha" else create_scheduler(settings["name"], **arguments)
