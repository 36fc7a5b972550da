"""Values that add up over decisions, as what a policy damages and what it costs nearly do: learnt from few evaluations.

The model behind scores and allocators (docs/policies.md), its prices fitted to whole candidates where searches go,
in place of one measurement for each choice beside an untouched network.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import lsq_linear, nnls

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SHRINKAGES = (0.1, 0.01, 0.001)
"""Weights of what decisions have in common, against one evaluation."""

_LEAST = 0.05
"""Part of the mean price that every price is free to differ by, whatever the profile says."""

FOLDS = 5

_DECADES = 2.0
"""Values are weighed against each other from a part of 10 to this to as many times."""


@dataclass(frozen=True)
class Decisions:
    """What the columns of a population are.

    Attributes:
        kinds: of each; those of equal kind have the same choices.
        counts: of choices.
        ordered: whether their order means something.
    """

    kinds: tuple[Hashable, ...]
    counts: tuple[int, ...]
    ordered: tuple[bool, ...]


@dataclass(frozen=True)
class Form:
    """How prices are fitted.

    Attributes:
        rising: whether prices rise with the choice in ordered decisions, or fall.
        shrinkage: see ``_SHRINKAGES``.
    """

    rising: bool
    shrinkage: float


class Additive:
    """``sum_i price[i, choice_i]`` of positive values, no price negative, by least squares of relative errors.

    Decisions with the same choices are alike at first: one profile over the choices, times a size of each decision.
    Prices shrink towards that, so that the rare ones are not priced at random.

    Args:
        choices: ``(n, columns)`` indices.
        values: ``(n,)``, positive.
        form: as ``best_form`` finds it.
    """

    def __init__(self, choices: Ints, values: Floats, decisions: Decisions, form: Form) -> None:
        counts = np.array(decisions.counts)
        self._decision = np.repeat(np.arange(len(counts)), counts)
        self._choice = np.concatenate([np.arange(count) for count in counts])
        self._counts = counts
        # Where order counts, what is priced are steps: each choice pays for itself and for all on its dear side.
        self._steps, self._rising = np.array(decisions.ordered)[self._decision], form.rising
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(decisions.kinds))}
        kind = np.array([numbers[kind] for kind in decisions.kinds])[self._decision]
        profile = kind * counts.max() + self._choice
        design = self._pays(choices) / values[:, None]
        first = _prices(_summed(design, profile))[profile]
        expected = first * _prices(_summed(design * first, self._decision))[self._decision]
        scale = np.maximum(expected, _LEAST * float(expected.mean()))
        self._prices = scale * _prices(design * scale, expected / scale, form.shrinkage)

    def predict(self, choices: Ints) -> Floats:
        """``(n,)``, positive."""
        found: Floats = np.maximum(self._pays(choices) @ self._prices, np.finfo(float).tiny)
        return found

    def table(self) -> Floats:
        """``(columns, most choices)``: what each choice adds; infinite where a column has fewer."""
        found = np.full((len(self._counts), int(self._counts.max())), np.inf)
        for choice in range(found.shape[1]):
            there = self._counts > choice
            paid = self._pays(np.where(there, choice, 0)[None])[0] * self._prices
            found[there, choice] = np.bincount(self._decision, paid)[there]
        return found

    def _pays(self, choices: Ints) -> Floats:
        """``(n, prices)``: which prices each row pays."""
        chosen = choices[:, self._decision]
        beyond = chosen >= self._choice if self._rising else chosen <= self._choice
        return np.where(self._steps, beyond, chosen == self._choice).astype(np.float64)


def supported(tables: Sequence[Floats], rng: np.random.Generator, count: int) -> Ints:
    """``(n, columns)``: what minimises weighted sums of several such values, without the repeated; at most ``count``.

    Args:
        tables: of each value, as ``Additive.table`` gives them.
    """
    weights = 10 ** rng.uniform(-_DECADES, _DECADES, size=(count, len(tables)))
    spans = [(np.where(np.isfinite(table), table, -np.inf).max(axis=1) - table.min(axis=1)).mean() for table in tables]
    scaled = [table / max(span, np.finfo(float).tiny) for table, span in zip(tables, spans, strict=True)]
    totals = np.tensordot(weights, np.stack(scaled), axes=1)
    return np.unique(totals.argmin(axis=2), axis=0)


def best_form(choices: Ints, values: Floats, decisions: Decisions) -> Form:
    """The form that foresees held-out values best."""
    directions = (False, True) if any(decisions.ordered) else (False,)
    forms = [Form(rising, shrinkage) for rising in directions for shrinkage in _SHRINKAGES]

    def error(form: Form) -> float:
        return float(np.abs(np.log(held_out(choices, values, decisions, form) / values)).mean())

    return min(forms, key=error)


def held_out(choices: Ints, values: Floats, decisions: Decisions, form: Form) -> Floats:
    """``(n,)``: each value as foreseen from the other folds; ``FOLDS`` rows or more."""
    found = np.empty(len(values))
    fold = np.arange(len(values)) % FOLDS
    for i in range(FOLDS):
        inside = fold != i
        found[~inside] = Additive(choices[inside], values[inside], decisions, form).predict(choices[~inside])
    return found


def _summed(design: Floats, group: Ints) -> Floats:
    """``(n, groups)``: columns of a group added up."""
    found = np.zeros((int(group.max()) + 1, len(design)))
    np.add.at(found, group, design.T)
    return found.T


def _prices(design: Floats, expected: Floats | None = None, shrinkage: float = 1e-3) -> Floats:
    """Not negative, with ``design @ prices`` nearest to 1 and, at little cost, to what is expected (1 if None)."""
    wanted = np.ones(design.shape[1]) if expected is None else expected
    # By the normal equations: rows are many more than prices, and the active set is sought many times.
    square = design.T @ design + np.diag(np.full(len(wanted), shrinkage**2))
    unit = 1 / np.sqrt(np.diag(square))
    upper = cholesky(square * unit * unit[:, None])
    right = solve_triangular(upper, unit * (design.sum(axis=0) + shrinkage**2 * wanted), trans="T")
    found: Floats
    try:
        found = nnls(upper, right)[0]
    except RuntimeError:
        # It goes round in circles on what rounding alone tells apart.
        found = lsq_linear(upper, right, (0.0, np.inf), method="trf").x
    return unit * found
