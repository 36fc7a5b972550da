"""AdaRound and BRECQ: whether each weight is rounded up or down is learned from the outputs of its block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from archfront.errors import InputError
from archfront.spaces.policies.quantiser import QuantisationParameters, Quantiser

_STRETCH, _OFFSET = 1.2, -0.1
"""Of the rectified sigmoid: it reaches 0 and 1 at a finite argument, where its gradient is 0."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Learned codes of one layer.

    Attributes:
        codes: int16, of the weight's shape.
        parameters: the quantiser's for the float weight.
    """

    codes: Tensor
    parameters: QuantisationParameters


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What ``reconstruct`` found.

    Attributes:
        layers: path in the block -> its codes; ``""`` for a block that is a layer.
        nearest_mse, mse: mean squared error of the block's outputs on the given inputs, with the nearest codes and with
            the learned ones.
    """

    layers: Mapping[str, Rounding]
    nearest_mse: float
    mse: float


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clip(1.2 sigmoid(v) - 0.1, 0, 1)``: Nagel et al., "Up or Down?", 2020, equation 23."""
    return (v.sigmoid() * _STRETCH + _OFFSET).clamp(0, 1)


def rounding_regulariser(h: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2h - 1|^beta)``, 0 where all are 0 or 1: "Up or Down?", equation 24."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed_beta(step: int, steps: int, warm_up: float, ends: tuple[float, float]) -> float | None:
    """The regulariser's exponent at a step: None before ``warm_up`` of the steps, then falling linearly."""
    first = warm_up * steps
    if step < first:
        return None
    return ends[0] + (ends[1] - ends[0]) * (step - first) / max(steps - first, 1)


