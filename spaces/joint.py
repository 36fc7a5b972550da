"""Several spaces as one: an architecture and how it is trained, or a model and the policies that compress it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.conditions import Mask, allowed, in_order
from archfront.spaces.counting import Costed
from archfront.spaces.nested import BLOCKS, SHAPES, decisions, inner_space, inside, show_through, written
from archfront.spaces.product import Column, ColumnSpace
from archfront.spaces.rows import Packing
from archfront.spaces.space import KEY_BYTES, Genotype, Layer, Population, Space

if TYPE_CHECKING:
    from torch import nn

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EXCHANGED = 0.5
"""How often a crossover takes a part as a whole from one parent; else the part's own crossover mixes it."""


@runtime_checkable
class Transform(Protocol):
    """A part that changes the network of another one, as a compression policy does."""

    def apply(self, module: nn.Module, genotype: Genotype) -> nn.Module:
        """The changed module; the one that was given may be changed in place."""


class Joint(Space):
    """Genotypes ``{part: genotype of that part}`` of any spaces.

    Where all parts are finite product spaces a population is one index matrix, whose columns are the parts' side by
    side (``columns``, named ``part.column``), so that samplers of vectors serve it; else an ``(n, parts)`` matrix of
    objects, one packed row of each part.

    One part is the network: what ``build`` makes. The others that are a ``Transform`` then change it, in order; any
    other part is for evaluators, which read the genotype. Of the network's part show through: the shape of its
    input, and where nothing transforms it its blocks (``BlockSpace``) and costs.

    Args:
        parts: name -> space, as in a job file.
        network: the part that is built; the first one whose space has models by default.
        when: part -> what it waits for, as ``"other part.column"`` -> choices of a product space. A part that does not
            count is null in JSON, and its features are 0.

    Raises:
        InputError: no part, a name with other characters than letters, digits, ``_`` and ``-``, an error of a part's
            space, an unknown network, or conditions that name what is not there or wait for each other.
    """

    name: ClassVar[str] = "joint"

    def __init__(
        self,
        *,
        parts: dict[str, dict[str, Any]],
        network: str | None = None,
        when: dict[str, dict[str, list[bool | str | int | float]]] | None = None,
        _spaces: Mapping[str, Space] | None = None,
    ) -> None:
        made = _spaces or {name: inner_space(config, f"space.parts.{name}") for name, config in parts.items()}
        if not made:
            raise InputError("space.parts", parts, "is empty", "Give at least one space, as name: {name: ...}.")
        for name in made:
            if not _NAME.fullmatch(name):
                remedy = "Use letters, digits, '_' and '-'."
                raise InputError(f"space.parts.{name}", name, "is no name for a part", remedy)
        self.parts: dict[str, Space] = dict(made)
        self._names = list(self.parts)
        self._spaces = list(self.parts.values())
        self.network = self._network(network)
        self.has_models = self.network is not None
        self._rules = self._find_rules(when or {})
        self._when = when or {}
        self._conditional = [name in self._when for name in self._names]
        self._packing = Packing(self._spaces)
        if self._packing.matrix:
            self.columns = tuple(
                Column(f"{name}.{column.name}", column.choices, column.ordered)
                for name, space in self.parts.items()
                for column in _of(space).columns
            )
        known = [decisions(space) for space in self._spaces]
        self.decisions = None if None in known else sum(n or 0 for n in known)
        # What has no number of its own weighs as much as any other part, and what has one choice nothing.
        weights = [space.size != 1 for space in self._spaces] if self.decisions is None else known
        self._weights = np.array(weights, dtype=np.float64)
        self._counts = [1 if n is None else n for n in known]
        self._offer()

    @classmethod
    def of(
        cls,
        parts: Mapping[str, Space],
        *,
        network: str | None = None,
        when: dict[str, dict[str, list[Any]]] | None = None,
    ) -> Joint:
        """A joint space of spaces that exist already; they need not stand in the table of spaces."""
        return cls(parts={}, network=network, when=when, _spaces=parts)

    @property
    def config(self) -> Mapping[str, Any]:
        config: dict[str, Any] = {"parts": {name: written(space) for name, space in self.parts.items()}}
        return config | {"network": self.network} | ({"when": self._when} if self._when else {})

    @property
    def digest(self) -> str:
        """Of the parts' digests in their order, the network's name and the conditions."""
        parts = [[name, space.digest] for name, space in self.parts.items()]
        text = json.dumps([self.name, self.version, parts, self.network, self._when], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    @property
    def size(self) -> int | None:
        """The product of the parts' sizes; an upper bound where a part need not count."""
        sizes = [space.size for space in self._spaces]
        return None if None in sizes else math.prod(size or 0 for size in sizes)

    # Operators.

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        return self._joined([space.sample(rng, count) for space in self._spaces])

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        return self._joined([space.sample_spread(rng, count) for space in self._spaces])

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        """One part surely changes, each other one as often as ``rate`` would change any of its decisions.

        The part is drawn in proportion to the numbers of decisions, so that each decision changes as often as in a
        plain product space; evenly where one of the parts (a grammar, say) has no fixed number. A part that comes to
        count is drawn anew.

        Args:
            rate: of each decision beyond the certain change, handed to the parts; None for 1 / decisions, or for no
                further change where their number is not fixed.
        """
        parts, active = self._split(parents)
        chance = rate if rate is not None else 1 / self.decisions if self.decisions else 0.0
        shares = (active * self._weights).cumsum(axis=1)
        certain = (rng.random((len(parents), 1)) * shares[:, -1:] >= shares).sum(axis=1)
        children = []
        for i, (space, rows) in enumerate(zip(self._spaces, self._refilled(rng, parts, active), strict=True)):
            also = rng.random(len(rows)) < 1 - (1 - chance) ** self._counts[i]
            changed = np.flatnonzero(active[:, i] & ((certain == i) | (also & (self._weights[i] > 0))))
            rows = rows.copy()
            if len(changed):
                rows[changed] = space.mutate(rng, rows[changed], chance)
            children.append(rows)
        return self._joined(children)

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        """Each part is, half of the time, that of one parent, else what the part's own crossover makes of both. A
        part that counts in one parent alone is that parent's."""
        (ours, ours_active), (theirs, theirs_active) = self._split(first), self._split(second)
        ours, theirs = self._refilled(rng, ours, ours_active), self._refilled(rng, theirs, theirs_active)
        children = []
        for i, space in enumerate(self._spaces):
            alike = ours_active[:, i] == theirs_active[:, i]
            take_first = np.where(alike, rng.random(len(first)) < 0.5, ours_active[:, i])
            rows = np.where(take_first.reshape(-1, *[1] * (ours[i].ndim - 1)), ours[i], theirs[i])
            mixed = np.flatnonzero(alike & (rng.random(len(first)) >= _EXCHANGED))
            if len(mixed):
                rows[mixed] = space.crossover(rng, ours[i][mixed], theirs[i][mixed])
            children.append(rows)
        return self._joined(children)

    def canonical(self, population: Population) -> Population:
        parts, active = self._split(population)
        canonical = [space.canonical(rows) for space, rows in zip(self._spaces, parts, strict=True)]
        return self._packing.join(canonical, active)

    def keys(self, population: Population) -> list[bytes]:
        parts, active = self._split(population)
        keys = [space.keys(rows) for space, rows in zip(self._spaces, parts, strict=True)]
        nothing = bytes(KEY_BYTES)
        return [
            hashlib.blake2b(
                b"".join(key if on else nothing for key, on in zip(row, counts, strict=True)), digest_size=KEY_BYTES
            ).digest()
            for row, counts in zip(zip(*keys, strict=True), active.tolist(), strict=True)
        ]

    def to_json(self, population: Population) -> list[Genotype]:
        parts, active = self._split(population)
        written_parts = [space.to_json(rows) for space, rows in zip(self._spaces, parts, strict=True)]
        return [
            {name: part if on else None for name, part, on in zip(self._names, row, counts, strict=True)}
            for row, counts in zip(zip(*written_parts, strict=True), active.tolist(), strict=True)
        ]

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        for genotype in genotypes:
            if not isinstance(genotype, Mapping) or set(genotype) != set(self._names):
                remedy = f"Give a mapping with the keys {', '.join(self._names)}."
                raise InputError("genotype", genotype, "does not fit this space", remedy)
        parts: list[Population] = []
        for name, space, conditional in zip(self._names, self._spaces, self._conditional, strict=True):
            given = np.array([not conditional or genotype[name] is not None for genotype in genotypes], dtype=bool)
            with inside("genotype", f"genotype.{name}"):
                rows = space.from_json([g[name] for g, there in zip(genotypes, given, strict=True) if there])
            parts.append(self._packing.spread(len(parts), rows, given))
        active = self._active(parts)
        for row, i in np.argwhere(active).tolist():
            if genotypes[row][self._names[i]] is None and self._conditional[i]:
                name = self._names[i]
                needs = " and ".join(f"{column} has one of {values}" for column, values in self._when[name].items())
                remedy = f"Give a genotype of {self._spaces[i].name}."
                raise InputError(f"genotype.{name}", None, f"is null although {needs}", remedy)
        return self._packing.join(parts, active)

    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        """The parts' features side by side, 0 where a part does not count; a part that need not count has one more,
        1 where it does."""
        parts, active = self._split(population)
        features: list[npt.NDArray[Any]] = []
        for i, (space, rows) in enumerate(zip(self._spaces, parts, strict=True)):
            counts = active[:, i : i + 1]
            features += [space.encode(rows) * counts, counts] if self._conditional[i] else [space.encode(rows)]
        return np.concatenate(features, axis=1).astype(np.float32)

    def build(self, genotype: Genotype) -> nn.Module:
        """The network's module, changed by every part that is a ``Transform``, in the order in which they stand.

        Raises:
            InputError: the genotype is not of this space, or no part has models.
        """
        if self.network is None:
            problem = "has no part with torch modules"
            raise InputError("space.parts", self._names, problem, "Add one, or use an evaluator that reads genotypes.")
        [member] = self.to_json(self.from_json([genotype]))
        module = self.parts[self.network].build(member[self.network])
        for name, space in self.parts.items():
            if name != self.network and isinstance(space, Transform) and member[name] is not None:
                module = space.apply(module, member[name])
        return module

    def describe(self, genotype: Genotype) -> list[Layer]:
        """The layers of all parts that count, the names with that of the part in front."""
        [member] = self.to_json(self.from_json([genotype]))
        return [
            layer
            for name, space in self.parts.items()
            if member[name] is not None
            for layer in _prefixed(name, space.describe(member[name]))
        ]

    def active(self, population: Population) -> Mask:
        """``(n, columns)``: which decisions count. For a joint space of product spaces; see ``ColumnSpace``."""
        parts, active = self._split(population)
        own = [_of(space).active(rows) for space, rows in zip(self._spaces, parts, strict=True)]
        return np.concatenate([counts & active[:, i : i + 1] for i, counts in enumerate(own)], axis=1)

    def folded(self, population: Population) -> Population:
        """See ``ColumnSpace``."""
        parts, active = self._split(population)
        return self._packing.join(
            [_of(space).folded(rows) for space, rows in zip(self._spaces, parts, strict=True)], active
        )

    # The parts.

    def _split(self, population: Population) -> tuple[list[Population], Mask]:
        """Each part's population, ``n`` rows each, and ``(n, parts)``: which of them count."""
        parts = self._packing.split(population)
        return parts, self._active(parts)

    def _joined(self, parts: Sequence[Population]) -> Population:
        return self._packing.join(parts, self._active(parts))

    def _active(self, parts: Sequence[Population]) -> Mask:
        found = np.ones((len(parts[0]), len(parts)), dtype=bool)
        canonical: dict[int, Population] = {}
        for i, needs in self._rules:
            for other, column, values in needs:
                # Of the canonical form: parts that build the same must not differ in what waits for them.
                if other not in canonical:
                    canonical[other] = self._spaces[other].canonical(parts[other])
                rows = canonical[other]
                counts = _of(self._spaces[other]).active(rows)[:, column]
                found[:, i] &= found[:, other] & counts & values[rows[:, column]]
        return found

    def _refilled(self, rng: np.random.Generator, parts: Sequence[Population], active: Mask) -> list[Population]:
        """The parts with what does not count drawn anew, for when a change makes it count."""
        refilled = []
        for i, (space, rows) in enumerate(zip(self._spaces, parts, strict=True)):
            missing = np.flatnonzero(~active[:, i])
            if len(missing):
                rows = rows.copy()
                rows[missing] = space.sample(rng, len(missing))
            refilled.append(rows)
        return refilled

    def _network(self, given: str | None) -> str | None:
        able = [name for name, space in self.parts.items() if space.has_models]
        if given is None:
            return able[0] if able else None
        if given not in able:
            raise InputError("space.network", given, "is no part with torch modules", suggestion(given, able))
        return given

    def _find_rules(
        self, when: Mapping[str, Mapping[str, Sequence[Any]]]
    ) -> list[tuple[int, list[tuple[int, int, Mask]]]]:
        """For each conditional part (by number, after those it waits for): other part, column, choices that do."""
        parsed: dict[str, list[tuple[int, int, Mask]]] = {}
        for name, needs in when.items():
            field = f"space.when.{name}"
            if name not in self.parts:
                raise InputError(field, name, "is not a part of this space", suggestion(name, self._names))
            if name == self.network:
                problem = "is the network, which has to be there"
                raise InputError(field, name, problem, "Drop the condition, or name another space.network.")
            if not needs:
                raise InputError(field, dict(needs), "names no decision", "Name one as part.column, or leave it out.")
            parsed[name] = [self._requirement(key, values, f"{field}.{key}") for key, values in needs.items()]
        order = in_order({name: [self._names[other] for other, _, _ in parsed[name]] for name in parsed}, "space.when")
        return [(self._names.index(name), parsed[name]) for name in order]

    def _requirement(self, key: str, values: Sequence[Any], field: str) -> tuple[int, int, Mask]:
        part = key.partition(".")[0]
        known = {
            f"{name}.{c.name}": (i, place, c)
            for i, (name, space) in enumerate(self.parts.items())
            if isinstance(space, ColumnSpace)
            for place, c in enumerate(space.columns)
        }
        if part in self.parts and not isinstance(self.parts[part], ColumnSpace):
            remedy = "Wait for a decision of a finite product space."
            raise InputError(field, key, f"names a part of {self.parts[part].name}, which has no columns", remedy)
        if key not in known:
            raise InputError(field, key, "is not a decision of a part, as part.column", suggestion(key, known))
        i, place, found = known[key]
        return i, place, allowed(found, values, field)

    def _offer(self) -> None:
        """Show what the network's part says about its models, as far as it holds for the joint space's."""
        if self.network is None:
            return
        network = self.parts[self.network]
        show_through(self, network, SHAPES)
        if any(isinstance(space, Transform) for space in self._spaces):
            return
        place = self._names.index(self.network)
        if isinstance(network, BlockSpace):
            show_through(self, network, BLOCKS)
            self.block_indices = _OfPart(self._packing, place, network.block_indices)
        if isinstance(network, Costed):
            self.costs = _OfPart(self._packing, place, network.costs)


class _OfPart:
    """A function of one part's population as one of the whole's."""

    def __init__(self, packing: Packing, place: int, function: Callable[[Population], Any]) -> None:
        self._packing, self._place, self._function = packing, place, function

    def __call__(self, population: Population) -> Any:
        return self._function(self._packing.split(population)[self._place])


def _of(space: Space) -> ColumnSpace:
    assert isinstance(space, ColumnSpace)
    return space


def _prefixed(name: str, layers: Iterable[Layer]) -> list[Layer]:
    return [
        replace(
            layer,
            name=f"{name}.{layer.name}",
            branches=tuple(tuple(_prefixed(name, branch)) for branch in layer.branches),
        )
        for layer in layers
    ]
