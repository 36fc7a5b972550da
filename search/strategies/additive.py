"""Values that add up over decisions, as what a policy damages and what it costs nearly do: learnt from few evaluations.

The model behind scores and allocators (docs/policies.md), its prices fitted to whole candidates where searches go,
in place of one measurement for each choice beside an untouched network.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LEVEL, _SIZE, _PROFILE = 2.0, 2.0, 3.0
"""Standard deviations of logarithms of prices: of all, of a decision's, of a choice's in all decisions of a kind."""

_OWN = (0.2, 0.5, 1.0)
_NOISES = (0.1, 0.03, 0.003)

_STEPS, _LONGEST, _ENOUGH = 40, 3.0, 1e-4
"""Of Newton's method: at most, in the logarithm of a price, and the least relative gain to go on for."""

_DECADES = 2.0
"""Values are weighed against each other from a part of 10 to this to as many times."""


@dataclass(frozen=True)
class Decisions:
    """What the columns of a population are.

    Attributes:
        kinds: of each; those of equal kind have the same choices.
        counts: of choices.
    """

    kinds: tuple[Hashable, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How prices are fitted.

    Attributes:
        own: standard deviation of the logarithm of one price beside what its decision and its choice say.
        noise: of the logarithm of a sum.
    """

    own: float
    noise: float


class Additive:
    """``sum_i price[i, choice_i]`` of positive values, all prices positive.

    Logarithms of prices are normal a priori: a decision's size, plus a profile over the choices that decisions of one
    kind share, plus what is the price's own. So a price that no value tells is four times another where such prices
    usually are. The most probable prices by Gauss-Newton steps, their uncertainty by Laplace's approximation there
    (MacKay, "Information Theory, Inference, and Learning Algorithms", 2003, chapter 27).

    Args:
        choices: ``(n, columns)`` indices.
        values: ``(n,)``, positive.
        form: as ``best_form`` finds it.

    Attributes:
        left_out: ``(n,)``: each value as foreseen from the others, to first order.
        density: mean logarithm of the density of the values' logarithms, as foreseen so.
    """

    def __init__(self, choices: Ints, values: Floats, decisions: Decisions, form: Form) -> None:
        counts = np.array(decisions.counts)
        self._counts, self._begins = counts, counts.cumsum() - counts
        precision = _precision(decisions, form)
        told, chosen = np.log(values), self._chosen(choices)
        mean = float(np.median(told)) - np.log(len(counts))

        def lack(prices: Floats) -> float:
            """Half the squared errors, of the values and of the prior."""
            error = (told - np.log(chosen @ np.exp(prices))) / form.noise
            return float(error @ error + (prices - mean) @ precision @ (prices - mean)) / 2

        prices, least = np.full(len(precision), mean), np.inf
        for _ in range(_STEPS):
            parts, error = _parts(chosen, prices, told)
            self._root = cholesky(precision + parts.T @ parts / form.noise**2, lower=True)
            slope = parts.T @ error / form.noise**2 - precision @ (prices - mean)
            step = cho_solve((self._root, True), slope)
            step *= min(1.0, _LONGEST / float(np.abs(step).max(initial=1e-12)))
            before = least if np.isfinite(least) else lack(prices)
            for _ in range(8):
                least = lack(prices + step)
                if least < before:
                    break
                step /= 2
            else:
                break
            prices = prices + step
            if before - least < _ENOUGH * max(least, 1.0):
                break
        parts, error = _parts(chosen, prices, told)
        self._root = cholesky(precision + parts.T @ parts / form.noise**2, lower=True)
        self._prices = prices
        # A part of what a value is foreseen by is that value itself.
        itself = np.square(solve_triangular(self._root, parts.T, lower=True)).sum(axis=0) / form.noise**2
        others = np.maximum(1 - itself, 1e-6)
        self.left_out = np.exp(told - np.clip(error / others, -_LONGEST, _LONGEST))
        variance = form.noise**2 / others
        self.density = float(np.mean(-np.log(2 * np.pi * variance) - np.square(error / others) / variance) / 2)

    def predict(self, choices: Ints) -> Floats:
        """``(n,)``, positive."""
        found: Floats = self._chosen(choices) @ np.exp(self._prices)
        return found

    def table(self, rng: np.random.Generator | None = None) -> Floats:
        """``(columns, most choices)``: what each choice adds; infinite where a column has fewer.

        With ``rng`` drawn from what prices may be, else what they most probably are.
        """
        prices = self._prices
        if rng is not None:
            prices = prices + solve_triangular(self._root.T, rng.standard_normal(len(prices)))
        found = np.full((len(self._counts), int(self._counts.max())), np.inf)
        found[np.arange(found.shape[1]) < self._counts[:, None]] = np.exp(prices)
        return found

    def _chosen(self, choices: Ints) -> Floats:
        """``(n, prices)``: which prices each row pays."""
        found = np.zeros((len(choices), int(self._counts.sum())))
        found[np.arange(len(choices))[:, None], self._begins + choices] = 1.0
        return found


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
    """The form that foresees each value from the others best."""
    forms = [Form(own, noise) for own in _OWN for noise in _NOISES]
    return max(forms, key=lambda form: Additive(choices, values, decisions, form).density)


def _precision(decisions: Decisions, form: Form) -> Floats:
    """``(prices, prices)``: the inverse of the prior covariance of their logarithms."""
    counts = np.array(decisions.counts)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(decisions.kinds))}
    decision = np.repeat(np.arange(len(counts)), counts)
    choice = np.concatenate([np.arange(count) for count in counts])
    profile = np.array([numbers[kind] for kind in decisions.kinds])[decision] * counts.max() + choice
    covariance = np.full((len(decision), len(decision)), _LEVEL**2)
    covariance += _SIZE**2 * (decision[:, None] == decision) + _PROFILE**2 * (profile[:, None] == profile)
    covariance[np.diag_indices_from(covariance)] += form.own**2
    found: Floats = np.linalg.inv(covariance)
    return found


def _parts(chosen: Floats, prices: Floats, told: Floats) -> tuple[Floats, Floats]:
    """Which part of each sum is each price, and how far the sums' logarithms lie below what was told."""
    paid = chosen * np.exp(prices)
    sums = paid.sum(axis=1)
    return paid / sums[:, None], told - np.log(sums)
