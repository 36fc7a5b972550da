"""One call of a torch operator as plain data: enough to price it, to recognise it again, and to run it alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

KINDS: dict[str, str] = {
    "convolution": "conv", "_convolution": "conv", "mkldnn_convolution": "conv",
    "addmm": "linear", "mm": "linear", "linear": "linear", "_int_mm": "linear",
    "bmm": "matmul", "baddbmm": "matmul", "matmul": "matmul",
    "native_batch_norm": "norm", "_native_batch_norm_legit_no_training": "norm", "batch_norm": "norm",
    "native_layer_norm": "norm", "native_group_norm": "norm", "rms_norm": "norm", "_fused_rms_norm": "norm",
    "relu": "activation", "relu_": "activation", "gelu": "activation", "silu": "activation", "silu_": "activation",
    "hardswish": "activation", "hardswish_": "activation", "sigmoid": "activation", "sigmoid_": "activation",
    "hardsigmoid": "activation", "hardsigmoid_": "activation", "tanh": "activation", "leaky_relu": "activation",
    "leaky_relu_": "activation", "hardtanh": "activation", "hardtanh_": "activation", "elu": "activation",
    "elu_": "activation", "mish": "activation", "mish_": "activation", "softplus": "activation",
    "prelu": "activation", "_prelu_kernel": "activation", "clamp": "activation", "clamp_min": "activation",
    "_softmax": "softmax", "softmax": "softmax", "_safe_softmax": "softmax",
    "max_pool2d_with_indices": "pool", "avg_pool2d": "pool", "mean": "pool", "_adaptive_avg_pool2d": "pool",
    "adaptive_max_pool2d": "pool",
    "cat": "copy", "clone": "copy", "constant_pad_nd": "copy", "index": "copy", "roll": "copy", "copy_": "copy",
    "_to_copy": "copy", "stack": "copy", "repeat": "copy", "gather": "copy", "im2col": "copy", "col2im": "copy",
    "add": "elementwise", "add_": "elementwise", "mul": "elementwise", "mul_": "elementwise", "sub": "elementwise",
    "div": "elementwise", "pow": "elementwise", "rsqrt": "elementwise", "neg": "elementwise", "exp": "elementwise",
}  # fmt: skip
"""What an operator does, by its name in ATen."""

_VIEWS = {"_unsafe_view", "_reshape_alias"}
"""Views that do not say so in their signatures."""

_DTYPE_NAMES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b", torch.int16: "i16",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_SIZES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The one attention kernel that torch's formulas leave out."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One call of an operator in a network.

    Attributes:
        call: canonical JSON of the call: the ATen operator, and its arguments with tensors as shape, type and strides.
            Calls of the same text take the same time, whatever network they stand in.
        module: path of the module that made the call.
        macs: multiply-adds, as ``torch.utils.flop_counter`` counts them.
        read_bytes, written_bytes: of the tensors that it takes and gives; 0 written for views.
        weight_bytes: part of ``read_bytes`` that are parameters and buffers.
        tokens: length of the sequence, where the input is ``(batch, tokens, width)``.
        weight_bits, activation_bits: of the policy that the module is under; those of the type without one.
        sparsity: share of zeros among the weights that the policy sets.
        group: number of the fusion group, see ``tracing``.
    """

    call: str
    module: str
    macs: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int
    tokens: int | None = None
    weight_bits: int = 32
    activation_bits: int = 32
    sparsity: float = 0.0
    group: int = -1

    @cached_property
    def target(self) -> str:
        """The operator with its overload, ``aten.convolution.default``."""
        return str(json.loads(self.call)[0])

    @property
    def kind(self) -> str:
        return kind_of(self.target, view=self.written_bytes == 0)


def kind_of(target: str, *, view: bool = False) -> str:
    """``conv``, ``linear``, ``matmul``, ``attention``, ``norm``, ``activation``, ``softmax``, ``pool``, ``copy``,
    ``elementwise``, ``view`` or ``other``."""
    name = target.split(".")[1]
    if "scaled_dot_product" in name:
        return "attention"
    if name in _VIEWS:
        return "view"
    return "view" if view else KINDS.get(name, "other")


