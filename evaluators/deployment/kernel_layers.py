"""Linear layers on low-bit kernels: which a policy allows, which are faster where they run, and the network with them.

A layer's candidates carry the codes and scales of the policy itself. Whatever is not served, or not faster beyond the
uncertainty of measuring, stays the dense layer that it was, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from archfront.evaluators.latency.measurement import Settings, Timing, measure
from archfront.kernels.modules.low_bit_linear import Int8Linear, WeightOnlyLinear
from archfront.spaces.policies.quantised import QuantisedWeight, input_bits, quantised_layers

INT8, WEIGHT_ONLY, DENSE = "int8", "weight-only", "dense"
AGREEMENT = 0.03
"""Of a kernel with its dense layer on random inputs, by the norm of what they differ by. Eight bits of a row cost 0.01;
beyond this a kernel computes something else."""

_INT8 = 8
_CONTAINERS = (2, 3, 4, 8)
_SPAN = 32
_SETTINGS = Settings(rounds=20)

Time = Callable[[Sequence[Callable[[], object]]], Sequence[Timing]]
"""Times calls against each other, one timing each."""

Ready = Callable[[nn.Module, Tensor], Callable[[], object]]
"""A call of a layer on an input, that has finished its work when it returns."""


class NotServedError(ValueError):
    """No kernel of this kind can carry a layer; says why."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What a policy makes of one layer, as codes: ``value = (code - zero) * scale``.

    Attributes:
        bits: of its weights.
        input_bits: of what it reads; 32 for float.
        group: inputs that share a scale; 0 for one scale a channel.
        codes: ``(n, k)`` int16.
        scale: ``(n, groups)`` float32.
        zero: ``(n, groups)`` int16; None where it is 0 everywhere.
        refused: why no kernel carries it; there are no codes then.
    """

    bits: int
    input_bits: int
    group: int = 0
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    refused: str | None = None


class Candidate(NamedTuple):
    """A module that could stand in a dense layer's place.

    Attributes:
        kernel: its name in a ``LayerChoice``.
        exact: whether its weights are the policy's own values; else scales were rounded to the network's dtype.
    """

    kernel: str
    module: nn.Module
    exact: bool


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What one layer runs on, and why.

    Attributes:
        path: of the layer.
        kernel: ``int8``, ``weight-only-<bits>`` or ``dense``.
        kernel_ms: median of the chosen kernel, or of the fastest that was not chosen; None where none was timed.
        dense_ms: median of the dense layer; None where it was not timed.
        reason: in words.
        exact: see ``Candidate``; None for a dense layer.
    """

    path: str
    kernel: str
    kernel_ms: float | None
    dense_ms: float | None
    reason: str
    exact: bool | None = None


def layer_plans(student: nn.Module) -> dict[str, LayerPlan]:
    """Of every layer with quantised weights: path -> plan. The float weights must still stand behind them."""
    return {path: _plan(layer, holder) for path, layer, holder in quantised_layers(student)}


@torch.no_grad()
def _plan(layer: nn.Module, holder: QuantisedWeight) -> LayerPlan:
    quantiser = holder.quantiser
    refused = partial(LayerPlan, bits=quantiser.bits, input_bits=input_bits(layer))
    kind = parametrize.type_before_parametrizations(layer)
    if kind is not nn.Linear:
        return refused(refused=f"no kernel serves {kind.__name__}")
    if holder.correction is not None:
        return refused(refused="its weight has a low-rank correction, which is not carried")
    [*before, _] = layer.parametrizations.weight  # type: ignore[union-attr, misc]
    value: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
    for step in before:  # a mask, say
        value = step(value)
    parameters = quantiser.parameters(value)
    # The codes that a recovery chose lie on the quantiser's own grid.
    codes = quantiser.codes(value if holder.fixed is None else holder.fixed, parameters)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not torch.equal(quantiser.dequantise(codes, parameters).to(weight.dtype), weight):
        return refused(refused="its weights do not lie on the quantiser's grid")
    scale, zero = (p.expand(len(codes), -1).contiguous() for p in (parameters.scale, parameters.zero_point))
    return LayerPlan(
        bits=quantiser.bits,
        input_bits=input_bits(layer),
        group=0 if scale.shape[1] == 1 else quantiser.group,
        codes=codes,
        scale=scale.float(),
        zero=zero if bool(zero.any()) else None,
    )


