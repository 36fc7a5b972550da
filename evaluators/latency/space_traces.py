"""Genotypes of a space as traces, each traced once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from archfront.errors import InputError
from archfront.evaluators.costs import InputShaped
from archfront.evaluators.latency.tracing import Trace, trace
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
