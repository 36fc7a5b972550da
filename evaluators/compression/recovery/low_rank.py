"""Low-rank correction of quantisation errors: the error's largest singular vectors are kept beside the codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.recovery import Case, Recovery
from archfront.spaces.policies.packing import quantised_bytes
from archfront.spaces.policies.quantised import float_weight, quantised_layers
from archfront.spaces.policies.quantiser import Quantiser


class LowRank(Recovery):
    """Adds to each quantised weight the best low-rank approximation of what it lost, and counts the factors' bytes.

    Yao et al., "ZeroQuant-V2", 2023 (LoRC).

    Args:
        rank: of each correction, at most the smaller side of the weight.
        bits: of the factors, with a scale for each component; 16 for float16.
    """

    name: ClassVar[str] = "low-rank"
    stage = 2

    def __init__(self, *, rank: Annotated[int, Field(ge=1)] = 8, bits: Literal[4, 8, 16] = 8) -> None:
        self.rank, self.bits = rank, bits

    def recover(self, case: Case) -> None:
        quantiser = None if self.bits == 16 else Quantiser(bits=self.bits)
        for _, layer, holder in quantised_layers(case.student):
            weight = float_weight(layer)
            assert weight is not None
            holder.correction = None
            quantised = holder(weight).detach()
            rank = min(self.rank, len(weight), weight[0].numel())
            factors = low_rank_correction(weight, quantised, rank)
            left, right = (
                (f.half().to(f) for f in factors) if quantiser is None else quantised_factors(*factors, quantiser)
            )
            holder.correction = (left @ right).reshape(weight.shape).to(weight.dtype)
            holder.factors, holder.factor_quantiser = factors, quantiser
            holder.correction_bytes = correction_bytes(weight.shape, rank, quantiser)


def low_rank_correction(weight: Tensor, quantised: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``weight - quantised`` of this rank.

    With the singular value decomposition ``E = U S V^T``, they are ``U_m sqrt(S_m)`` and ``sqrt(S_m) V_m^T``; what
    remains has the squared norm ``sum_{k>m} s_k^2``.

    Source: Yao et al., "ZeroQuant-V2", 2023 (LoRC).

    Args:
        weight: ``(channels, ...)``; all axes after the first are flattened.
        quantised: what stands for it, of the same shape.
        rank: 0 to the smaller side.

    Returns:
        ``(channels, rank)`` and ``(rank, weights of a channel)``, in float64 if the weight is, else in float32.

    Raises:
        InputError: different shapes, or a rank that the weight cannot have.
    """
    if weight.shape != quantised.shape:
        problem = f"is not the shape {tuple(weight.shape)} of the weight"
        raise InputError("low_rank.quantised", tuple(quantised.shape), problem, "Give both in one shape.")
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    error = (weight.detach().to(work) - quantised.detach().to(work)).reshape(len(weight), -1)
    if not 0 <= rank <= min(error.shape):
        problem = f"is no rank of {error.shape[0]} x {error.shape[1]}"
        raise InputError("low_rank.rank", rank, problem, f"Give 0 to {min(error.shape)}.")
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def quantised_factors(left: Tensor, right: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """Both factors as they are once quantised, with a scale for each component, as ``LowBitLinear`` stores them."""
    return quantiser.fake(left.T).T, quantiser.fake(right)


def correction_bytes(shape: Sequence[int], rank: int, quantiser: Quantiser | None = None) -> int:
    """Bytes that factors of a weight ``shape`` add: ``rank (channels + weights of a channel)`` numbers.

    Args:
        shape: of the weight.
        rank: of the correction.
        quantiser: of the factors; None for float16.
    """
    channels, columns = shape[0], math.prod(shape[1:])
    if rank == 0:
        return 0
    if quantiser is None:
        return 2 * rank * (channels + columns)
    return quantised_bytes((rank, channels), quantiser) + quantised_bytes((rank, columns), quantiser)
