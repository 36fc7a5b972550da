"""What a job file may set of an Optuna sampler, read off the sampler's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from optuna.samplers import BaseSampler, nsgaii
from pydantic import Field

_TYPES: Mapping[str, Any] = {
    "bool": bool,
    "bool | None": bool | None,
    "float": float,
    "float | None": float | None,
    "int": Annotated[int, Field(ge=1)],
    "int | None": Annotated[int | None, Field(ge=1)],
    "str": str,
}
"""The annotations that a job file can fill. Callables, trials and other samplers stay closed to it."""

_OURS = ["seed", "warn_asynchronous_seeding", "warn_independent_sampling", "consider_pruned_trials"]
"""For us to set, or without meaning where no trial is pruned."""

_DEPRECATED = ["consider_prior", "prior_weight", "consider_magic_clip", "consider_endpoints", "gamma", "weights"]
_DEPRECATED += ["x0", "sigma0", "restart_strategy", "inc_popsize"]


def _named(suffix: str) -> dict[str, type[Any]]:
    """The crossovers or mutations of ``optuna.samplers.nsgaii`` by a short name: ``sbx``, ``uniform``."""
    names = [name for name in nsgaii.__all__ if name.endswith(suffix) and not name.startswith("Base")]
    return {name.removesuffix(suffix).lower(): getattr(nsgaii, name) for name in names}


_PARTS = {"BaseCrossover | None": _named("Crossover"), "BaseMutation | None": _named("Mutation")}


def settings_of(sampler: type[BaseSampler]) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a sampler that plain data can fill, with the types that a job file gives."""
    found = {}
    for name, parameter in inspect.signature(sampler.__init__).parameters.items():
        if name in _OURS or name in _DEPRECATED:
            continue
        if parameter.annotation in _TYPES:
            kind = Annotated[int, Field(ge=0)] if name == "n_startup_trials" else _TYPES[parameter.annotation]
        elif _PARTS.get(parameter.annotation):
            kind = Literal[tuple(_PARTS[parameter.annotation])] | None
        else:
            continue
        found[name] = parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)
    return found


def arguments(sampler: type[BaseSampler], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with crossover and mutation made from their names."""
    annotations = {n: p.annotation for n, p in inspect.signature(sampler.__init__).parameters.items()}
    made = dict(settings)
    for name, value in settings.items():
        parts = _PARTS.get(annotations.get(name, ""))
        if parts and isinstance(value, str):
            made[name] = parts[value]()
    return made