def describe(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The canonical JSON of a call."""
    return json.dumps([target, [_plain(a) for a in args], {k: _plain(v) for k, v in sorted(kwargs.items())}])


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        described: list[Any] = [_DTYPE_NAMES.get(value.dtype, str(value.dtype)), list(value.shape)]
        # Strides only where they say more than the shape: most tensors are contiguous.
        return {"t": described if value.is_contiguous() else [*described, list(value.stride())]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": _DTYPE_NAMES.get(value, str(value))}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return {type(value).__name__: str(value)}
    return {"unknown": repr(value)}


def tensors(arguments: Any) -> Iterator[tuple[str, list[int]]]:
    """Type and shape of each tensor in the arguments of a call."""
    if isinstance(arguments, dict):
        if "t" in arguments:
            yield arguments["t"][0], arguments["t"][1]
        else:
            for value in arguments.values():
                yield from tensors(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from tensors(value)


def call_bytes(call: str) -> int:
    """Bytes of all tensors that a call takes."""
    _, args, kwargs = json.loads(call)
    return sum(math.prod(shape) * _SIZES.get(dtype, 4) for dtype, shape in tensors([args, kwargs]))


def count_macs(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Multiply-adds by torch's own formulas; 0 for operators that they do not know, as torch counts them."""
    packet = operator._overloadpacket
    if packet is _CPU_ATTENTION:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3]))) // 2  # type: ignore[no-untyped-call]
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out)) // 2


@lru_cache(maxsize=4096)
def resolve(target: str) -> Any:
    """The operator of a name such as ``aten.convolution.default``.

    Raises:
        ValueError: torch has no such operator.
    """
    namespace, name, overload = target.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError:
        raise ValueError(f"torch {torch.__version__} has no operator {target}") from None


def runnable(call: str, device: str = "cpu") -> Callable[[], object]:
    """A function that makes the call on tensors of its own, with values that keep it at its usual speed.

    Raises:
        ValueError: an argument that cannot be made again, or an operator unknown to this torch.
    """
    target, args, kwargs = json.loads(call)
    operator = resolve(target)
    generator = torch.Generator().manual_seed(0)
    in_place = operator._schema.is_mutable and target.split(".")[1].endswith("_")
    sizes = [shape for _, shape in tensors(args)]
    # Indices must lie within the shortest dimension of what they may index.
    limit = max(1, min((min(shape) for shape in sizes if shape and min(shape) > 0), default=1))

    def tensor(described: list[Any], first: bool) -> Tensor:
        dtype, shape, *strides = described
        if dtype not in _DTYPES:
            raise ValueError(f"cannot make a tensor of {dtype}")
        kind = _DTYPES[dtype]
        length = 1 + sum((n - 1) * s for n, s in zip(shape, strides[0], strict=True)) if strides else math.prod(shape)
        length = max(length, 0) if math.prod(shape) else 0
        if kind.is_floating_point:
            # Called again and again in place, values may neither grow nor decay to denormals.
            if in_place and not first:
                flat = torch.zeros(length) if "add" in target else torch.ones(length)
            else:
                flat = torch.rand(length, generator=generator) + 0.5
        elif kind is torch.bool:
            flat = torch.ones(length)
        else:
            flat = torch.randint(0, limit, (length,), generator=generator).to(torch.float64)
        flat = flat.to(kind).to(device)
        return flat.as_strided(shape, strides[0]) if strides else flat.reshape(shape)

    made = [0]

    def value(described: Any) -> Any:
        if isinstance(described, list):
            return [value(item) for item in described]
        if not isinstance(described, dict):
            return described
        if "t" in described:
            made[0] += 1
            return tensor(described["t"], made[0] == 1)
        if "dtype" in described:
            return _DTYPES[described["dtype"]]
        if "float" in described:
            return float(described["float"])
        if "device" in described:
            return torch.device(device)
        if "memory_format" in described or "layout" in described:
            return getattr(torch, next(iter(described.values())).removeprefix("torch."))
        raise ValueError(f"cannot make {described} again")

    arguments = [value(item) for item in args]
    named = {key: value(item) for key, item in kwargs.items()}

    def run() -> object:
        return operator(*arguments, **named)

    return run
