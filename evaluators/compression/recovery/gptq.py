"""GPTQ: weights are quantised column after column, and those still to come make up for the error."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.policies.quantiser import QuantisationParameters, Quantiser

Order = Literal["activation", "none"]

_ATTEMPTS = 60
"""Doublings of the damping: from 1e-6 of the diagonal's mean beyond anything that a matrix of numbers needs."""


def layer_inputs(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each weight of a channel is multiplied with: ``(groups, samples, weights of a channel)``.

    Args:
        layer: groups are 1 for a linear layer.
        inputs: of the layer, behind its hooks, ``(..., features)`` or ``(n, channels, height, width)``; a sample is a
            token, or a place of the output.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # Left, right, top, bottom, with 'same' worked out: torch's own convolution pads the other modes by it.
    padded = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    columns = functional.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    d = columns.shape[1] // layer.groups
    grouped = columns.reshape(len(columns), layer.groups, d, -1)
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, -1, d)


def hessian_of(inputs: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """``2/n sum_t r_t x_t x_t^T`` over ``n`` samples: of the squared error of a layer's outputs, per output channel.

    The weight enters once, so that it weighs the squared error of its token; scaling the tokens themselves by ``r``
    would weigh it by ``r^2``.

    Source: Frantar et al., "GPTQ", 2023; with weights: Sung et al., "RSQ: Learning from Important Tokens", 2025.

    Args:
        inputs: ``(samples, d)``, or ``(groups, samples, d)`` as ``layer_inputs`` gives.
        token_weights: ``(samples,)``, not negative; ``rotation.attention_received`` has mean 1. None for 1 each.

    Returns:
        ``(d, d)`` or ``(groups, d, d)``, in float64 if the inputs are, else in float32.

    Raises:
        InputError: no samples, or weights that do not match them or are negative.
    """
    if inputs.dim() not in (2, 3) or inputs.shape[-2] == 0:
        problem = "is no (samples, d) or (groups, samples, d)"
        raise InputError("gptq.inputs", tuple(inputs.shape), problem, "Flatten with layer_inputs.")
    x = inputs.detach().to(torch.float64 if inputs.dtype == torch.float64 else torch.float32)
    weighted = x
    if token_weights is not None:
        if token_weights.shape != x.shape[-2:-1] or bool((token_weights < 0).any()):
            problem = f"are not {x.shape[-2]} weights of at least 0"
            raise InputError("gptq.token_weights", tuple(token_weights.shape), problem, "Give one for each sample.")
        weighted = x * token_weights.to(x)[:, None]
    return weighted.transpose(-1, -2) @ x * (2 / x.shape[-2])


def gptq(
    weight: Tensor,
    hessian: Tensor,
    quantiser: Quantiser,
    *,
    damping: float = 0.01,
    block: int = 128,
    order: Order = "activation",
) -> tuple[Tensor, QuantisationParameters, Tensor]:
    """Codes that keep ``tr((W - W_q) H (W - W_q)^T)`` small, where nearest ones would only keep ``|W - W_q|`` small.

    Scales and zero points are the quantiser's for the weight as given, also those of groups: they do not depend on the
    order. Inputs that never occur (0 on the diagonal) get the nearest codes.

    Source: Frantar et al., "GPTQ", 2023, Algorithm 1.

    Args:
        weight: ``(channels, ...)``, of a linear layer or a convolution.
        hessian: ``(d, d)`` with ``d`` weights a channel, or ``(groups, d, d)`` of a grouped convolution, whose channels
            are divided among them in order.
        quantiser: of the weight.
        damping: share of the diagonal's mean that is added to it, and doubled until Cholesky's decomposition works.
        block: columns after which the error reaches those behind. Changes the result by rounding only.
        order: of the columns: ``activation`` by falling diagonal, so that what matters most is quantised while all
            others can make up for it; or as they lie.

    Returns:
        codes (int16) and values, both of the weight's shape, and their parameters.

    Raises:
        InputError: a Hessian of another shape or with values that are no numbers, or one that no damping makes
            positive definite.
    """
    columns = weight[0].numel()
    if hessian.dim() == 2:
        hessian = hessian[None]
    if hessian.dim() != 3 or hessian.shape[1:] != (columns, columns) or len(weight) % len(hessian):
        problem = f"is the shape of no Hessian of a weight {tuple(weight.shape)}"
        raise InputError("gptq.hessian", tuple(hessian.shape), problem, f"Give (groups, {columns}, {columns}).")
    if damping < 0:
        raise InputError("gptq.damping", damping, "is negative", "Give 0 or more.")
    if block < 1:
        raise InputError("gptq.block", block, "is no number of columns", "Give 1 or more.")
    parameters = quantiser.parameters(weight)
    flat = weight.detach().reshape(len(weight), -1).to(parameters.scale.dtype)
    scale, zero_point = (quantiser.spread(p, weight.shape) for p in (parameters.scale, parameters.zero_point))
    rows = len(weight) // len(hessian)
    codes = torch.empty(flat.shape, dtype=torch.int16, device=flat.device)
    for i, one in enumerate(hessian):
        some = slice(i * rows, (i + 1) * rows)
        one, seen = _without_unseen(one)
        permutation = torch.arange(columns, device=flat.device)
        if order == "activation":
            permutation = one.diagonal().masked_fill(~seen, 0).argsort(descending=True, stable=True)
        factor = _inverse_factor(one[permutation][:, permutation], damping).to(flat.dtype)
        codes[some, permutation] = _sweep(
            flat[some, permutation], factor, scale[some, permutation], zero_point[some, permutation], quantiser, block
        )
    codes = codes.reshape(weight.shape)
    return codes, parameters, quantiser.dequantise(codes, parameters).to(weight.dtype)


def _without_unseen(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian in float64 with the diagonal's mean for inputs that never occur, and which do occur."""
    if not torch.isfinite(hessian).all():
        raise InputError("gptq.hessian", tuple(hessian.shape), "has infinite values or NaN", "Check the inputs.")
    whole = hessian.double().clone()
    seen = whole.diagonal() != 0
    # Not a fixed number, which could be far above the others' scale, and the damping goes by the mean.
    whole.diagonal()[~seen] = whole.diagonal()[seen].mean() if bool(seen.any()) else 1.0
    return whole, seen


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse: row k is what column k's error asks of later ones."""
    mean = hessian.diagonal().mean().abs()
    share = damping
    for _ in range(_ATTEMPTS):
        damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (share * mean)
        lower: Tensor
        upper: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        share = max(2 * share, 1e-6)
    problem = "has no Cholesky decomposition, however much it is damped"
    raise InputError("gptq.hessian", tuple(hessian.shape), problem, "Give a sum of x x^T.")


def _sweep(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, quantiser: Quantiser, block: int
) -> Tensor:
    """int16 codes of columns in this order. ``weight`` is a copy, and is used up."""
    codes = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
    columns = weight.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(weight[:, start:stop])
        for k in range(start, stop):
            code = (torch.round(weight[:, k] / scale[:, k]) + zero_point[:, k]).clamp(quantiser.low, quantiser.high)
            error = (weight[:, k] - (code - zero_point[:, k]) * scale[:, k]) / factor[k, k]
            weight[:, k:stop] -= error[:, None] * factor[k, k:stop]
            codes[:, k], errors[:, k - start] = code.to(torch.int16), error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes
