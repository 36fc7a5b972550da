"""The space of jobs that another tool ran: any JSON is a genotype, and nothing can be drawn from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.spaces.space import KEY_BYTES, Genotype, Layer, Population, Space


class Recorded(Space):
    """What an Optuna study or a Ray Tune run tried: configurations, kept as they were.

    Args:
        source: where they come from, e.g. ``optuna`` or ``ray-tune``: candidates of different sources are never
            taken for the same.
    """

    name: ClassVar[str] = "recorded"
    has_models = False

    def __init__(self, *, source: str) -> None:
        self.source = source

    @property
    def config(self) -> Mapping[str, Any]:
        return {"source": self.source}

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        self._refuse()

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        self._refuse()

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        self._refuse()

    def canonical(self, population: Population) -> Population:
        return population

    def keys(self, population: Population) -> list[bytes]:
        return [
            blake2b(json.dumps(genotype, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()
            for genotype in population
        ]

    def to_json(self, population: Population) -> list[Genotype]:
        return list(population)

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        population = np.empty(len(genotypes), dtype=object)
        population[:] = list(genotypes)
        return population

    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        self._refuse()

    def build(self, genotype: Genotype) -> NoReturn:
        self._refuse()

    def describe(self, genotype: Genotype) -> list[Layer]:
        """One row for each entry of a mapping."""
        entries = genotype.items() if isinstance(genotype, Mapping) else [("value", genotype)]
        return [Layer(name=str(name), kind=str(value), shape=()) for name, value in entries]

    def _refuse(self) -> NoReturn:
        problem = f"holds what {self.source} tried and cannot be searched or built"
        raise InputError("space.name", self.name, problem, "Describe the space in a job of your own, e.g. 'choices'.")