def candidates(layer: nn.Linear, plan: LayerPlan) -> tuple[list[Candidate], list[str]]:
    """What the policy allows in a dense layer's place, on its device and in its dtype; and why not the others.

    Args:
        layer: in eval mode, with the policy's weights.
    """
    found: list[Candidate] = []
    reasons: list[str] = [] if plan.refused is None else [plan.refused]
    for make in (_int8, _weight_only) if plan.refused is None else ():
        try:
            found.append(make(layer, plan))
        except ValueError as error:
            reasons.append(str(error))
    return found, reasons


def _int8(layer: nn.Linear, plan: LayerPlan) -> Candidate:
    """W8A8: the weight's own codes and scales; inputs in each row's own range, which is finer than the policy's."""
    codes, scale = _codes(plan)
    if plan.input_bits > _INT8:
        raise NotServedError(f"{INT8}: the policy reads {plan.input_bits} bits")
    if plan.group:
        raise NotServedError(f"{INT8}: groups of {plan.group} inputs have a scale each, where it takes one a channel")
    if plan.zero is not None:
        codes = codes - plan.zero
    low, high = int(codes.min()), int(codes.max())
    if low < -128 or high > 127:
        raise NotServedError(f"{INT8}: codes less their zero points reach from {low} to {high}")
    made = Int8Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.weight.device
    ).eval()
    made.weight = codes.to(layer.weight.device, torch.int8)
    made.scale = scale[:, 0].to(layer.weight.device, copy=True)
    if layer.bias is not None:
        made.bias = layer.bias.detach().float().clone()
    return Candidate(INT8, made, exact=True)


def _weight_only(layer: nn.Linear, plan: LayerPlan) -> Candidate:
    """Packed codes in the narrowest container, scales in the layer's dtype."""
    codes, scale = _codes(plan)
    device, dtype = layer.weight.device, layer.weight.dtype
    bits = next(width for width in _CONTAINERS if width >= plan.bits)
    if plan.group % _SPAN:
        raise NotServedError(f"{WEIGHT_ONLY}: groups of {plan.group} inputs are no multiple of {_SPAN}")
    stored = scale.to(dtype, copy=True)
    if not bool((torch.isfinite(stored) & (stored > 0)).all()):
        raise NotServedError(f"{WEIGHT_ONLY}: {dtype} cannot hold a scale")
    made = WeightOnlyLinear.from_codes(
        codes.to(device),
        stored.to(device),
        None if plan.zero is None else plan.zero.to(device),
        layer.bias,
        bits=bits,
        group=plan.group or layer.in_features,
    ).eval()
    return Candidate(f"{WEIGHT_ONLY}-{bits}", made, exact=torch.equal(stored.float(), scale))


def _codes(plan: LayerPlan) -> tuple[Tensor, Tensor]:
    assert plan.codes is not None
    assert plan.scale is not None
    return plan.codes, plan.scale


def _measured(calls: Sequence[Callable[[], object]]) -> Sequence[Timing]:
    timings, _ = measure(calls, _SETTINGS)
    return timings


def _ready(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return partial(layer, x)


@torch.no_grad()
def choose(
    model: nn.Module, plans: Mapping[str, LayerPlan], example: Tensor, *, time: Time = _measured, ready: Ready = _ready
) -> list[LayerChoice]:
    """For each layer that could have a kernel, whether it gets one: only one that computes the same, and whose time's
    upper bound lies below the lower bound of the dense layer's.

    Args:
        model: the dense network with the policy's weights, where and in the dtype in which it will run.
        plans: of ``layer_plans``.
        example: input, of the batch size that counts.
        time: by default ``measure``, here.
        ready: makes the calls that are timed; by default for a processor.
    """
    shapes = _shapes(model, example)
    known: dict[Any, Sequence[Timing]] = {}
    found = []
    for path, layer in model.named_modules():
        if path in plans or isinstance(layer, (nn.Linear, _ConvNd)):
            found.append(_choice(path, layer, plans.get(path), shapes.get(path, []), known, time, ready))
    return found


def _choice(
    path: str,
    layer: nn.Module,
    plan: LayerPlan | None,
    shapes: list[torch.Size],
    known: dict[Any, Sequence[Timing]],
    time: Time,
    ready: Ready,
) -> LayerChoice:
    dense = partial(LayerChoice, path=path, kernel=DENSE, kernel_ms=None, dense_ms=None)
    if plan is None:
        return dense(reason="the policy leaves its weights in float")
    if type(layer) is not nn.Linear:
        return dense(reason=plan.refused or f"no kernel serves {type(layer).__name__}")
    if not shapes:
        return dense(reason="a forward pass does not call it")
    made, refused = candidates(layer, plan)
    inputs = [_drawn(shape, layer.weight) for shape in shapes]
    agreeing = []
    for candidate in made:
        problem = _disagreement(candidate.module, layer, inputs)
        if problem is None:
            agreeing.append(candidate)
        else:
            refused.append(f"{candidate.kernel}: {problem}")
    if not agreeing:
        return dense(reason="; ".join(refused))
    # Layers of one kind take the same time, whatever their weights are.
    kind = (*(c.kernel for c in agreeing), *layer.weight.shape, layer.bias is None, plan.group, plan.zero is None)
    key = (*kind, *map(tuple, shapes))
    if key not in known:
        known[key] = time(
            [partial(_all, [ready(m, x) for x in inputs]) for m in (layer, *(c.module for c in agreeing))]
        )
    return _decided(path, agreeing, known[key], refused)


def _decided(path: str, made: Sequence[Candidate], timings: Sequence[Timing], refused: Sequence[str]) -> LayerChoice:
    """The fastest of what is faster than the dense layer, whose timing is the first."""
    dense, *others = timings
    ran = [(timing, candidate) for timing, candidate in zip(others, made, strict=True) if timing.error is None]
    refused = [*refused, *(f"{c.kernel}: {t.error}" for t, c in zip(others, made, strict=True) if t.error is not None)]
    faster = [(t, c) for t, c in ran if dense.error is None and t.high_ms < dense.low_ms]
    timing, candidate = min(faster or ran, key=lambda pair: pair[0].median_ms, default=(None, None))
    dense_ms = _figure(dense.median_ms)
    if timing is None or candidate is None:
        return LayerChoice(path=path, kernel=DENSE, kernel_ms=None, dense_ms=dense_ms, reason="; ".join(refused))
    verdict = "faster" if faster else "not faster"
    words = [f"{candidate.kernel} is {verdict}: up to {timing.high_ms:.5f} ms, dense from {dense.low_ms:.5f} ms"]
    if faster and not candidate.exact:
        words.append("its scales are rounded to the network's dtype")
    return LayerChoice(
        path=path,
        kernel=candidate.kernel if faster else DENSE,
        kernel_ms=_figure(timing.median_ms),
        dense_ms=dense_ms,
        reason="; ".join([*words, *refused]),
        exact=candidate.exact if faster else None,
    )


def with_kernels(model: nn.Module, plans: Mapping[str, LayerPlan], choices: Sequence[LayerChoice]) -> nn.Module:
    """The network with the chosen kernels, in place.

    Args:
        model: the one that was chosen for.
        plans: of ``layer_plans``.

    Raises:
        ValueError: a choice that the policy does not allow.
    """
    for choice in choices:
        if choice.kernel == DENSE:
            continue
        layer = model.get_submodule(choice.path)
        made = candidates(layer, plans[choice.path])[0] if type(layer) is nn.Linear else []
        found = next((candidate.module for candidate in made if candidate.kernel == choice.kernel), None)
        if found is None:
            raise ValueError(f"{choice.path}: {choice.kernel} is not what its policy allows")
        # One layer may stand at several places.
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if module is layer:
                model.set_submodule(path, found)
    return model


def _shapes(model: nn.Module, example: Tensor) -> dict[str, list[torch.Size]]:
    """Of what each linear layer reads in one forward pass, call by call."""
    found: dict[str, list[torch.Size]] = {}

    def note(path: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault(path, []).append(inputs[0].shape)

    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers]
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _drawn(shape: torch.Size, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _disagreement(kernel: nn.Module, dense: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    """What speaks against a kernel's results; None if nothing does."""
    try:
        for x in inputs:
            wanted = dense(x).float()
            error = float((kernel(x).float() - wanted).norm() / wanted.norm().clamp(min=1e-12))
            # NaN is no agreement either.
            if not error <= AGREEMENT:
                return f"its results are off by {error:.2g} of the dense layer's"
    except Exception as error:  # of one kernel, which a device or its compiler does not serve
        return f"{type(error).__name__}: {error}"
    return None


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _figure(ms: float) -> float | None:
    return ms if math.isfinite(ms) else None
