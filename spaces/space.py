"""The contract of a search space, and the drawing of one of its members."""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Genotype = Any
"""One point of a space as plain data: whatever ``json.dumps`` takes."""

Population = npt.NDArray[Any]
"""Many genotypes: an array whose first axis counts them. ``(n, columns)`` integers for a finite product space,
``(n,)`` objects otherwise, so that ``population[indices]`` and ``np.concatenate`` work for every space."""

KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of a description: what a report draws and a person reads.

    Attributes:
        name: position in the model, e.g. ``stage2.1``.
        kind: short name of the operator, e.g. ``k5_e6``.
        shape: output shape ``(channels, height, width)`` or whatever the layer gives, without the batch.
        size: relative extent in the drawing, 0 for a layer that does nothing.
        details: further facts to show on demand.
        branches: of a layer that is several sequences of layers side by side.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: float = 1.0
    details: Mapping[str, Any] = field(default_factory=dict)
    branches: tuple[tuple[Layer, ...], ...] = ()


class Space(ABC):
    """All that may vary.

    Every operator is vectorised over a population and draws from the generator it is given and nothing else, so that
    the same generator state gives the same population.
    """

    name: ClassVar[str]
    """The name in job files."""

    version: ClassVar[int] = 1
    """Raise it when a genotype's meaning changes: candidates of another version are never taken for the same."""

    has_models: bool = True
    """Whether ``build`` makes torch modules; False for plain choices, which evaluators read themselves."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """Everything that fixes the meaning of a genotype, as JSON."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, count: int) -> Population:
        """``count`` genotypes drawn from the space's own distribution (uniform where there is a choice)."""

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        """``count`` genotypes that differ more from each other than ``sample``'s, to begin a search for a front with.

        Where many like decisions are drawn independently, their sums (and so sizes and latencies) all come out near
        the middle. ``sample`` unless a space knows better.
        """
        return self.sample(rng, count)

    @abstractmethod
    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        """One mutant per parent; at least one decision differs wherever one can.

        Args:
            rate: probability of each decision to change; the space's default is about one change a genotype.
        """

    @abstractmethod
    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        """One child for each pair of parents (row i of ``first`` with row i of ``second``)."""

    @abstractmethod
    def canonical(self, population: Population) -> Population:
        """The representatives of the genotypes' classes: those that build the same model become equal."""

    @abstractmethod
    def keys(self, population: Population) -> list[bytes]:
        """Digests of ``KEY_BYTES`` bytes of the canonical forms; equal keys mean the same model."""

    @abstractmethod
    def to_json(self, population: Population) -> list[Genotype]:
        """Plain data for the ledger and for people."""

    @abstractmethod
    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        """The inverse of ``to_json``.

        Raises:
            InputError: a genotype is not of this space; the message names the position and what is allowed.
        """

    @abstractmethod
    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        """Features ``(n, features)`` of the canonical forms, for predictors."""

    @abstractmethod
    def build(self, genotype: Genotype) -> nn.Module:
        """The torch module of a genotype, with fresh weights from torch's global generator."""

    @abstractmethod
    def describe(self, genotype: Genotype) -> list[Layer]:
        """The layers of a genotype, in order."""

    @property
    def known(self) -> Mapping[str, Genotype]:
        """Members with a name of their own, e.g. published networks: seeds of a job may be given by it."""
        return {}

    def members(self, genotypes: Mapping[str, Genotype]) -> dict[str, Genotype]:
        """Those that are of this space."""
        found = {}
        for name, genotype in genotypes.items():
            with contextlib.suppress(InputError):
                [found[name]] = self.to_json(self.from_json([genotype]))
        return found

    def genotypes_of(self, given: Sequence[Any]) -> list[Genotype]:
        """Genotypes, names of ``known`` members replaced by theirs.

        Raises:
            InputError: one is neither.
        """
        known = self.known
        genotypes = [known[one] if isinstance(one, str) and one in known else one for one in given]
        for i, genotype in enumerate(genotypes):
            try:
                self.validate(genotype)
            except InputError as error:
                remedy = f"{error.remedy} Members with a name: {', '.join(known)}." if known else error.remedy
                raise InputError(f"seeds.{i}", error.value, f"({error.field}) {error.problem}", remedy) from None
        return genotypes

    @property
    def size(self) -> int | None:
        """Number of genotypes, or None where there is no bound."""
        return None

    @property
    def digest(self) -> str:
        """Identity of the space: candidates are shared between jobs of the same digest."""
        return digest_of(self.name, self.version, self.config)

    def validate(self, genotype: Genotype) -> None:
        """Check one genotype.

        Raises:
            InputError: it is not of this space.
        """
        self.from_json([genotype])


def digest_of(name: str, version: int, config: Mapping[str, Any]) -> str:
    """Identity of a space with this name, version and configuration."""
    text = json.dumps({"name": name, "version": version, "config": dict(config)}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()
