"""A case measured: a row for each of our variants and each baseline, those that failed too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from case import Case, Variant, errors, short
from ceilings import Ceilings, reason
from timing import Loop, Timer, summary

from archfront.kernels.tuning import chosen

FIELDS = (
    "operator", "shape", "dtype", "variant", "ours", "backend", "config", "median_us", "p20_us", "p80_us", "n", "calls",
    "sets", "cache", "method", "floor_us", "efficiency", "ceiling", "named", "speedup", "noise", "error", "max_error",
    "failure", "facts",
)  # fmt: skip
"""Of every row. ``noise`` is how far two measurements of our first variant in one run differ."""

_AGAIN = "again"
_COMPILE_S = 25
# Of our results in 16 bits; the checks have a gate for each type.
_LARGEST_ERROR = 1e-2


@dataclass(frozen=True)
class Deadline:
    """When to stop, on the clock of ``time.monotonic``."""

    end_s: float

    @staticmethod
    def after(minutes: float) -> Deadline:
        return Deadline(time.monotonic() + 60 * minutes)

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()


@dataclass(frozen=True)
class Bench:
    """What measuring needs beside a case.

    Attributes:
        timer, ceilings: of the device.
        compiling: whether baselines that are compiled are tried; why not, if not.
        warm: whether one input is used again and again.
    """

    timer: Timer
    ceilings: Ceilings
    compiling: str | None = None
    warm: bool = False

    def rows(self, case: Case, deadline: Deadline) -> list[dict[str, Any]]:
        """Compiles and prepares each variant, then measures all that work, interleaved."""
        if not self.compiling:
            # Functions of all cases share their code, of which torch compiles eight shapes and then no more.
            torch._dynamo.reset()
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        loops: dict[str, Loop] = {}
        found = {variant.name: self._empty(case, variant) for variant in case.variants}
        for variant in case.variants:
            refusal = self._refusal(variant, deadline)
            if refusal is not None:
                found[variant.name]["failure"] = refusal
                continue
            call = _function(variant)
            try:
                relative, largest = self._errors(case, variant, call)
                found[variant.name] |= {"error": _finite(relative), "max_error": _finite(largest)}
                if variant.ours and not relative <= _LARGEST_ERROR:
                    found[variant.name]["failure"] = f"wrong: an error of {relative:.1e}"
                loops[variant.name] = self.timer.loop(call, _maker(case, variant), warm=self.warm)
            # Whatever a library of another release raises is this row's and not the run's.
            except Exception as error:
                found[variant.name]["failure"] = reason(error)
        self._measure(case, loops, found)
        return list(found.values())

    def _measure(self, case: Case, loops: dict[str, Loop], found: dict[str, dict[str, Any]]) -> None:
        if not loops:
            return
        first = case.variants[0].name
        again = {_AGAIN: loops[first]} if first in loops else {}
        samples = self.timer.samples({**loops, **again})
        medians = {name: summary(times).median_us for name, times in samples.items()}
        for variant in case.variants:
            if variant.name not in loops:
                continue
            row, loop, times = found[variant.name], loops[variant.name], summary(samples[variant.name])
            row |= times._asdict() | {"n": times.samples, **loop._asdict()}
            del row["samples"], row["run"], row["kept"]
            row["efficiency"] = row["floor_us"] / times.median_us
            if case.named in medians:
                row["speedup"] = medians[case.named] / times.median_us
            if variant.name == first:
                row["noise"] = abs(medians[_AGAIN] / times.median_us - 1)

    def _empty(self, case: Case, variant: Variant) -> dict[str, Any]:
        named = next(other for other in case.variants if other.name == case.named)
        floor_us = self.ceilings.floor_us(variant.cost, variant.peak)
        row: dict[str, Any] = dict.fromkeys(FIELDS)
        return row | {
            "operator": case.operator,
            "shape": case.shape,
            "dtype": short(case.dtype),
            "variant": variant.name,
            "ours": variant.ours,
            "backend": self._backend(variant),
            "config": self._config(case) if variant.ours and self.timer.on_gpu else None,
            "floor_us": floor_us,
            "ceiling": self.ceilings.floor_us(named.cost, named.peak) / floor_us,
            "named": case.named,
            "facts": case.facts,
        }

    def _refusal(self, variant: Variant, deadline: Deadline) -> str | None:
        if not variant.compiled:
            return None
        if self.compiling is None and deadline.left_s < _COMPILE_S:
            return "no time left to compile it"
        return self.compiling

    def _backend(self, variant: Variant) -> str:
        if variant.ours:
            return "triton" if self.timer.on_gpu else "eager twin"
        return "torch.compile" if variant.compiled else "torch"

    def _config(self, case: Case) -> dict[str, Any]:
        return {t.operator: chosen(t.operator, t.key, t.default, self.timer.device) for t in case.tunings}

    def _errors(self, case: Case, variant: Variant, call: Callable[[Any], Any]) -> tuple[float, float]:
        given = case.values(0)
        result = variant.sample(call(variant.prepare(given)))
        return errors(result, variant.exact(given))


def _function(variant: Variant) -> Callable[[Any], Any]:
    function = torch.compile(variant.call, dynamic=False) if variant.compiled else variant.call
    return lambda arguments: function(*arguments)


def _maker(case: Case, variant: Variant) -> Callable[[int], Any]:
    return lambda seed: variant.prepare(case.values(seed))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def by_priority(cases: Iterable[Case]) -> list[Case]:
    """The most important first; of equal ones the operators take turns, so that a stop leaves something of each."""
    groups: dict[tuple[int, str], int] = {}
    numbered = []
    for case in cases:
        key = (case.priority, case.operator)
        groups[key] = groups.get(key, 0) + 1
        numbered.append((case.priority, groups[key], case))
    return [case for *_, case in sorted(numbered, key=lambda entry: entry[:2])]
