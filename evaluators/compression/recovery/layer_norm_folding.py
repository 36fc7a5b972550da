"""Channels of a layer normalisation given one common scale: their own scales move into its gain and the next layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.policies.quantiser import QuantisationParameters


def fold_channel_scales(
    norm: nn.LayerNorm, readers: Sequence[nn.Linear], scale: Tensor, zero_point: Tensor
) -> QuantisationParameters:
    """Let one scale quantise a normalisation's outputs as well as a scale for each channel would, in place.

    With ``r1 = s / mean(s)`` and ``r2 = z - mean(z)``: ``gain' = gain / r1``, ``bias' = (bias + s r2) / r1``, and in
    every reader ``W' = W diag(r1)``, ``b' = b - W (s r2)``. The readers' outputs do not change, and each channel's
    codes under the common scale are those that it had under its own. For that the mean of the zero points is rounded:
    with a broken one, ``round(x / s + r2)`` is not ``round(x / s) + r2``.

    Source: Li, Xiao, Yang and Gu, "RepQ-ViT", 2023 (scale reparameterisation).

    Args:
        norm: over one axis, of width ``d``. It gets a gain and a bias if it has none.
        readers: all that reads the normalisation's output; each gets a bias if it has none.
        scale: ``(d,)``, positive, of each channel.
        zero_point: ``(d,)``, integers, the code of 0 in each channel.

    Returns:
        the common scale and zero point, ``(1, 1)`` each.

    Raises:
        InputError: shapes that do not match, or a scale that is not positive.
    """
    width = norm.normalized_shape[-1]
    if len(norm.normalized_shape) != 1 or any(reader.in_features != width for reader in readers) or not readers:
        found = (norm.normalized_shape, [reader.in_features for reader in readers])
        raise InputError("folding.readers", found, "do not read this normalisation", "Give all layers that do.")
    if scale.shape != (width,) or zero_point.shape != (width,):
        problem = f"are the shapes of scale and zero point for {width} channels"
        raise InputError("folding.scale", (tuple(scale.shape), tuple(zero_point.shape)), problem, f"Give ({width},).")
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise InputError("folding.scale", scale.tolist(), "has values that are not positive", "Give positive scales.")
    # In double precision, lest the outputs change by the rounding of differences.
    s, z = scale.detach().double(), zero_point.detach().double()
    common_scale, common_zero = s.mean(), z.mean().round()
    r1, shift = s / common_scale, s * (z - common_zero)
    gain = torch.ones_like(s) if norm.weight is None else norm.weight.detach().double()
    bias = torch.zeros_like(s) if norm.bias is None else norm.bias.detach().double()
    kind = readers[0].weight.dtype if norm.weight is None else norm.weight.dtype
    learns = readers[0].weight.requires_grad
    _set(norm, "weight", (gain / r1).to(kind), learns)
    _set(norm, "bias", ((bias + shift) / r1).to(kind), learns)
    norm.elementwise_affine = True
    for reader in readers:
        weight = reader.weight.detach().double()
        before = 0 if reader.bias is None else reader.bias.detach().double()
        _set(reader, "bias", (before - weight @ shift).to(reader.weight.dtype), learns)
        _set(reader, "weight", (weight * r1).to(reader.weight.dtype), learns)
    return QuantisationParameters(
        scale=common_scale.to(scale.dtype).reshape(1, 1), zero_point=common_zero.to(torch.int16).reshape(1, 1)
    )


def _set(module: nn.Module, name: str, value: Tensor, learns: bool) -> None:
    """A parameter's new value, in place where it exists: optimizers and ties hold the parameter itself."""
    parameter = getattr(module, name)
    if parameter is None:
        module.register_parameter(name, nn.Parameter(value, requires_grad=learns))
    else:
        with torch.no_grad():
            parameter.copy_(value)
