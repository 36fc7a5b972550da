"""Finite product spaces: a population is one integer matrix, and every operator is vectorised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.spaces.space import KEY_BYTES, Genotype, Population, Space

_WORD_BITS = 64


@dataclass(frozen=True)
class Column:
    """One decision: its name, its choices, and whether their order means something (bits, widths: yes; kinds: no)."""

    name: str
    choices: tuple[Any, ...]
    ordered: bool = False

    def features(self, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``(n, features)`` of ``(n,)`` indices: scaled to [0, 1] where the order means something, else one-hot."""
        found: npt.NDArray[Any]
        if self.ordered:
            found = indices[:, np.newaxis] / max(len(self.choices) - 1, 1)
        else:
            found = np.eye(len(self.choices), dtype=np.float32)[indices]
        return found


@runtime_checkable
class ColumnSpace(Protocol):
    """A space whose populations are ``(n, columns)`` matrices of ``int16`` indices, each of which is a genotype: what
    samplers of vectors need. A space takes part by having these; ``ProductSpace`` does."""

    columns: tuple[Column, ...]

    def active(self, population: Population) -> npt.NDArray[np.bool_]:
        """``(n, columns)``: which decisions count, given the others."""

    def folded(self, population: Population) -> Population:
        """The rows with a fixed choice wherever a decision does not count, as the space's own operators give them."""


