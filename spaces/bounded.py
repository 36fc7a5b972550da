"""The members of a space whose parameters or multiply-adds lie between bounds."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.bounded_sources import Source, find_source
from archfront.spaces.counting import Costed, InputShaped, chain_costs, count
from archfront.spaces.grammars.grammar_space import GrammarSpace
from archfront.spaces.nested import BLOCKS, SHAPES, decisions, inner_space, show_through, written
from archfront.spaces.space import KEY_BYTES, Genotype, Layer, Population, Space

if TYPE_CHECKING:
    from torch import nn

Bound = tuple[float | None, float | None]
Mask = npt.NDArray[np.bool_]

_QUANTITIES = ("params", "macs")
_REDRAWS = 3
_WORSE = 0.1
"""How often a step that leads further away is taken, so that a descent leaves a dead end."""
_CACHE = 100_000


@dataclass(frozen=True, kw_only=True)
class _Effort:
    """How much is tried to find members.

    Attributes:
        rejected: rounds in which draws outside the bounds are just thrown away.
        barren: rounds of descents without a single member before a space counts as empty.
        tested: draws in such a round.
        steps: of a descent.
        neighbours: mutants that a step looks at.
    """

    rejected: int
    barren: int
    tested: int
    steps: int
    neighbours: int


_PRICED = _Effort(rejected=8, barren=6, tested=8, steps=40, neighbours=8)
_COUNTED = _Effort(rejected=4, barren=4, tested=4, steps=20, neighbours=2)
"""Where each model has to be built to be counted: 700 of them before a space counts as empty."""


class Bounded(Space):
    """The members of a space with parameters and multiply-adds, for one input, within bounds: as ``costs`` counts them.

    Every operator gives members only. What is drawn:

    - Where the inner space is a finite product and its costs can be had without building models: uniformly from the
      rows within the bounds (given that they are drawn as the space's matrix has them, so forms that build the same
      count as often as they occur). Small spaces are listed; where costs are sums over the columns (blocks of an FBNet,
      the cells of NAS-Bench-201 without pruning) by dynamic programming over partial sums.
    - Elsewhere the inner space's draws: those outside the bounds are drawn again a few times, then led into them by a
      stochastic descent along its mutations. A grammar's budget takes over the upper bounds, which leaves only lower
      ones to that.

    A mutant or child outside the bounds is made again a few times, then led back by the same descent, and at last
    replaced: by a member near it where the space can draw one, else by a drawn one (mutants) or the first parent.

    Keys and features are the inner space's, so that results can be compared; the digest is its own.

    Args:
        of: the inner space, as in a job file.
        macs: ``[least, most]`` multiply-adds, either null for no bound.
        params: likewise, parameters.

    Raises:
        InputError: an error of the inner space, no bound, or bounds that leave nothing between them; and from the
            operators, when no member is found.
    """

    name: ClassVar[str] = "bounded"

    def __init__(
        self,
        *,
        of: dict[str, Any],
        macs: Bound | None = None,
        params: Bound | None = None,
        _space: Space | None = None,
    ) -> None:
        self.inner = inner_space(of, "space.of") if _space is None else _space
        self.bounds = {"params": _bounds("params", params), "macs": _bounds("macs", macs)}
        if all(bound == (None, None) for bound in self.bounds.values()):
            raise InputError("space.macs", macs, "bounds nothing, nor does params", "Give [least, most] of one.")
        if not isinstance(self.inner, (Costed, BlockSpace, InputShaped)) or not self.inner.has_models:
            problem = "has no models whose costs can be counted"
            raise InputError("space.of", self.inner.name, problem, "Bound a space of torch models.")
        self.has_models = True
        self.decisions = decisions(self.inner)
        self._least = np.array([self.bounds[q][0] or 0 for q in _QUANTITIES], dtype=np.float64)
        self._most = np.array([math.inf if (b := self.bounds[q][1]) is None else b for q in _QUANTITIES])
        self._proposer = self._tightened()
        self._effort = _PRICED if isinstance(self.inner, (Costed, BlockSpace)) else _COUNTED
        self._counted: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        show_through(self, self.inner, (*SHAPES, *BLOCKS, "costs"))

    @classmethod
    def around(cls, space: Space, *, macs: Bound | None = None, params: Bound | None = None) -> Bounded:
        """The bounded form of a space that exists already; it need not stand in the table of spaces."""
        return cls(of={}, macs=macs, params=params, _space=space)

    @property
    def config(self) -> Mapping[str, Any]:
        given = {q: list(bound) for q, bound in self.bounds.items() if bound != (None, None)}
        return {"of": written(self.inner), **given}

    @property
    def digest(self) -> str:
        text = json.dumps([self.name, self.version, self.inner.digest, self.bounds], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    @property
    def size(self) -> int | None:
        """Exact where the members can be counted; else that of the inner space, an upper bound."""
        listed = self._source.size if self._source is not None else None
        return self.inner.size if listed is None else listed

    @property
    def known(self) -> Mapping[str, Genotype]:
        return self.members(self.inner.known)

    def quantities(self, population: Population) -> npt.NDArray[np.int64]:
        """``(n, 2)``: parameters and multiply-adds, of models that have no formula counted once and kept."""
        if isinstance(self.inner, Costed):
            return np.stack(self.inner.costs(population), axis=1)
        if isinstance(self.inner, BlockSpace):
            return chain_costs(self.inner, population)
        found = np.empty((len(population), 2), dtype=np.int64)
        for i, key in enumerate(self.inner.keys(population)):
            if key not in self._counted:
                self._counted[key] = self._count(population[i : i + 1])
                if len(self._counted) > _CACHE:
                    self._counted.popitem(last=False)
            found[i] = self._counted[key]
        return found

    def admits(self, population: Population) -> Mask:
        """``(n,)``: which genotypes of the inner space are members."""
        members: Mask = self._violation(population) == 0
        return members

    # Operators.

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        """See the class.

        Raises:
            InputError: no member was found.
        """
        if self._source is None:
            return self._searched(rng, count, self._proposer.sample)
        found = self._source.draw(rng, count)
        return self._none_found() if found is None else found

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        """The inner space's, led into the bounds; see ``sample``."""
        return self._searched(rng, count, self._proposer.sample_spread)

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        if self.size == 1:
            return parents.copy()

        def again(rows: Mask) -> Population:
            return self._proposer.mutate(rng, parents[rows], rate)

        children = self._repaired(rng, again(np.ones(len(parents), dtype=bool)), again, parents)
        for i in np.flatnonzero(~self.admits(children)).tolist():
            children[i] = self._replacement(rng, parents[i : i + 1])[0]
        return children

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        def again(rows: Mask) -> Population:
            return self._proposer.crossover(rng, first[rows], second[rows])

        children = self._repaired(rng, again(np.ones(len(first), dtype=bool)), again, None)
        lost = ~self.admits(children)
        children[lost] = first[lost]
        return children

    def canonical(self, population: Population) -> Population:
        return self.inner.canonical(population)

    def keys(self, population: Population) -> list[bytes]:
        return self.inner.keys(population)

    def to_json(self, population: Population) -> list[Genotype]:
        return self.inner.to_json(population)

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        """As of the inner space.

        Raises:
            InputError: also where a bound does not hold; with the amount.
        """
        population = self.inner.from_json(genotypes)
        for genotype, amounts in zip(genotypes, self.quantities(population).tolist(), strict=True):
            for quantity, amount in zip(_QUANTITIES, amounts, strict=True):
                least, most = self.bounds[quantity]
                if (least is not None and amount < least) or (most is not None and amount > most):
                    shown = json.dumps(genotype)
                    shown = shown if len(shown) < 200 else shown[:200] + "…"
                    problem = f"has {amount} {quantity}, outside space.{quantity} of {[least, most]}"
                    raise InputError("genotype", shown, problem, "Choose another, or widen the bounds.")
        return population

    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        return self.inner.encode(population)

    def build(self, genotype: Genotype) -> nn.Module:
        return self.inner.build(genotype)

    def describe(self, genotype: Genotype) -> list[Layer]:
        return self.inner.describe(genotype)

    # Finding members.

    @cached_property
    def _source(self) -> Source | None:
        """What draws members without a search, where there is such a thing; made at the first draw."""
        return find_source(self.inner, self.quantities, self.admits, self.bounds, quick=self._effort is _PRICED)

    def _tightened(self) -> Space:
        if not isinstance(self.inner, GrammarSpace):
            return self.inner
        tighter = copy.copy(self.inner)
        for quantity, (_, most) in self.bounds.items():
            present = getattr(tighter.budget, quantity)
            if most is not None and (present is None or most < present):
                tighter.budget = replace(tighter.budget, **{quantity: most})
        return tighter

    def _count(self, row: Population) -> tuple[int, int]:
        import torch

        assert isinstance(self.inner, InputShaped)
        [genotype] = self.inner.to_json(row)
        with torch.device("meta"):
            model = self.inner.build(genotype)
        cost = count(model, (self.inner.in_channels, self.inner.resolution, self.inner.resolution))
        return cost.params, cost.macs

    def _violation(self, population: Population) -> npt.NDArray[np.float64]:
        """``(n,)``: how far outside the bounds, relative to them, summed; 0 for members."""
        amounts = self.quantities(population)
        below = np.maximum(self._least - amounts, 0) / np.maximum(self._least, 1)
        above = np.maximum(amounts - self._most, 0) / np.maximum(np.where(np.isfinite(self._most), self._most, 1), 1)
        total: npt.NDArray[np.float64] = (below + above).sum(axis=1)
        return total

    def _searched(
        self, rng: np.random.Generator, wanted: int, draw: Callable[[np.random.Generator, int], Population]
    ) -> Population:
        """Draws: as they come, those outside thrown away, for some rounds; then led into the bounds."""
        found = draw(rng, 0)
        for _ in range(self._effort.rejected):
            if len(found) == wanted:
                return found
            drawn = draw(rng, wanted - len(found))
            found = np.concatenate([found, drawn[self.admits(drawn)]])
        barren = 0
        while len(found) < wanted and barren < self._effort.barren:
            missing = wanted - len(found)
            drawn = self._descended(rng, draw(rng, missing if len(found) else min(missing, self._effort.tested)), None)
            if self._source is not None:
                for i in np.flatnonzero(~self.admits(drawn)).tolist():
                    near = self._source.near(rng, drawn[i : i + 1])
                    drawn[i : i + 1] = drawn[i : i + 1] if near is None else near
            members = drawn[self.admits(drawn)]
            barren = 0 if len(members) else barren + 1
            found = np.concatenate([found, members])
        return self._none_found() if len(found) < wanted else found

    def _repaired(
        self,
        rng: np.random.Generator,
        children: Population,
        again: Callable[[Mask], Population],
        parents: Population | None,
    ) -> Population:
        """Children within the bounds, as far as they can be led there; none becomes its parent again."""
        for _ in range(_REDRAWS):
            lost = ~self.admits(children)
            if not lost.any():
                return children
            children[lost] = again(lost)
        children = self._descended(rng, children, parents)
        if self._source is not None:
            for i in np.flatnonzero(~self.admits(children)).tolist():
                near = self._source.near(rng, children[i : i + 1])
                if near is not None and (parents is None or self.keys(near) != self.keys(parents[i : i + 1])):
                    children[i] = near[0]
        return children

    def _descended(self, rng: np.random.Generator, population: Population, avoided: Population | None) -> Population:
        """The population after steps, each to the best of a few mutants where that is nearer to the bounds."""
        result = population.copy()
        violation = self._violation(result)
        each = self._effort.neighbours
        forbidden = None if avoided is None else self.keys(avoided)
        for _ in range(self._effort.steps):
            lost = np.flatnonzero(violation > 0)
            if not len(lost):
                break
            mutants = self._proposer.mutate(rng, np.repeat(result[lost], each, axis=0), 0.0)
            amounts = self._violation(mutants)
            if forbidden is not None:
                inside = np.flatnonzero(amounts == 0)
                for i, key in zip(inside.tolist(), self.keys(mutants[inside]), strict=True):
                    if key == forbidden[lost[i // each]]:
                        amounts[i] = np.inf
            best = amounts.reshape(-1, each).argmin(axis=1) + np.arange(len(lost)) * each
            taken = amounts[best] < violation[lost]
            taken |= (rng.random(len(lost)) < _WORSE) & np.isfinite(amounts[best])
            result[lost[taken]] = mutants[best[taken]]
            violation[lost[taken]] = amounts[best[taken]]
        return result

    def _replacement(self, rng: np.random.Generator, parent: Population) -> Population:
        """A member other than the parent, if one is found; else the parent."""
        for _ in range(_REDRAWS):
            try:
                drawn = self.sample(rng, 1)
            except InputError:
                break
            if self.keys(drawn) != self.keys(parent):
                return drawn
        return parent

    def _none_found(self) -> Population:
        bounds = {q: list(bound) for q, bound in self.bounds.items() if bound != (None, None)}
        some = self.inner.sample_spread(np.random.default_rng(0), 32)
        amounts = self.quantities(some)
        nearest = amounts[int(self._violation(some).argmin())].tolist()
        seen = " and ".join(f"{n} {q}" for q, n in zip(_QUANTITIES, nearest, strict=True))
        problem = f"leave no member that could be found; the nearest of {len(some)} draws has {seen}"
        raise InputError("space", bounds, problem, "Widen the bounds.")


def _bounds(field: str, given: Bound | None) -> tuple[int | None, int | None]:
    """Whole bounds that mean the same."""
    least, most = given or (None, None)
    for bound in (least, most):
        if bound is not None and not 0 <= bound < math.inf:
            raise InputError(
                f"space.{field}", given, "is no pair of amounts", "Give [least, most], or null for either."
            )
    whole = (None if least is None else math.ceil(least), None if most is None else math.floor(most))
    if whole[0] is not None and whole[1] is not None and whole[0] > whole[1]:
        raise InputError(f"space.{field}", given, "has nothing between its ends", "Give [least, most].")
    return whole
