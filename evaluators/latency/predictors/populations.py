"""Whole populations of a space of blocks at once: every term of a network's latency is a sum over its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archfront.evaluators.latency.chains import chain_sums, population_sums
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.predictors.predictor import Vector
from archfront.evaluators.latency.space_traces import block_traces, traced_genotypes
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.space import Genotype, Population, Space


class BlockTerms:
    """The terms of each block of a space on the device of a predictor, priced once.

    Args:
        space: of blocks; its models are traced where ``predictor`` holds.
        predictor: prices the blocks' operators, measured or by its trees.
        batch: images a pass.
        device: that the traces claim.
    """

    def __init__(self, space: BlockSpace, predictor: NetworkLatency, *, batch: int = 1, device: str = "cpu") -> None:
        self._space = space
        self._predictor = predictor
        traces = block_traces(space, batch=batch, device=device)
        self._terms = predictor.terms(traces)
        known = [bool(predictor.prices.ms(found.operators)[1].all()) for found in traces]
        self._guessed = 1.0 - np.array(known, dtype=np.float64)
        # What a network has around its blocks (containers, a pooling) is the same for all of them.
        one = space.sample(np.random.default_rng(0), 1)
        whole = predictor.terms(list(traced_genotypes(space, space.to_json(one), batch=batch, device=device)))  # type: ignore[arg-type]
        self._around = whole[0] - _sums(self._terms, space.block_indices(one))[0]

    def terms(self, population: Population) -> npt.NDArray[np.float64]:
        """``(n, 5)``, as ``NetworkLatency.terms`` of the traced networks."""
        return np.asarray(_sums(self._terms, self._space.block_indices(population)) + self._around)

    def extrapolated(self, population: Population) -> npt.NDArray[np.bool_]:
        """``(n,)``: whether some block has an operator that was never measured."""
        return np.asarray(population_sums(self._space, self._guessed, population) > 0)

    def ms(self, population: Population) -> Vector:
        """``(n,)`` latencies in ms, as ``NetworkLatency.predict`` of the traced networks."""
        weights = self._predictor.weights
        sums = population_sums(self._space, self._terms @ weights, population)
        return np.asarray(sums + float(self._around @ weights))


class GenotypeLatency:
    """The latency of a space's genotypes: by blocks where the space has them, else traced one by one.

    Args:
        space: of torch models.
        predictor: of the device.
        batch: images a pass.
        device: that the traces claim.
    """

    def __init__(self, space: Space, predictor: NetworkLatency, batch: int = 1, device: str = "cpu") -> None:
        self.predictor = predictor
        self._space = space
        self._batch, self._device = batch, device
        self._blocks = (
            BlockTerms(space, predictor, batch=batch, device=device) if isinstance(space, BlockSpace) else None
        )

    def of(self, genotypes: Sequence[Genotype]) -> list[tuple[float, bool] | Exception]:
        """ms, and whether an operator had to be guessed; an exception for one that cannot be traced."""
        if self._blocks is not None:
            population = self._space.from_json(genotypes)
            guessed = self._blocks.extrapolated(population).tolist()
            return list(zip(self._blocks.ms(population).tolist(), guessed, strict=True))
        return [self._traced(genotype) for genotype in genotypes]

    def _traced(self, genotype: Genotype) -> tuple[float, bool] | Exception:
        try:
            found = list(traced_genotypes(self._space, [genotype], batch=self._batch, device=self._device))
            prediction = self.predictor.predict(found)
        except Exception as error:
            return error
        return float(prediction.ms[0]), bool(prediction.extrapolated[0])


def _sums(terms: npt.NDArray[np.float64], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.stack([chain_sums(column, indices) for column in terms.T], axis=1)
