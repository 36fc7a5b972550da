"""What a space offers when its models are sequences of blocks: the ground of per-block latency tables.

A space takes part by having these methods; it need not inherit from anything here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from archfront.spaces.space import Genotype, Population

if TYPE_CHECKING:
    from torch import nn

NO_BLOCK = -1
"""In ``block_indices``: a layer that leaves nothing in the model."""


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One distinct block of a space.

    Attributes:
        descriptor: everything that fixes the block's cost (operator, channels, stride, groups, input height and
            width); two blocks of one descriptor cost the same wherever they stand.
        input_shape: ``(channels, height, width)``, or whatever the block takes, without the batch.
        output_shape: likewise.
    """

    descriptor: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@runtime_checkable
class BlockSpace(Protocol):
    """A space whose models are chains of blocks out of a finite catalogue, stem and head included."""

    @property
    def name(self) -> str:
        """The name in job files."""

    @property
    def digest(self) -> str:
        """Identity of the space."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The space's arguments: its registered name and these build it again in another process."""

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        """Genotypes drawn from the space."""

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        """One mutant per parent."""

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        """One child for each pair of parents."""

    def to_json(self, population: Population) -> list[Genotype]:
        """Plain data of genotypes."""

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        """The inverse of ``to_json``."""

    def block_catalogue(self) -> Sequence[BlockSpec]:
        """Every distinct block that a model of the space may hold, each once, in a fixed order."""

    def block_indices(self, population: Population) -> npt.NDArray[np.int64]:
        """For each genotype its blocks in the order of the forward pass, stem first, head last.

        Returns:
            ``(n, positions)`` indices into ``block_catalogue()``; ``NO_BLOCK`` where a layer does nothing.
        """

    def build_block(self, descriptor: str) -> nn.Module:
        """One block of the catalogue with fresh weights from torch's global generator.

        Raises:
            InputError: the descriptor is not in the catalogue.
        """


def block_descriptors(space: BlockSpace, genotype: Genotype) -> list[str]:
    """The descriptors of one genotype's blocks, in the order of the forward pass."""
    catalogue = space.block_catalogue()
    indices = space.block_indices(space.from_json([genotype]))[0]
    return [catalogue[i].descriptor for i in indices if i != NO_BLOCK]
