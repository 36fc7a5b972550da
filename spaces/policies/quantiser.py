"""Uniform quantisers of weights and activations, with 2 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.errors import InputError

Granularity = Literal["tensor", "channel", "group"]
Ranges = Literal["minmax", "mse"]
ActivationRanges = Literal["minmax", "percentile", "mse"]
ScaleType = Literal["float32", "float16"]

BITS = range(2, 9)
FLOAT = 32
"""Bits of what is left as it is."""

_LARGEST_GROUP = 2**20

_RATIOS = tuple(1 - 0.01 * i for i in range(61))
"""Shares of the full range, 1.00 to 0.40, that a search tries."""

_SMALLEST = {"float32": torch.finfo(torch.float32).tiny, "float16": 2.0**-24}
"""Scales do not go below: division by less overflows, or it is stored as 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantisationParameters:
    """What turns codes into values: ``value = (code - zero_point) * scale``.

    Attributes:
        scale: ``(1, 1)`` for a tensor, ``(channels, 1)`` for channels, ``(channels, groups)`` for groups; positive.
        zero_point: the code of 0, int16 of the same shape; all 0 for symmetric codes.
    """

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Quantiser:
    """Uniform quantisation of a weight whose first axis is the output channel.

    Symmetric codes use all of ``[-2^(b-1), 2^(b-1) - 1]`` with ``scale = 2 max|w| / (2^b - 1)``: no weight is off by
    more than half a step, and at 2 bits the step is 2/3 of what the three codes -1, 0, 1 would have. The price: the
    largest positive and the largest negative weight are both rounded downwards by half a step. Asymmetric codes are
    ``[0, 2^b - 1]`` from the least weight (or 0) to the largest (or 0). Both have an exact 0.

    Attributes:
        bits: 2 to 8.
        symmetric: whether 0 has code 0.
        granularity: what shares a scale: all weights, an output channel, or ``group`` weights of one.
        group: consecutive weights of a channel, flattened; the last group of a channel may be shorter.
        ranges: ``minmax`` covers all weights; ``mse`` shrinks each range, down to 0.4 of it, to where the squared error
            of what shares the scale is least.
        scale_type: that scales are rounded to, so that they can be stored in it without loss.

    Raises:
        InputError: a value that is none of these.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "channel"
    group: int = 64
    ranges: Ranges = "minmax"
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_one_of("granularity", self.granularity, get_args(Granularity))
        _check_one_of("ranges", self.ranges, get_args(Ranges))
        _check_one_of("scale_type", self.scale_type, get_args(ScaleType))
        if not 1 <= self.group <= _LARGEST_GROUP:
            remedy = f"Give 1 to {_LARGEST_GROUP}, or granularity channel."
            raise InputError("quantiser.group", self.group, "is no number of weights", remedy)

    @property
    def low(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + (1 << self.bits) - 1

    def parameters(self, weight: Tensor) -> QuantisationParameters:
        """Scales and zero points for a weight ``(channels, ...)``, in float64 if it is, else in float32.

        Raises:
            InputError: the weight is empty, has no axis or a value that is no number, or float16 cannot hold a scale.
        """
        rows = self._rows(_checked(weight))
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if self.ranges == "mse":
            low, high = _least_squares_range(rows, low, high, self.bits, self.symmetric, self.scale_type)
        scale, zero_point = _affine(low, high, self.bits, self.symmetric, self.scale_type)
        shape = (1, 1) if self.granularity == "tensor" else (len(weight), -1)
        return QuantisationParameters(scale=scale.reshape(shape), zero_point=zero_point.reshape(shape).to(torch.int16))

    def spread(self, parameter: Tensor, shape: torch.Size) -> Tensor:
        """A scale or zero point for every weight: ``(channels, weights of a channel)``.

        Args:
            parameter: of ``QuantisationParameters``.
            shape: of the weight.
        """
        columns = math.prod(shape[1:])
        if self.granularity == "group":
            parameter = parameter.repeat_interleave(self.group, dim=1)[:, :columns]
        return parameter.expand(shape[0], columns)

    def codes(self, weight: Tensor, parameters: QuantisationParameters) -> Tensor:
        """int16 of the weight's shape, each the nearest to its weight (half to even)."""
        scale, zero_point = (self.spread(p, weight.shape) for p in (parameters.scale, parameters.zero_point))
        flat = weight.detach().reshape(len(weight), -1).to(scale.dtype)
        return _codes(flat, scale, zero_point, self.low, self.high).to(torch.int16).reshape(weight.shape)

    def dequantise(self, codes: Tensor, parameters: QuantisationParameters) -> Tensor:
        """The values of codes ``(channels, ...)``, in the scale's type."""
        scale, zero_point = (self.spread(p, codes.shape) for p in (parameters.scale, parameters.zero_point))
        flat = codes.reshape(len(codes), -1)
        return ((flat - zero_point).to(scale.dtype) * scale).reshape(codes.shape)

    def fake(self, weight: Tensor) -> Tensor:
        """The quantised weight, in its own type; without a gradient."""
        parameters = self.parameters(weight)
        return self.dequantise(self.codes(weight, parameters), parameters).to(weight.dtype)

    def straight_through(self, weight: Tensor) -> Tensor:
        """``fake`` whose gradient with respect to the weight is 1, and 0 where the weight was clipped.

        Source: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
        """
        parameters = self.parameters(weight)
        scale, zero_point = (self.spread(p, weight.shape) for p in (parameters.scale, parameters.zero_point))
        flat = weight.detach().reshape(len(weight), -1).to(scale.dtype)
        inside = _inside(flat, scale, zero_point, self.low, self.high).reshape(weight.shape)
        quantised = self.dequantise(self.codes(weight, parameters), parameters).to(weight.dtype)
        return _pass_through(weight, quantised, inside)

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight with a row for each scale, ended with zeros, which every range contains and no code misses."""
        if self.granularity == "tensor":
            return weight.reshape(1, -1)
        flat = weight.reshape(len(weight), -1)
        if self.granularity == "channel":
            return flat
        return functional.pad(flat, (0, -flat.shape[1] % self.group)).reshape(-1, self.group)


class ActivationQuantiser(nn.Module):
    """Observes activations over calibration batches; after ``freeze`` it quantises them with a fixed scale.

    ``forward`` returns its input while it observes, and afterwards the quantised values, whose gradient is 1, and 0
    where a value was clipped. Scale and zero point are buffers, empty until ``freeze``, and load from a frozen state.

    Args:
        bits: 2 to 8.
        symmetric: as in ``Quantiser``.
        ranges: ``minmax`` of all values; ``percentile`` of kept ones at both ends; ``mse`` of kept ones, in ranges
            shrunken down to 0.4 of all values'.
        percentile: above 50, at most 100; the lower end is its complement.
        channel_axis: with a scale for each of its indices; None for one scale.
        samples: values kept a scale, drawn uniformly and without replacement from all that were observed. The same
            batches keep the same ones.

    Raises:
        InputError: a value that is none of these.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool = False,
        ranges: ActivationRanges = "minmax",
        percentile: float = 99.9,
        channel_axis: int | None = None,
        samples: int = 16_384,
    ) -> None:
        super().__init__()
        _check_bits(bits)
        _check_one_of("ranges", ranges, get_args(ActivationRanges))
        if not 50 < percentile <= 100:
            raise InputError("quantiser.percentile", percentile, "is no upper percentile", "Give above 50, up to 100.")
        if samples < 1:
            raise InputError("quantiser.samples", samples, "is no number of values", "Give 1 or more.")
        self.bits, self.symmetric, self.ranges, self.percentile = bits, symmetric, ranges, percentile
        self.channel_axis, self.samples = channel_axis, samples
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int16))
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        self._batches = 0

    @property
    def frozen(self) -> bool:
        return self.scale.numel() > 0

    def observe(self, values: Tensor) -> None:
        """Take one batch into account.

        Raises:
            InputError: it is empty, has a value that is no number, or other channels than the batches before.
        """
        rows = _checked(values).reshape(1, -1) if self.channel_axis is None else _by_channel(values, self.channel_axis)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if self._bounds is not None:
            if len(low) != len(self._bounds[0]):
                problem = f"follows batches of {len(self._bounds[0])} channels"
                raise InputError("activations", tuple(values.shape), problem, "Check channel_axis.")
            low, high = torch.minimum(low, self._bounds[0]), torch.maximum(high, self._bounds[1])
        self._bounds = low, high
        if self.ranges != "minmax":
            # The values with the least of one random key each are a uniform sample, whatever the batches' sizes.
            keys = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(self._batches)).to(rows.device)
            if self._kept is not None:
                rows, keys = torch.cat([self._kept[0], rows], 1), torch.cat([self._kept[1], keys])
            keys, chosen = keys.topk(min(self.samples, len(keys)), largest=False)
            self._kept = rows[:, chosen], keys
        self._batches += 1

    def freeze(self) -> None:
        """Fix scale and zero point by what was observed, and forget it.

        Raises:
            InputError: nothing was observed.
        """
        if self._bounds is None:
            raise InputError("activations", 0, "batches were observed", "Run calibration batches first.")
        low, high = self._bounds
        if self._kept is not None:
            kept = self._kept[0]
            if self.ranges == "percentile":
                ordered, last = kept.sort(1).values, kept.shape[1] - 1
                # Outwards to the next value that occurred.
                above = math.ceil(last * self.percentile / 100 - 1e-9)
                low, high = ordered[:, last - above].clamp(max=0), ordered[:, above].clamp(min=0)
            else:
                low, high = _least_squares_range(kept, low, high, self.bits, self.symmetric, "float32")
        scale, zero_point = _affine(low, high, self.bits, self.symmetric, "float32")
        self.scale, self.zero_point = scale.float(), zero_point.to(torch.int16)
        self._bounds = self._kept = None

    def forward(self, values: Tensor) -> Tensor:
        if not self.frozen:
            self.observe(values)
            return values
        shape = [1] * values.dim()
        if self.channel_axis is not None:
            shape[self.channel_axis] = -1
        scale, zero_point = (p.reshape(shape) for p in (self.scale.float(), self.zero_point))
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        high = low + 2**self.bits - 1
        single = values.detach().float()
        codes = _codes(single, scale, zero_point, low, high)
        inside = _inside(single, scale, zero_point, low, high)
        return _pass_through(values, ((codes - zero_point) * scale).to(values.dtype), inside)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("scale", "zero_point"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _codes(values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    return (torch.round(values / scale) + zero_point).clamp(low, high)


def _inside(values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    unclipped = torch.round(values / scale) + zero_point
    return (unclipped >= low) & (unclipped <= high)


def _pass_through(values: Tensor, quantised: Tensor, inside: Tensor) -> Tensor:
    """``quantised`` to the bit, with the gradient of ``values`` where they are inside."""
    passed = torch.where(inside, values, 0)
    return quantised + (passed - passed.detach())


def _affine(low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_type: ScaleType) -> tuple[Tensor, Tensor]:
    """Scales and integer zero points, as floats, of ranges with ``low <= 0 <= high``.

    Raises:
        InputError: float16 cannot hold a scale.
    """
    steps = 2**bits - 1
    # Each end is divided before they are added: the width of a range may overflow.
    scale = torch.maximum(-low, high) * (2 / steps) if symmetric else high / steps - low / steps
    if scale_type == "float16":
        scale = scale.half().to(scale.dtype)
        if torch.isinf(scale).any():
            raise InputError("quantiser.scale_type", scale_type, "cannot hold a scale above 65504", "Use float32.")
    # A range of zeros alone has any scale.
    scale = torch.where((low < 0) | (high > 0), scale.clamp(min=_SMALLEST[scale_type]), 1)
    zero_point = torch.zeros_like(scale) if symmetric else torch.round(-low / scale).clamp(0, steps)
    return scale, zero_point


def _least_squares_range(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_type: ScaleType
) -> tuple[Tensor, Tensor]:
    """The ends of each row's range, shrunken by the ratio with the least squared error; the largest such ratio."""
    least = torch.full_like(low, torch.inf, dtype=torch.float64)
    best = torch.ones_like(low)
    first = -(2 ** (bits - 1)) if symmetric else 0
    for ratio in _RATIOS:
        scale, zero_point = (p[:, None] for p in _affine(low * ratio, high * ratio, bits, symmetric, scale_type))
        codes = _codes(rows, scale, zero_point, first, first + 2**bits - 1)
        error = ((codes - zero_point) * scale - rows).square().sum(1, dtype=torch.float64)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, ratio, best)
    return low * best, high * best


def _by_channel(values: Tensor, axis: int) -> Tensor:
    if not -values.dim() <= axis < values.dim():
        raise InputError("quantiser.channel_axis", axis, f"is no axis of {tuple(values.shape)}", "Give one.")
    return _checked(values).movedim(axis, 0).reshape(values.shape[axis], -1)


def _checked(values: Tensor) -> Tensor:
    """Detached, in float64 if it is, else in float32."""
    if values.dim() == 0 or values.numel() == 0:
        raise InputError("quantiser.values", tuple(values.shape), "is the shape of no values", "Give a full tensor.")
    if not torch.isfinite(values).all():
        raise InputError("quantiser.values", tuple(values.shape), "has infinite values or NaN", "Give finite ones.")
    return values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or bits not in BITS:
        raise InputError("quantiser.bits", bits, "cannot be quantised to", f"Give {BITS[0]} to {BITS[-1]}.")


def _check_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"quantiser.{field}", value, "is unknown", f"Give one of: {', '.join(allowed)}.")