class ProductSpace(Space):
    """The product of finitely many finite decisions.

    A population is a ``(n, columns)`` matrix of ``int16`` indices into each column's choices. A subclass gives
    ``columns``, ``config``, ``build`` and ``describe``, and may override ``canonical`` where different genotypes
    build the same model.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        if not columns:
            raise InputError("space.columns", [], "is empty", "Give at least one decision.")
        for column in columns:
            if not column.choices:
                raise InputError(f"space.{column.name}", [], "has no choice", "Give at least one.")
        self.columns = tuple(columns)
        self.cardinalities = np.array([len(column.choices) for column in columns], dtype=np.int64)
        self._open = np.flatnonzero(self.cardinalities > 1)
        self._indices = [{_hashable(c): i for i, c in enumerate(column.choices)} for column in columns]

    @property
    def config(self) -> Mapping[str, Any]:
        return {"columns": [[c.name, list(c.choices), c.ordered] for c in self.columns]}

    @property
    def size(self) -> int:
        return math.prod(int(n) for n in self.cardinalities)

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        uniform = rng.random((count, len(self.columns)), dtype=np.float32)
        return (uniform * self.cardinalities.astype(np.float32)).astype(np.int16)

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        """Each genotype has preferences of its own among the choices that several columns share, drawn from a
        Dirichlet distribution with the concentration 1/2 (Jeffreys): so light, heavy and even networks all occur."""
        population = np.empty((count, len(self.columns)), dtype=np.int16)
        for choices in dict.fromkeys(column.choices for column in self.columns):
            members = [i for i, column in enumerate(self.columns) if column.choices == choices]
            preferences = rng.dirichlet(np.full(len(choices), 0.5), size=count)
            uniform = rng.random((count, len(members), 1))
            drawn = (uniform > preferences.cumsum(axis=1)[:, np.newaxis]).sum(axis=2)
            population[:, members] = np.minimum(drawn, len(choices) - 1)
        return population

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        children: Population = np.array(parents, dtype=np.int16)
        count = len(children)
        if not count or not len(self._open):
            return children
        chance = 1 / len(self._open) if rate is None else rate
        changed = rng.random((count, len(self._open)), dtype=np.float32) < chance
        # One change is certain in each row, so that no mutant equals its parent.
        changed[np.arange(count), rng.integers(len(self._open), size=count)] = True
        return self._changed(rng, children, changed)

    def _changed(self, rng: np.random.Generator, population: Population, changed: npt.NDArray[np.bool_]) -> Population:
        """The population, in place, with other choices at ``(n, open columns)`` places."""
        rows, opened = np.nonzero(changed)
        columns = self._open[opened]
        others = self.cardinalities[columns] - 1
        step = 1 + (rng.random(len(rows)) * others).astype(np.int64)
        population[rows, columns] = (population[rows, columns] + step) % (others + 1)
        return population

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        take_first = rng.random(first.shape, dtype=np.float32) < 0.5
        return np.where(take_first, first, second)

    def active(self, population: Population) -> npt.NDArray[np.bool_]:
        """``(n, columns)``: which decisions count, given the others; here all of them."""
        return np.ones(population.shape, dtype=bool)

    def folded(self, population: Population) -> Population:
        """See ``ColumnSpace``; here the rows themselves."""
        return population

    def canonical(self, population: Population) -> Population:
        return population

    def keys(self, population: Population) -> list[bytes]:
        return digests(self.canonical(population), self.cardinalities)

    def to_json(self, population: Population) -> list[Genotype]:
        tables = [np.array([*column.choices, None], dtype=object)[:-1] for column in self.columns]
        chosen = [table[population[:, i]] for i, table in enumerate(tables)]
        return [list(row) for row in zip(*chosen, strict=True)] if len(population) else []

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        population = np.empty((len(genotypes), len(self.columns)), dtype=np.int16)
        for row, genotype in enumerate(genotypes):
            if not isinstance(genotype, (list, tuple)) or len(genotype) != len(self.columns):
                raise InputError(
                    "genotype", genotype, "does not fit this space", f"Give a list of {len(self.columns)} choices."
                )
            for i, choice in enumerate(genotype):
                index = self._indices[i].get(_hashable(choice))
                if index is None:
                    column = self.columns[i]
                    remedy = suggestion(str(choice), [str(c) for c in column.choices])
                    raise InputError(f"genotype[{i}] ({column.name})", choice, "is not one of its choices", remedy)
                population[row, i] = index
        return population

    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        """One-hot for unordered columns, the index scaled to [0, 1] for ordered ones."""
        canonical = self.canonical(population)
        parts = [column.features(canonical[:, i]) for i, column in enumerate(self.columns)]
        return np.concatenate(parts, axis=1).astype(np.float32)


def digests(population: Population, cardinalities: npt.NDArray[np.int64]) -> list[bytes]:
    """128-bit digests of the rows of an index matrix.

    The columns are packed into as few 64-bit words as hold them (mixed radix, without loss); two lanes then absorb
    the words with the multiply-xorshift rounds of SplitMix64 (Steele et al., 2014). No collision among 10^9 rows is
    expected (birthday bound 2^-69).
    """
    lanes = [np.full(len(population), seed, dtype=np.uint64) for seed in (0x243F6A8885A308D3, 0x13198A2E03707344)]
    for word in _packed_words(population, cardinalities):
        lanes[0] = mix(lanes[0] ^ word)
        # The second lane absorbs the word under another bijection and sees the first, so the lanes are not copies.
        lanes[1] = mix(lanes[1] + mix(word + np.uint64(0x9E3779B97F4A7C15)) + lanes[0])
    raw = np.stack(lanes, axis=1).astype(">u8").tobytes()
    return [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]


def _packed_words(population: Population, cardinalities: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint64]]:
    digits = population.astype(np.uint64)
    return [digits[:, first:end] @ weights for first, end, weights in _words(tuple(cardinalities.tolist()))]


@lru_cache(maxsize=64)
def _words(cardinalities: tuple[int, ...]) -> list[tuple[int, int, npt.NDArray[np.uint64]]]:
    """The columns ``first..end`` of each word, and what a step of each column's digit is worth in it."""
    firsts: list[int] = []
    capacity = 0
    for i, cardinality in enumerate(cardinalities):
        if firsts and capacity * cardinality <= 1 << _WORD_BITS:
            capacity *= cardinality
        else:
            firsts.append(i)
            capacity = cardinality
    ends = [*firsts[1:], len(cardinalities)]
    return [
        (first, end, np.array([math.prod(cardinalities[i + 1 : end]) for i in range(first, end)], dtype=np.uint64))
        for first, end in zip(firsts, ends, strict=True)
    ]


def mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit reaches every output bit."""
    mixed = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _hashable(choice: Any) -> Any:
    if isinstance(choice, list):
        return tuple(_hashable(part) for part in choice)
    # A mapping is no choice of any column; as text it equals none.
    return repr(choice) if isinstance(choice, dict) else choice
