"""Decisions that count only while other decisions have certain values, for any finite product space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Population

Requirements = Mapping[str, Sequence[Any]]
"""What a decision waits for: name of another decision -> the values of it that will do. All of them have to hold."""

Mask = npt.NDArray[np.bool_]

_LISTED = 1 << 20
"""Combinations of controlling decisions that are listed to count genotypes."""


class Conditions:
    """When each decision of a product counts.

    A decision with requirements is active while all decisions that it names are active and have one of the named
    values; one without is always active.

    Args:
        columns: the decisions.
        when: name of a decision -> its requirements.
        field: of the job file, for messages.

    Raises:
        InputError: an unknown name or value, no value, or decisions that wait for each other.
    """

    def __init__(self, columns: Sequence[Column], when: Mapping[str, Requirements], field: str = "space.when") -> None:
        places = {column.name: i for i, column in enumerate(columns)}
        for name, requirements in when.items():
            if name not in places:
                raise InputError(f"{field}.{name}", name, "is not a decision of this space", suggestion(name, places))
            if not requirements:
                raise InputError(
                    f"{field}.{name}", dict(requirements), "names no decision", "Name one, or leave it out."
                )
            for other in requirements:
                if other not in places:
                    problem = "is not a decision of this space"
                    raise InputError(f"{field}.{name}.{other}", other, problem, suggestion(other, places))
        self.when = {name: {other: list(values) for other, values in needs.items()} for name, needs in when.items()}
        self._cardinalities = [len(column.choices) for column in columns]
        self._rules = [
            (places[name], [
                (places[other], allowed(columns[places[other]], values, f"{field}.{name}.{other}"))
                for other, values in when[name].items()
            ])
            for name in in_order(when, field)
        ]  # fmt: skip
        self.conditional = np.zeros(len(columns), dtype=bool)
        self.conditional[[place for place, _ in self._rules]] = True

    def __bool__(self) -> bool:
        return bool(self._rules)

    def active(self, population: Population) -> Mask:
        """``(n, columns)``: which decisions count, of an ``(n, columns)`` matrix of choice indices."""
        found = np.ones(population.shape, dtype=bool)
        for place, needs in self._rules:
            for other, values in needs:
                found[:, place] &= found[:, other] & values[population[:, other]]
        return found

    def folded(self, population: Population) -> Population:
        """The matrix with the first choice wherever a decision does not count."""
        result: Population = np.where(self.active(population), population, 0).astype(np.int16)
        return result

    def count(self) -> int:
        """Number of matrices' rows that ``folded`` leaves as they are.

        Exact: of each group of decisions that hang together the controlling ones are listed, and every combination
        counts the choices of the others that it leaves active. A group with more than 2**20 combinations counts as
        the product of its choices, an upper bound: counting is as hard as satisfiability in general.
        """
        groups = _connected(len(self._cardinalities), [(i, other) for i, needs in self._rules for other, _ in needs])
        return math.prod(self._count(group) for group in groups)

    def _count(self, group: Sequence[int]) -> int:
        controlling = sorted({other for place, needs in self._rules if place in group for other, _ in needs})
        shape = [self._cardinalities[i] for i in controlling]
        combinations = math.prod(shape)
        if combinations > _LISTED:
            return math.prod(self._cardinalities[i] for i in group)
        rows = np.zeros((combinations, len(self._cardinalities)), dtype=np.int16)
        rows[:, controlling] = np.stack(np.unravel_index(np.arange(combinations), shape), axis=1) if controlling else 0
        active = self.active(rows)
        # An inactive controlling decision is counted once, with its first choice.
        kept = ((rows == 0) | active)[:, controlling].all(axis=1)
        others = [i for i in group if i not in controlling]
        patterns, counts = np.unique(active[kept][:, others], axis=0, return_counts=True)
        return sum(
            int(count) * math.prod(self._cardinalities[i] for i, on in zip(others, pattern, strict=True) if on)
            for pattern, count in zip(patterns, counts, strict=True)
        )


class ConditionalSpace(ProductSpace):
    """A product space with decisions that count only while others have certain values.

    In the matrix an inactive decision has its first choice, in JSON it is null. Without ``when`` everything is as in
    ``ProductSpace``, to the bit.

    Args:
        columns: the decisions.
        when: see ``Conditions``.

    Raises:
        InputError: see ``Conditions``; or a conditional decision has null among its choices.
    """

    def __init__(self, columns: Sequence[Column], when: Mapping[str, Requirements] | None = None) -> None:
        super().__init__(columns)
        self.conditions = Conditions(self.columns, when or {})
        for column, conditional in zip(self.columns, self.conditions.conditional, strict=True):
            if conditional and None in column.choices:
                problem = "is a choice of a conditional decision, where null says that it does not count"
                raise InputError(f"space.{column.name}", None, problem, "Give that choice another name.")

    @property
    def size(self) -> int:
        """Number of genotypes that differ in decisions that count; see ``Conditions.count``."""
        return self.conditions.count() if self.conditions else super().size

    def active(self, population: Population) -> Mask:
        return self.conditions.active(population)

    def folded(self, population: Population) -> Population:
        return self.conditions.folded(population) if self.conditions else population

    def canonical(self, population: Population) -> Population:
        return self.folded(population)

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        """Every decision that counts is uniform, given those that it waits for."""
        return self.folded(super().sample(rng, count))

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        return self.folded(super().sample_spread(rng, count))

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        """Decisions that count change, one of them surely, so the canonical form does; those that begin to count
        are drawn anew."""
        if not self.conditions:
            return super().mutate(rng, parents, rate)
        live = self.active(parents)[:, self._open]
        children = self._filled(rng, parents)
        counts = live.sum(axis=1)
        chance: Any = 1 / np.maximum(counts, 1)[:, np.newaxis] if rate is None else rate
        changed = live & (rng.random(live.shape, dtype=np.float32) < chance)
        certain = np.where(live, rng.random(live.shape), -1.0).argmax(axis=1) if live.size else counts
        rows = np.flatnonzero(counts)
        changed[rows, certain[rows]] = True
        return self.folded(self._changed(rng, children, changed))

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        """As in a product space, but a decision that counts in one parent alone comes from that parent."""
        if not self.conditions:
            return super().crossover(rng, first, second)
        ours, theirs = self.active(first), self.active(second)
        take_first = np.where(ours == theirs, rng.random(first.shape, dtype=np.float32) < 0.5, ours)
        return self.folded(np.where(take_first, self._filled(rng, first), self._filled(rng, second)))

    def to_json(self, population: Population) -> list[Genotype]:
        genotypes = super().to_json(population)
        if self.conditions:
            for row, place in np.argwhere(~self.active(population)).tolist():
                genotypes[row][place] = None
        return genotypes

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        if not self.conditions:
            return super().from_json(genotypes)
        firsts = [column.choices[0] for column in self.columns]
        filled: list[Genotype] = []
        empty = np.zeros((len(genotypes), len(self.columns)), dtype=bool)
        for row, genotype in enumerate(genotypes):
            if isinstance(genotype, (list, tuple)) and len(genotype) == len(self.columns):
                empty[row] = [choice is None for choice in genotype] & self.conditions.conditional
                genotype = [
                    first if missing else choice
                    for first, missing, choice in zip(firsts, empty[row], genotype, strict=True)
                ]
            filled.append(genotype)
        population = super().from_json(filled)
        for row, place in np.argwhere(empty & self.active(population)).tolist():
            column = self.columns[place]
            needs = " and ".join(f"{name} is {genotypes[row][i]!r}" for name, i in self._awaited(column.name))
            remedy = f"Give one of its choices: {', '.join(map(str, column.choices))}."
            raise InputError(f"genotype[{place}] ({column.name})", None, f"is null although {needs}", remedy)
        return self.folded(population)

    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        """As of a product space; of a decision that does not count all features are 0, and an ordered one that need
        not count has a feature more, 1 where it does."""
        if not self.conditions:
            return super().encode(population)
        canonical = self.canonical(population)
        active = self.active(canonical)
        parts: list[npt.NDArray[Any]] = []
        for i, column in enumerate(self.columns):
            features = column.features(canonical[:, i]) * active[:, i : i + 1]
            parts += (
                [features, active[:, i : i + 1]] if column.ordered and self.conditions.conditional[i] else [features]
            )
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _filled(self, rng: np.random.Generator, population: Population) -> Population:
        """The population with inactive decisions drawn anew, for when a change makes them count."""
        result: Population = np.where(self.active(population), population, super().sample(rng, len(population)))
        return result

    def _awaited(self, name: str) -> list[tuple[str, int]]:
        """The decisions that one waits for, and their columns."""
        places = {column.name: i for i, column in enumerate(self.columns)}
        return [(other, places[other]) for other in self.conditions.when[name]]


def allowed(column: Column, values: Sequence[Any], field: str) -> Mask:
    """``(choices,)``: which choices of a column are among the values.

    Raises:
        InputError: no value, or one that is not among the choices.
    """
    if not values:
        raise InputError(field, list(values), "has no value", f"Give some of {list(column.choices)}.")
    for value in values:
        if value not in column.choices:
            remedy = suggestion(str(value), [str(choice) for choice in column.choices])
            raise InputError(field, value, f"is not a choice of {column.name}", remedy)
    return np.array([choice in values for choice in column.choices])


def in_order(when: Mapping[str, Iterable[str]], field: str) -> list[str]:
    """The names in an order in which each comes after all that it waits for.

    Raises:
        InputError: some wait for each other.
    """
    try:
        return [name for name in TopologicalSorter(when).static_order() if name in when]
    except CycleError as error:
        cycle = list(reversed(error.args[1]))
        problem = "wait for each other"
        raise InputError(f"{field}.{cycle[0]}", " -> ".join(cycle), problem, "Drop one of these conditions.") from None


def _connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected components of a graph with nodes ``0..count-1``."""
    groups = {i: {i} for i in range(count)}
    for a, b in pairs:
        if groups[a] is not groups[b]:
            groups[a] |= groups[b]
            for i in groups[b]:
                groups[i] = groups[a]
    return [sorted(group) for group in {id(group): group for group in groups.values()}.values()]