def reconstruct(
    block_float: nn.Module,
    block_quantised: nn.Module,
    inputs_float: Tensor,
    inputs_quantised: Tensor,
    quantisers: Mapping[str, Quantiser],
    *,
    steps: int = 20_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    regularisation: float = 0.01,
    warm_up: float = 0.2,
    beta: tuple[float, float] = (20.0, 2.0),
    seed: int = 0,
) -> Reconstruction:
    """Learn the rounding of a block's weights, and put the rounded weights into ``block_quantised``, in place.

    Minimises ``|block_float(x) - block_quantised(x')|^2 + lambda sum(1 - |2h - 1|^beta)`` with Adam over ``V``, where a
    weight is ``s (clip(floor(W / s) + h(V) + z) - z)``; ``x`` are float inputs and ``x'`` those that the quantised
    layers before hand over. At the end ``h`` is 0 or 1. The squared error is summed over the output's channels (axis 1
    of ``(n, c, h, w)``, else the last) and averaged over everything else. Outputs must be one tensor.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, equations 21 to 25; Li
    et al., "BRECQ", 2021, for blocks of several layers. Defaults are BRECQ's. Scales are not learned. After too few
    steps weights are undecided, and rounding those may be worse than the nearest codes: compare ``mse`` with
    ``nearest_mse``.

    Args:
        block_float: gives the targets; unchanged.
        block_quantised: the same function with weights still in float; it may have ``ActivationQuantiser`` modules,
            frozen. Both run in evaluation mode, and are afterwards as they were.
        inputs_float, inputs_quantised: ``(n, ...)``, of both blocks, in the same order.
        quantisers: path of a linear or convolutional layer in ``block_quantised`` -> quantiser of its weight. Other
            layers stay as they are.
        steps: of Adam.
        batch: inputs a step.
        learning_rate: of ``V``.
        regularisation: lambda, after the warm-up.
        warm_up: share of the steps without regulariser.
        beta: at the end of the warm-up and at the last step.
        seed: of the batches.

    Raises:
        InputError: no path or one that is no such layer, inputs that do not match, or a setting out of range.
    """
    _check(inputs_float, inputs_quantised, steps, batch, warm_up)
    if not quantisers:
        raise InputError("reconstruct.quantisers", {}, "name no layer", "Give one for each layer to be rounded.")
    layers = {path: _layer(block_quantised, path) for path in quantisers}
    inputs_float, inputs_quantised = inputs_float.detach(), inputs_quantised.detach()
    soft = {path: _SoftWeight(layer.weight.detach(), quantisers[path]) for path, layer in layers.items()}
    modes = [(m, m.training) for block in (block_float, block_quantised) for m in block.modules()]
    block_float.eval()
    block_quantised.eval()
    # Only V is learned: no gradient is computed, or left behind, for what the block itself has.
    frozen = [p for p in block_quantised.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            targets = torch.cat([block_float(some) for some in torch.split(inputs_float, batch)])

        def mse(weights: dict[str, Tensor]) -> float:
            total = 0.0
            parts = zip(torch.split(inputs_quantised, batch), torch.split(targets, batch), strict=True)
            with torch.no_grad():
                for some, wanted in parts:
                    given: Tensor = functional_call(block_quantised, weights, (some,))
                    total += float((given - wanted).square().sum(dtype=torch.float64))
            return total / targets.numel()

        nearest = mse({_weight_of(path): quantisers[path].fake(layer.weight) for path, layer in layers.items()})
        optimizer = torch.optim.Adam([s.v for s in soft.values()], lr=learning_rate)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            chosen = torch.randperm(len(targets), generator=generator)[:batch].to(inputs_quantised.device)
            up = {path: rectified_sigmoid(s.v) for path, s in soft.items()}
            weights = {_weight_of(path): s.weight(up[path]) for path, s in soft.items()}
            outputs: Tensor = functional_call(block_quantised, weights, (inputs_quantised[chosen],))
            loss = (outputs - targets[chosen]).square().sum(1 if outputs.dim() == 4 else -1).mean()
            exponent = annealed_beta(step, steps, warm_up, beta)
            if exponent is not None:
                for h in up.values():
                    loss = loss + regularisation * rounding_regulariser(h, exponent)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = {path: s.rounding() for path, s in soft.items()}
        with torch.no_grad():
            for path, layer in layers.items():
                layer.weight.copy_(quantisers[path].dequantise(found[path].codes, found[path].parameters))
        return Reconstruction(layers=found, nearest_mse=nearest, mse=mse({}))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


class _SoftWeight:
    """A weight between its two neighbouring codes. ``v`` starts where it is the weight itself, as far as unclipped."""

    def __init__(self, weight: Tensor, quantiser: Quantiser) -> None:
        self.quantiser = quantiser
        self.parameters = quantiser.parameters(weight)
        self.shape, self.kind = weight.shape, weight.dtype
        self.scale, self.zero_point = (
            quantiser.spread(p, weight.shape).reshape(weight.shape)
            for p in (self.parameters.scale, self.parameters.zero_point)
        )
        exact = weight.to(self.scale.dtype) / self.scale
        self.floor = exact.floor()
        rest = exact - self.floor
        self.v = torch.logit((rest - _OFFSET) / _STRETCH).requires_grad_()

    def weight(self, up: Tensor) -> Tensor:
        """For ``up``, in [0, 1], of each code."""
        code = (self.floor + up + self.zero_point).clamp(self.quantiser.low, self.quantiser.high)
        return ((code - self.zero_point) * self.scale).to(self.kind)

    def rounding(self) -> Rounding:
        up = (rectified_sigmoid(self.v.detach()) >= 0.5).to(self.floor.dtype)
        code = (self.floor + up + self.zero_point).clamp(self.quantiser.low, self.quantiser.high)
        return Rounding(codes=code.to(torch.int16), parameters=self.parameters)


def _weight_of(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _layer(block: nn.Module, path: str) -> nn.Linear | nn.Conv2d:
    modules = dict(block.named_modules())
    module = modules.get(path)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        known = ", ".join(repr(p) for p, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d)))
        problem = "is no linear or convolutional layer of the block"
        raise InputError(f"reconstruct.quantisers.{path}", path, problem, f"Known: {known or 'none'}.")
    return module


def _check(inputs_float: Tensor, inputs_quantised: Tensor, steps: int, batch: int, warm_up: float) -> None:
    if len(inputs_float) != len(inputs_quantised) or not len(inputs_float):
        found = (len(inputs_float), len(inputs_quantised))
        problem = "are the numbers of float and quantised inputs"
        raise InputError("reconstruct.inputs", found, problem, "Give both for the same images.")
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise InputError(f"reconstruct.{name}", value, "is too few", "Give 1 or more.")
    if not 0 <= warm_up < 1:
        raise InputError("reconstruct.warm_up", warm_up, "is no share of the steps", "Give 0 to below 1.")
