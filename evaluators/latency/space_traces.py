"""Genotypes and blocks of a space as traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from archfront.errors import InputError
from archfront.evaluators.costs import InputShaped
from archfront.evaluators.latency.tracing import Trace, trace
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.space import Genotype, Space


def traced_genotypes(
    space: Space, genotypes: Sequence[Genotype], *, batch: int = 1, device: str = "cpu"
) -> Iterator[Trace]:
    """The traces of genotypes in order.

    Raises:
        InputError: the space does not say what its models take, or a model cannot be traced.
    """
    if not isinstance(space, InputShaped):
        remedy = "Choose a space of torch models."
        raise InputError("space.name", space.name, "does not say what its models take", remedy)
    shape = (space.in_channels, space.resolution, space.resolution)
    for genotype in genotypes:
        with torch.device("meta"):
            model = space.build(genotype)
        yield trace(model, shape, batch=batch, device=device)


def block_traces(space: BlockSpace, *, batch: int = 1, device: str = "cpu") -> list[Trace]:
    """The traces of a space's blocks in the order of its catalogue."""
    found = []
    for spec in space.block_catalogue():
        with torch.device("meta"):
            block = space.build_block(spec.descriptor)
        found.append(trace(block, spec.input_shape, batch=batch, device=device))
    return found


def covering_traces(space: Space, samples: int, *, batch: int = 1, device: str = "cpu") -> list[Trace]:
    """Traces that hold the operators of a space: of one network and all blocks where it has blocks, else of genotypes
    that are spread over it, which may miss a rare one.

    Raises:
        InputError: the space does not say what its models take.
    """
    blocks = block_traces(space, batch=batch, device=device) if isinstance(space, BlockSpace) else []
    genotypes = space.to_json(space.sample_spread(np.random.default_rng(0), 1 if blocks else samples))
    return [*blocks, *traced_genotypes(space, genotypes, batch=batch, device=device)]
