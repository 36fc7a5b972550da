"""Iterative greedy: one site after another goes lower, re-scored by true quality if there is one (after NViT, 2023)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import least, with_bound
from archfront.search.allocators.moves import Trials, lowering, raised, raising
from archfront.search.allocators.problem import Problem, Vector
from archfront.search.allocators.tables import Ints, Tables


class IterativeGreedy(Allocator):
    """From the identity, again and again the change that adds least damage for what it saves, until the budgets hold.

    At the end sites are raised with what the last change left. With ``evaluate`` the few changes that look best are
    really evaluated each time, and the one that loses least quality for what it saves is made; a site is then raised
    only if that does not lose quality.

    Args:
        candidates: changes that are really evaluated each time.
    """

    name = "greedy"

    def __init__(self, candidates: Annotated[int, Field(ge=1)] = 4) -> None:
        self.candidates = candidates

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = Tables.of(problem)
        trials = None if evaluate is None else Trials(problem, evaluate, self.name)
        choices = tables.top()
        while not tables.fits(choices):
            ratio, saved = lowering(tables, choices)
            best = _first(-ratio, self.candidates if trials is not None else 1)
            if not best:
                choices = least(tables, tables.pressure)
                break
            if trials is not None:
                present = trials.quality(choices)
                losses = [
                    _loss(present, trials.quality(_changed(choices, *change)), float(saved[change])) for change in best
                ]
                best = [best[int(np.argmin(losses))]]
            choices = _changed(choices, *best[0])
        if trials is None:
            return with_bound(tables, raised(tables, choices).tolist())
        return with_bound(tables, self._raised(tables, trials, choices).tolist(), trials.count)

    def _raised(self, tables: Tables, trials: Trials, choices: Ints) -> Ints:
        while best := _first(raising(tables, choices), self.candidates):
            options = [_changed(choices, *change) for change in best]
            qualities = [trials.quality(option) for option in options]
            winner = int(np.argmax(qualities))
            if qualities[winner] < trials.quality(choices):
                break
            choices = options[winner]
        return choices


def _loss(present: float, after: float, saved: float) -> float:
    """Quality lost per share saved; a failed policy loses everything, and whatever follows one loses nothing."""
    if not np.isfinite(after):
        return np.inf
    return (present - after) / saved if np.isfinite(present) else -after


def _first(worth: Vector, count: int) -> list[tuple[int, int]]:
    """``(group, choice)`` of the greatest finite numbers, the greatest first, earlier ones among equals first."""
    order = np.argsort(-worth, axis=None, kind="stable")[:count]
    places = [divmod(int(i), worth.shape[1]) for i in order]
    return [place for place in places if np.isfinite(worth[place])]


def _changed(choices: Ints, group: int, choice: int) -> Ints:
    changed = choices.copy()
    changed[group] = choice
    return changed
