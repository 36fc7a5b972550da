"""Changes of one group at a time: down until the budgets are met, up while they allow it."""

from __future__ import annotations

import numpy as np

from archfront.errors import InputError
from archfront.search.allocators.allocator import Evaluate
from archfront.search.allocators.linear_programme import least
from archfront.search.allocators.problem import Problem, Vector
from archfront.search.allocators.tables import Ints, Tables


class Trials:
    """True qualities of policies, each evaluated once. A failed one is worth -inf.

    Args:
        problem: whose groups the choices are of.
        evaluate: true quality of a policy.
        allocator: name of who asks, for the message.

    Raises:
        InputError: there is no ``evaluate``.
    """

    def __init__(self, problem: Problem, evaluate: Evaluate | None, allocator: str) -> None:
        if evaluate is None:
            problem_text = f"is missing, and {allocator} decides by the true quality of policies"
            raise InputError("evaluate", None, problem_text, "Give one, or choose an allocator that needs none.")
        self._problem = problem
        self._evaluate = evaluate
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def count(self) -> int:
        return len(self._known)

    def quality(self, choices: Ints) -> float:
        key = tuple(choices.tolist())
        if key not in self._known:
            quality = float(self._evaluate(self._problem.spread(key)))
            self._known[key] = quality if np.isfinite(quality) else -np.inf
        return self._known[key]


def lowering(tables: Tables, choices: Ints) -> tuple[Vector, Vector]:
    """``(groups, choices)`` twice: damage added per share saved of what is beyond the budgets, and that share.

    The first is inf where a change saves nothing. What a change saves beyond the need does not count for it.
    """
    loads, load = _after(tables, choices)
    beyond = float(np.maximum(loads - 1.0, 0.0).sum())
    saved = beyond - np.maximum(load - 1.0, 0.0).sum(axis=0)
    useful = tables.allowed & (saved > 1e-12 * beyond)
    harm = tables.damage - tables.damage[np.arange(len(tables)), choices][:, None]
    return np.divide(harm, saved, out=np.full(harm.shape, np.inf), where=useful), saved


def raising(tables: Tables, choices: Ints) -> Vector:
    """``(groups, choices)``: damage saved per pressure added; -inf where a change saves none or does not fit."""
    rows = np.arange(len(tables))
    _, load = _after(tables, choices)
    gain = tables.damage[rows, choices][:, None] - tables.damage
    useful = tables.allowed & (gain > 0) & (load <= 1.0).all(axis=0)
    added = np.where(useful, tables.pressure - tables.pressure[rows, choices][:, None], 1.0)
    return np.where(useful, gain / np.maximum(added, 1e-12), -np.inf)


def lowered(tables: Tables, choices: Ints) -> Ints:
    """Feasible choices: again and again the change that adds least damage for what it saves.

    Raises:
        InputError: no policy meets all budgets at once.
    """
    choices = choices.copy()
    while not tables.fits(choices):
        ratio, _ = lowering(tables, choices)
        group, choice = np.unravel_index(int(ratio.argmin()), ratio.shape)
        if not np.isfinite(ratio[group, choice]):
            # Several budgets can pull against each other so that no single change helps.
            return least(tables, tables.pressure)
        choices[group] = choice
    return choices


def raised(tables: Tables, choices: Ints) -> Ints:
    """Feasible choices of which no single change saves damage within the budgets, from feasible ones."""
    choices = choices.copy()
    while True:
        ratio = raising(tables, choices)
        group, choice = np.unravel_index(int(ratio.argmax()), ratio.shape)
        if not np.isfinite(ratio[group, choice]):
            return choices
        choices[group] = choice


def _after(tables: Tables, choices: Ints) -> tuple[Vector, Vector]:
    """``(budgets,)`` loads of a policy, and ``(budgets, groups, choices)`` after each single change of it."""
    present = tables.load[:, np.arange(len(tables)), choices]
    loads = present.sum(axis=1)
    return loads, (loads[:, None] - present)[:, :, None] + tables.load
