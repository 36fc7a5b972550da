"""Sums over the blocks of chains, for a population at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from archfront.spaces.blocks import NO_BLOCK, BlockSpace
from archfront.spaces.space import Population

_ROWS = 2048
"""Of a population at a time: their indices then stay in the cache, which makes it four times as fast."""

Vector = npt.NDArray[np.float64]


def chain_sums(values: Vector, indices: npt.NDArray[np.int64]) -> Vector:
    """``(n,)`` sums of the values of each row's blocks; ``NO_BLOCK`` counts 0."""
    assert NO_BLOCK == -1
    padded = np.append(values, 0.0)  # -1 is the last
    sums: Vector = np.zeros(len(indices))
    for column in indices.T:
        sums += padded[column]
    return sums


def population_sums(space: BlockSpace, values: Vector, population: Population) -> Vector:
    """``(n,)`` sums over each genotype's blocks of ``(blocks,)`` values in the order of the catalogue."""
    sums: Vector = np.empty(len(population))
    for i in range(0, len(population), _ROWS):
        sums[i : i + _ROWS] = chain_sums(values, space.block_indices(population[i : i + _ROWS]))
    return sums
