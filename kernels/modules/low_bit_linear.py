"""``nn.Linear`` on low-bit operators, for inference: all that is stored are buffers, detached from their origin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.kernels.ops.int8_linear import int8_linear
from archfront.kernels.ops.quantise_rows import quantise_rows
from archfront.kernels.ops.weight_only_linear import weight_only_linear
from archfront.kernels.packing import LAYOUT_VERSION, check_version, code_range, pack, packed_shape
from archfront.kernels.reference import low_bit_linear as reference

_SHARES = tuple(1 - 0.05 * i for i in range(10))
"""Of a group's full range, that are tried."""


class _LowBitLinear(nn.Module):
    """Sizes, a correction and a layout that is checked when a state is loaded; a base for the layers below."""

    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    layout: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: list[int],
        rank: int,
        factors: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self._layout = [LAYOUT_VERSION, *kind]
        self.register_buffer("layout", torch.tensor(self._layout, dtype=torch.int32, device=device))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._hold("down", torch.zeros(rank, in_features, dtype=factors, device=device) if rank else None)
        self._hold("up", torch.zeros(out_features, rank, dtype=factors, device=device) if rank else None)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        # Not a buffer that is None: torch.export takes the next one's place for its.
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor)

    def _correct(self, error: Tensor) -> None:
        """Fill the factors from what quantisation took of the weight."""
        if self.down is not None and self.up is not None:
            down, up = low_rank_factors(error, self.rank)
            self.down, self.up = down.to(self.down.dtype), up.to(self.up.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "layout")
        if found is not None:
            version, *kind = found.tolist()
            check_version(version)
            if kind != self._layout[1:]:
                problem = f"is not served; {self._layout[1:]}, bits, group and zero point of this layer, is"
                raise ValueError(f"{prefix}layout: {kind} {problem}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Int8Linear(_LowBitLinear):
    """W8A8: int8 weights with a scale a channel; each row of the input is quantised over its own largest value.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bias: whether there is one; it and the scales stay float32 whatever the module is cast to.
        activation: ``none``, ``relu`` or ``gelu``, in the same kernel.
        rank: of a low-rank correction of the weight, float16; 0 for none.
        device: of the buffers.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str = "none",
        rank: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, [8, in_features, 0], rank, torch.float16, device)
        self.activation = activation
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, device=device))
        self._hold("bias", torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, activation: str = "none", rank: int = 0) -> Int8Linear:
        """The layer's weight in int8, each channel over its own largest value."""
        made = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            activation=activation,
            rank=rank,
            device=linear.weight.device,
        )
        weight = linear.weight.detach().float()
        made.weight, made.scale = reference.quantise_rows(weight)
        made._correct(weight - made.weight.float() * made.scale[:, None])
        if linear.bias is not None:
            made.bias = linear.bias.detach().float().clone()
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)`` of x's dtype.

        Raises:
            ValueError: what ``quantise_rows`` and ``int8_linear`` do not serve.
        """
        codes, scale = quantise_rows(x.reshape(-1, x.shape[-1]).contiguous())
        return self.on_codes(codes, scale, x.dtype).reshape(*x.shape[:-1], self.out_features)

    def on_codes(self, codes: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """From an input that is quantised already, by ``layer_norm_quantise`` or ``gelu_quantise``: ``(m, k)`` int8
        and ``(m,)`` to ``(m, n)``."""
        weight = (self.weight, self.scale, self.bias, self.down, self.up)
        return int8_linear(codes, scale, *weight, activation=self.activation, out_dtype=out_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # Rounded, scales would shift whole channels, and the operator takes float32.
        kept = {"scale": self.scale, "bias": self.bias}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            now = getattr(self, name)
            if buffer is not None and now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, activation={self.activation}, rank={self.rank}"


class WeightOnlyLinear(_LowBitLinear):
    """Packed weights of 8, 4, 3 or 2 bits, with a scale and perhaps a zero point for each group of a channel.

    Cast to the dtype of its input once (``module.half()``); a forward with another dtype casts at each call.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bits: 8, 4, 3 or 2.
        group: columns that share a scale, a multiple of 32; ``in_features`` or more for one scale a channel.
        zero_point: whether codes are unsigned with a zero point each group, or signed.
        bias: whether there is one.
        rank: of a low-rank correction of the weight; 0 for none.
        dtype: of scales, bias and correction.
        device: of the buffers.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        *,
        zero_point: bool = False,
        bias: bool = True,
        rank: int = 0,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        group = min(group, in_features)
        super().__init__(in_features, out_features, [bits, group, int(zero_point)], rank, dtype, device)
        self.bits, self.group = bits, group
        groups = (reference.group_count(in_features, self.group), out_features)
        shape = packed_shape(out_features, in_features, bits)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(groups, dtype=dtype, device=device))
        self._hold("zero", torch.zeros(groups, dtype=torch.uint8, device=device) if zero_point else None)
        self._hold("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: int, group: int, *, zero_point: bool = False, rank: int = 0
    ) -> WeightOnlyLinear:
        """The layer's weight, by ``quantise_groups``, in the layer's dtype."""
        weight = linear.weight.detach()
        codes, scale, zero = quantise_groups(weight, bits, group, zero_point=zero_point)
        return cls.from_codes(
            codes, scale, zero, linear.bias, bits=bits, group=group, weight=weight if rank else None, rank=rank
        ).train(linear.training)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        *,
        bits: int,
        group: int,
        weight: Tensor | None = None,
        rank: int = 0,
    ) -> WeightOnlyLinear:
        """A weight that was quantised elsewhere, as by GPTQ; ``value = (code - zero) * scale``.

        Args:
            codes: integers ``(n, k)``, unsigned beside zero points, else signed.
            scale: ``(n, groups)``; its dtype is the layer's.
            zero: whole numbers ``(n, groups)``, the code of 0.
            bias: ``(n,)``.
            bits, group: as of the constructor.
            weight: ``(n, k)`` in float, which a correction of ``rank`` above 0 brings the layer closer to.
            rank: of the correction.

        Raises:
            ValueError: codes or zero points out of range, scales of another shape, or a rank without a weight.
        """
        channels, columns = codes.shape
        made = cls(
            columns,
            channels,
            bits,
            group,
            zero_point=zero is not None,
            bias=bias is not None,
            rank=rank,
            dtype=scale.dtype,
            device=codes.device,
        )
        made._store(codes, scale, zero, bias)
        if rank:
            if weight is None:
                raise ValueError(f"weight: None is not served with rank {rank}; the weight before quantisation is")
            made._correct(weight.detach().float() - made.dequantised(torch.float32))
        return made

    def _store(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        expected = (self.out_features, self.scale.shape[0])
        low, high = code_range(self.bits, signed=False)
        if scale.shape != expected:
            raise ValueError(f"scale.shape: {tuple(scale.shape)} is not served; (n, groups) = {expected} is")
        if zero is not None:
            if zero.shape != expected:
                raise ValueError(f"zero.shape: {tuple(zero.shape)} is not served; (n, groups) = {expected} is")
            if not bool(((zero == zero.round()) & (zero >= low) & (zero <= high)).all()):
                raise ValueError(f"zero: {zero.min()} to {zero.max()} is not served; whole {low} to {high} are")
            self.zero = zero.detach().T.to(torch.uint8).contiguous()
        self.packed = pack(codes.detach(), self.bits, signed=zero is None)
        self.scale = scale.detach().T.contiguous()
        if bias is not None:
            self.bias = bias.detach().to(scale.dtype).clone()

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight ``(n, k)`` that the layer works with, correction included."""
        weight = (self.packed, self.scale, self.zero, self.down, self.up)
        bits, group, columns = self.bits, self.group, self.in_features
        return reference.dequantise_weight(*weight, bits=bits, group=group, columns=columns, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)`` of x's dtype.

        Raises:
            ValueError: what ``weight_only_linear`` does not serve.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        scale = self.scale.to(x.dtype)
        others = [None if t is None else t.to(x.dtype) for t in (self.bias, self.down, self.up)]
        y = weight_only_linear(rows, self.packed, scale, self.zero, *others, bits=self.bits, group=self.group)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
        return f"{sizes}, group={self.group}, zero_point={self.zero is not None}, rank={self.rank}"


def quantise_groups(weight: Tensor, bits: int, group: int, *, zero_point: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``(n, k)`` int16, scales ``(n, groups)`` of the weight's dtype, and zero points if asked for.

    Each group's range is the share of its full one, from 1 down to 0.55, that has the least squared error.

    Args:
        weight: ``(n, k)``, float.
        bits: of a code.
        group: neighbouring columns that share a scale; the last group of a channel may be shorter.
        zero_point: whether the range need not lie around 0.
    """
    (channels, columns), group = weight.shape, min(group, weight.shape[1])
    # Every range has an exact 0, so zeros that fill the last group change none.
    groups = functional.pad(weight.detach().float(), (0, -columns % group)).reshape(channels, -1, group)
    best = _rounded(groups, bits, zero_point, _SHARES[0], weight.dtype)
    for share in _SHARES[1:]:
        other = _rounded(groups, bits, zero_point, share, weight.dtype)
        better = _squared_error(groups, *other) < _squared_error(groups, *best)
        best = tuple(torch.where(better[:, :, None], new, old) for new, old in zip(other, best, strict=True))  # type: ignore[assignment]
    codes, scale, zero = best
    flat = codes.to(torch.int16).reshape(channels, -1)[:, :columns].contiguous()
    return flat, scale[:, :, 0].to(weight.dtype), zero[:, :, 0].to(torch.int16) if zero_point else None


def _rounded(
    groups: Tensor, bits: int, zero_point: bool, share: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``(n, groups, columns)`` in a share of its ranges, with scales and zero points ``(n, groups, 1)``."""
    steps = 2**bits - 1
    least = groups.amin(2, keepdim=True).clamp_max(0) * share
    most = groups.amax(2, keepdim=True).clamp_min(0) * share
    reach = most - least if zero_point else 2 * torch.maximum(most, -least)
    info = torch.finfo(dtype)
    # Less is stored as 0, or division by it overflows.
    smallest = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).tiny)
    scale = (reach / steps).clamp_min(smallest).to(dtype).float()
    zero = (-least / scale).round().clamp(0, steps) if zero_point else torch.zeros_like(scale)
    low, high = code_range(bits, signed=not zero_point)
    return ((groups / scale).round() + zero).clamp(low, high), scale, zero


def _squared_error(groups: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((codes - zero) * scale - groups).square().sum(2)


def low_rank_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation ``up @ down`` of this rank to a quantisation error ``(n, k)``: ``(r, k)`` and ``(n, r)``.

    With ``E = U S V^T`` they are ``sqrt(S_r) V_r^T`` and ``U_r sqrt(S_r)``; the squared norm of what remains is
    ``sum_{i > r} s_i^2``.

    Source: Yao et al., "ZeroQuant-V2", 2023 (LoRC).

    Raises:
        ValueError: a rank that the error cannot have.
    """
    if not 1 <= rank <= min(error.shape):
        raise ValueError(f"rank: {rank} is not served; 1 to {min(error.shape)} is, for {tuple(error.shape)}")
    left, values, right = torch.linalg.svd(error.detach(), full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()
