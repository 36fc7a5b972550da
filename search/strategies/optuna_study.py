"""An Optuna study that can be taken back and played again, with all the state of a search in the study itself."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

CONSTRAINT = "constraints:violation"
"""Where ``Trial.set_constraint("violation", ...)`` keeps its value."""


@dataclass(frozen=True)
class _Mark:
    trials: int
    system_attrs: dict[str, Any]
    best_trial: int | None


class RewindableStorage(InMemoryStorage):
    """Optuna's storage in memory, with a way back to an earlier moment.

    The way back costs nothing, because the parent never changes a trial or an attribute mapping in place: it puts a
    changed copy in its stead. Only trials that are younger than the mark may have changed.
    """

    def mark(self, study: int) -> _Mark:
        info = self._studies[study]
        return _Mark(len(info.trials), info.system_attrs, info.best_trial_id)

    def rewind(self, study: int, mark: _Mark) -> None:
        info = self._studies[study]
        for trial in info.trials[mark.trials :]:
            del self._trial_id_to_study_id_and_number[trial._trial_id]
        del info.trials[mark.trials :]
        info.system_attrs = mark.system_attrs
        info.best_trial_id = mark.best_trial
        self._max_trial_id = mark.trials - 1
        self._prev_waiting_trial_number[study] = min(self._prev_waiting_trial_number[study], mark.trials)

    def new_trial(
        self,
        study: int,
        params: dict[str, int],
        distributions: dict[str, BaseDistribution],
        attrs: dict[str, Any],
    ) -> FrozenTrial:
        """A running trial with all its parameters, as if it had been suggested."""
        template = self._create_running_trial()
        template.params = dict(params)
        template.distributions = dict(distributions)
        template.system_attrs = dict(attrs)
        return self.get_trial(self.create_new_trial(study, template))

    def make_constrained(self, study: int) -> None:
        """Say of every finished trial that it was feasible: samplers want all trials to have the same constraints."""
        for trial in self._studies[study].trials:
            if trial.state == TrialState.COMPLETE:
                changed = copy.copy(trial)
                changed.system_attrs = {**trial.system_attrs, CONSTRAINT: 0.0}
                self._set_trial(trial._trial_id, changed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes on each study and its warnings of experimental samplers."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def reseed(sampler: object, *entropy: int) -> None:
    """Seed every random state that a sampler holds, nested samplers' and not yet created ones included.

    Each gets its own stream. ``BaseSampler.reseed_rng`` is of no use here: it seeds from the system's entropy.
    """
    states = random_states(sampler)
    seeds = np.random.SeedSequence(entropy).generate_state(max(len(states), 1))
    for state, seed in zip(states, seeds.tolist(), strict=False):
        state.rng.seed(seed)


def random_states(root: object) -> list[LazyRandomState]:
    """The distinct random states that are reachable from an object's attributes, in a fixed order."""
    found: list[LazyRandomState] = []
    visited: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop(0)
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, LazyRandomState):
            found.append(item)
        elif isinstance(item, (np.random.RandomState, np.random.Generator)):
            # A state that we do not know how to seed would make two runs differ in silence.
            raise TypeError(f"{type(root).__name__} holds a {type(item).__name__} that archfront cannot seed")
        elif isinstance(item, (list, tuple)) and len(item) < 100:
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, BaseSampler) or type(item).__module__.startswith("optuna.samplers"):
            waiting.extend(vars(item).values() if hasattr(item, "__dict__") else [])
    return found


class PlainCmaEsSampler(optuna.samplers.CmaEsSampler):
    """CMA-ES whose optimiser is kept in the study as JSON.

    Optuna keeps it as a pickle in a trial's attributes. These attributes go through our database, and nothing that
    comes from a database may be unpickled.
    """

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        # This very process made the text a moment ago.
        optimizer = pickle.loads(bytes.fromhex(optimizer_str))
        return {f"{self._attr_key_optimizer}:0": json.dumps(_plain(optimizer))}

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        key = f"{self._attr_key_optimizer}:0"
        for trial in reversed(completed_trials):
            if key in trial.system_attrs:
                return _restored(json.loads(trial.system_attrs[key]))
        return None


_UNUSED = ("_funhist_values",)
"""Memory that cmaes leaves uninitialised and reads only in ``should_stop``, which nobody asks: it would make the
record of two equal runs differ."""

_ARRAYS = ("float64", "int64", "bool")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _ARRAYS:
            raise TypeError(f"an array of {value.dtype} in an optimiser of cmaes")
        return {"dtype": value.dtype.name, "shape": list(value.shape), "bytes": value.tobytes().hex()}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value).__module__.split(".")[0] == "cmaes":
        state = {name: item for name, item in value.__getstate__().items() if name != "_rng"}
        state |= {name: np.zeros_like(state[name]) for name in _UNUSED if name in state}
        return {"class": type(value).__name__, "state": {name: _plain(item) for name, item in state.items()}}
    raise TypeError(f"{type(value).__name__} in an optimiser of cmaes")


def _restored(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        if value["dtype"] not in _ARRAYS:
            raise ValueError(f"an array of {value['dtype']} in a stored optimiser")
        flat = np.frombuffer(bytes.fromhex(value["bytes"]), dtype=value["dtype"])
        return flat.reshape(value["shape"]).copy()
    import cmaes

    classes = {"CMA": cmaes.CMA, "SepCMA": cmaes.SepCMA, "CMAwM": cmaes.CMAwM}
    optimizer = object.__new__(classes[value["class"]])
    state = {name: _restored(item) for name, item in value["state"].items()}
    if hasattr(optimizer, "__setstate__"):
        optimizer.__setstate__(state)
    else:
        vars(optimizer).update(state)
    return optimizer
