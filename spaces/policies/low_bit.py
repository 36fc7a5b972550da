"""Linear and convolutional layers that hold their weight in 2 to 8 bits, and dequantise it when they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.policies.packing import LAYOUT_VERSION, pack, packed_bytes, unpack
from archfront.spaces.policies.quantiser import Granularity, QuantisationParameters, Quantiser

Correction = tuple[Tensor, Tensor]
"""Factors ``(channels, rank)`` and ``(rank, weights of a channel)``, whose product is added to the weight."""

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_GRANULARITIES = get_args(Granularity)


class PackedTensor(nn.Module):
    """A tensor ``(channels, ...)`` as packed codes, scales and, if asymmetric, zero points: all of them buffers.

    ``layout`` says how they are to be read: the version of the packing, bits, symmetry, granularity and group.

    Args:
        shape: of the tensor.
        quantiser: of it. Ranges play no part here.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    layout: Tensor

    def __init__(self, shape: Sequence[int], quantiser: Quantiser) -> None:
        super().__init__()
        self.shape, self.quantiser = torch.Size(shape), quantiser
        self._columns = math.prod(self.shape[1:])
        counts = {
            "tensor": (1, 1),
            "channel": (self.shape[0], 1),
            "group": (self.shape[0], -(-self._columns // quantiser.group)),
        }[quantiser.granularity]
        size = packed_bytes(self._columns, quantiser.bits)
        self.register_buffer("packed", torch.zeros(self.shape[0], size, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(counts, dtype=getattr(torch, quantiser.scale_type)))
        zero_point = None if quantiser.symmetric else torch.zeros(counts, dtype=torch.uint8)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("layout", torch.tensor(self._layout(), dtype=torch.int32))

    def _layout(self) -> list[int]:
        q = self.quantiser
        group = q.group if q.granularity == "group" else 0
        return [LAYOUT_VERSION, q.bits, int(q.symmetric), _GRANULARITIES.index(q.granularity), group]

    def store(self, codes: Tensor, parameters: QuantisationParameters) -> None:
        """Hold these codes ``shape`` with these parameters.

        Raises:
            InputError: codes, scales or zero points that the quantiser does not make.
        """
        scale = parameters.scale.to(self.scale.dtype)
        if codes.shape != self.shape or scale.shape != self.scale.shape:
            problem = f"are the shapes of codes and scales, where {tuple(self.shape)} and {tuple(self.scale.shape)} go"
            raise InputError("low_bit.codes", (tuple(codes.shape), tuple(scale.shape)), problem, "Check the quantiser.")
        if not torch.equal(scale.to(parameters.scale.dtype), parameters.scale):
            problem = "loses digits of the scales"
            raise InputError("quantiser.scale_type", self.quantiser.scale_type, problem, "Quantise with that type.")
        self.packed = pack(codes.reshape(len(codes), -1), self.quantiser.bits, self.quantiser.low)
        self.scale = scale.clone()
        if self.zero_point is not None:
            self.zero_point = parameters.zero_point.to(torch.uint8)

    def codes(self) -> Tensor:
        """int16, of ``shape``."""
        q = self.quantiser
        return unpack(self.packed, q.bits, self._columns, q.low).reshape(self.shape)

    def quantisation_parameters(self) -> QuantisationParameters:
        """With scales in float32 and zero points in int16, as ``Quantiser.parameters`` gives them."""
        scale = self.scale.float()
        zeros = torch.zeros_like(scale, dtype=torch.int16)
        return QuantisationParameters(
            scale=scale, zero_point=zeros if self.zero_point is None else self.zero_point.to(torch.int16)
        )

    def forward(self) -> Tensor:
        """The dequantised tensor, float32."""
        return self.quantiser.dequantise(self.codes(), self.quantisation_parameters())

    def size_bytes(self) -> int:
        """Of codes, scales and zero points, as they lie in memory; ``layout`` is not counted."""
        stored = (self.packed, self.scale, self.zero_point)
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "layout")
        if found is not None and found.tolist() != self._layout():
            problem = f"is the stored layout, where this layer has {self._layout()}"
            remedy = "Build the layer with the quantiser that was stored."
            raise InputError(f"low_bit.{prefix}layout", found.tolist(), problem, remedy)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _LowBitLayer(nn.Module):
    """A packed weight, a bias and perhaps a low-rank correction; a base for the layers below.

    Args:
        shape: of the weight.
        quantiser: of the weight.
        bias: whether there is one; it stays in float32.
        rank: of the correction; 0 for none.
        factor_quantiser: of the correction's factors, one scale for each of their ``rank`` components; None keeps them
            in float16.

    Raises:
        InputError: the rank is negative or too large, or the factors' quantiser has groups or one scale.
    """

    bias: Tensor | None
    left: Tensor
    right: Tensor
    left_codes: PackedTensor | None
    right_codes: PackedTensor | None

    def __init__(
        self, shape: Sequence[int], quantiser: Quantiser, bias: bool, rank: int, factor_quantiser: Quantiser | None
    ) -> None:
        super().__init__()
        columns = math.prod(shape[1:])
        if not 0 <= rank <= min(shape[0], columns):
            raise InputError("low_bit.rank", rank, f"is no rank of a weight {tuple(shape)}", "Give a smaller one.")
        if factor_quantiser is not None and factor_quantiser.granularity != "channel":
            remedy = "Give granularity 'channel'."
            raise InputError("low_bit.factor_quantiser", factor_quantiser, "has no scale per component", remedy)
        self.rank = rank
        self.weight_codes = PackedTensor(shape, quantiser)
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.left_codes = self.right_codes = None
        if rank and factor_quantiser is not None:
            # Components are the channels of both factors: each has a scale of its own.
            self.left_codes = PackedTensor((rank, shape[0]), factor_quantiser)
            self.right_codes = PackedTensor((rank, columns), factor_quantiser)
        elif rank:
            self.register_buffer("left", torch.zeros(shape[0], rank, dtype=torch.float16))
            self.register_buffer("right", torch.zeros(rank, columns, dtype=torch.float16))
        self._channels_last = False

    def fill(
        self,
        module: nn.Linear | nn.Conv2d,
        codes: Tensor | None,
        parameters: QuantisationParameters | None,
        correction: Correction | None,
    ) -> None:
        """Take over weight, bias and hooks of a float layer.

        Args:
            module: the float layer.
            codes, parameters: of its weight, from GPTQ or AdaRound; None for the quantiser's nearest codes.
            correction: of rank ``rank``.
        """
        weight = module.weight.detach().float()
        quantiser = self.weight_codes.quantiser
        if parameters is None:
            parameters = quantiser.parameters(weight)
        self.weight_codes.store(quantiser.codes(weight, parameters) if codes is None else codes, parameters)
        if module.bias is not None:
            self.bias = module.bias.detach().float().clone()
        if correction is not None:
            self._correct(*correction)
        self._channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        # Such as the subsampling before a strided 1x1 convolution, without which this would be another function.
        self._forward_pre_hooks.update(module._forward_pre_hooks)
        self.train(module.training)

    def _correct(self, left: Tensor, right: Tensor) -> None:
        if self.left_codes is None or self.right_codes is None:
            self.left, self.right = left.detach().half(), right.detach().half()
            return
        for packed, factor in ((self.left_codes, left.T), (self.right_codes, right)):
            factor = factor.detach().float()
            parameters = packed.quantiser.parameters(factor)
            packed.store(packed.quantiser.codes(factor, parameters), parameters)

    def dequantised(self) -> Tensor:
        """The weight that the layer works with, correction included, float32."""
        weight: Tensor = self.weight_codes()
        if self.rank:
            if self.left_codes is not None and self.right_codes is not None:
                left, right = self.left_codes().T, self.right_codes()
            else:
                left, right = self.left.float(), self.right.float()
            weight = weight + (left @ right).reshape(weight.shape)
        return weight.contiguous(memory_format=torch.channels_last) if self._channels_last else weight

    def size_bytes(self) -> int:
        """Of weight, correction and bias, as they lie in memory."""
        packed = (self.weight_codes, self.left_codes, self.right_codes)
        total = sum(part.size_bytes() for part in packed if part is not None)
        floats = [self.bias] if self.rank == 0 or self.left_codes is not None else [self.bias, self.left, self.right]
        return total + sum(t.numel() * t.element_size() for t in floats if t is not None)

    def _operands(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = self.bias
        return self.dequantised().to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)


class LowBitLinear(_LowBitLayer):
    """``nn.Linear`` with a low-bit weight. Args: see ``from_float`` and ``_LowBitLayer``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantiser: Quantiser,
        *,
        bias: bool = True,
        rank: int = 0,
        factor_quantiser: Quantiser | None = None,
    ) -> None:
        super().__init__((out_features, in_features), quantiser, bias, rank, factor_quantiser)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        quantiser: Quantiser,
        *,
        codes: Tensor | None = None,
        parameters: QuantisationParameters | None = None,
        correction: Correction | None = None,
        factor_quantiser: Quantiser | None = None,
    ) -> LowBitLinear:
        """A float layer quantised. Its output is that of the layer with the weight ``dequantised()``, to the bit.

        Args:
            codes, parameters: of the weight if not the quantiser's nearest; codes need their parameters.
            correction: two factors that are added.
            factor_quantiser: of them; float16 without.

        Raises:
            InputError: codes without parameters, or not of this weight and quantiser.
        """
        rank = _checked_rank(module.weight, codes, parameters, correction)
        layer = cls(
            module.in_features,
            module.out_features,
            quantiser,
            bias=module.bias is not None,
            rank=rank,
            factor_quantiser=factor_quantiser,
        ).to(module.weight.device)
        layer.fill(module, codes, parameters, correction)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, *self._operands(inputs))


class LowBitConv2d(_LowBitLayer):
    """``nn.Conv2d`` with a low-bit weight. Args: those of ``nn.Conv2d``, ``from_float`` and ``_LowBitLayer``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        quantiser: Quantiser,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: str | tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        rank: int = 0,
        factor_quantiser: Quantiser | None = None,
    ) -> None:
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, quantiser, bias, rank, factor_quantiser)
        # A float layer without memory: it knows how to pad and to convolve.
        self._float = (
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=False,
                padding_mode=padding_mode,
                device="meta",
            ),
        )

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
        quantiser: Quantiser,
        *,
        codes: Tensor | None = None,
        parameters: QuantisationParameters | None = None,
        correction: Correction | None = None,
        factor_quantiser: Quantiser | None = None,
    ) -> LowBitConv2d:
        """As ``LowBitLinear.from_float``."""
        rank = _checked_rank(module.weight, codes, parameters, correction)
        pair = tuple[int, int]
        layer = cls(
            module.in_channels,
            module.out_channels,
            cast(pair, module.kernel_size),
            quantiser,
            stride=cast(pair, module.stride),
            padding=module.padding if isinstance(module.padding, str) else cast(pair, module.padding),
            dilation=cast(pair, module.dilation),
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            rank=rank,
            factor_quantiser=factor_quantiser,
        ).to(module.weight.device)
        layer.fill(module, codes, parameters, correction)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self._float[0]._conv_forward(inputs, *self._operands(inputs))
        return outputs


def _checked_rank(
    weight: Tensor, codes: Tensor | None, parameters: QuantisationParameters | None, correction: Correction | None
) -> int:
    """Of the correction, 0 for none."""
    if codes is not None and parameters is None:
        raise InputError("low_bit.parameters", None, "are missing beside codes", "Give the codes' parameters.")
    if correction is None:
        return 0
    left, right = correction
    columns = weight[0].numel()
    if left.dim() != 2 or left.shape[0] != len(weight) or right.shape != (left.shape[1], columns):
        problem = f"are the shapes of no factors of {len(weight)} x {columns}"
        raise InputError("low_bit.correction", (tuple(left.shape), tuple(right.shape)), problem, "Give left and right.")
    return left.shape[1]
