"""Linear layers on int8 or fp8 codes (W8A8), with the quantisation of x counted and not, beside cuBLAS in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from case import Case, Tuning, Variant, normal, some_rows
from torch import Tensor

from archfront.kernels.ops import fp8_linear as fp8_module
from archfront.kernels.ops import int8_linear as int8_module
from archfront.kernels.ops import quantise_rows as quantise_module
from archfront.kernels.ops.fp8_linear import fp8_linear
from archfront.kernels.ops.int8_linear import int8_linear
from archfront.kernels.ops.quantise_rows import quantise_rows
from archfront.kernels.reference import low_bit_costs as costs
from archfront.kernels.reference import low_bit_linear as reference
from archfront.kernels.reference.cost import Cost
from archfront.kernels.reference.low_bit_linear import FP8

OPERATOR = "int8_linear"
CUBLAS = "cuBLAS bf16"
_DTYPE = torch.bfloat16
_TOKENS = 197
_DEIT_S = {"qkv": (1152, 384), "proj": (384, 384), "fc1": (1536, 384), "fc2": (384, 1536)}
_VIT_B = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
_LLAMA = {"o": (4096, 4096), "qkv": (6144, 4096), "up": (14336, 4096), "down": (4096, 14336)}
# A block's 1 x 1 convolutions at batch 64, as (rows, channels, columns); MBConv's at batch 256, t = 6.
_RESNET = [
    (64 * 56**2, 64, 256),
    (64 * 56**2, 256, 64),
    (64 * 28**2, 512, 128),
    (64 * 14**2, 1024, 256),
    (64 * 7**2, 512, 2048),
    (64 * 7**2, 2048, 512),
]
_MBCONV = [(256 * 28**2, 576, 96), (256 * 28**2, 96, 576), (256 * 14**2, 960, 160)]
_TINY = [(33, 40, 64), (1, 24, 48)]


class Values(NamedTuple):
    """x and w in bf16, bias in float32; all codes follow of them."""

    x: Tensor
    w: Tensor
    bias: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """Layers by name; what has four thousand rows and more, or a Llama's weights, comes first."""
    if device.type == "cpu":
        for rows, channels, columns in _TINY:
            yield _case("tiny", rows, channels, columns, 0, device)
        return
    for model, layers in (("ViT-B", _VIT_B), ("DeiT-S", _DEIT_S)):
        for layer, (channels, columns) in layers.items():
            for batch in (256, 64, 8, 1):
                first = layer in ("fc1", "fc2") and batch >= 64
                yield _case(
                    f"{model} {layer}", _TOKENS * batch, channels, columns, 0 if first else 1 + (batch < 64), device
                )
    for layer, (channels, columns) in _LLAMA.items():
        for rows in (2048, 256, 64, 16, 1):
            yield _case(f"Llama {layer}", rows, channels, columns, 1 if rows == 2048 else 3, device)
    for name, shapes in (("ResNet-50 1x1", _RESNET), ("MBConv 1x1", _MBCONV)):
        for rows, channels, columns in shapes:
            yield _case(name, rows, channels, columns, 2, device)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """As a user of torch writes it; what ``torch.compile`` fuses."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-30) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def int_mm(x: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """``torch._int_mm`` with what it needs before and after."""
    codes, scale = quantised(x)
    total = torch._int_mm(codes, wq.t())
    return (total.float() * scale * w_scale + bias).to(x.dtype)


def scaled_mm(xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    return torch._scaled_mm(
        xq, wq.t(), scale_a=x_scale[:, None], scale_b=w_scale[None, :], bias=bias.to(_DTYPE), out_dtype=_DTYPE
    )


def _case(layer: str, rows: int, channels: int, columns: int, priority: int, device: torch.device) -> Case:
    def values(seed: int) -> Values:
        x, w = (normal((count, columns), 3 * seed + place, device) for place, count in enumerate((rows, channels)))
        return Values(x, w * columns**-0.5, normal((channels,), 3 * seed + 2, device, torch.float32))

    def counted(given: Values) -> tuple[Any, ...]:
        return given.x, *reference.quantise_rows(given.w), given.bias

    def coded(given: Values, dtype: torch.dtype = torch.int8) -> tuple[Any, ...]:
        return *reference.quantise_rows(given.x, dtype), *reference.quantise_rows(given.w, dtype), given.bias

    def exact(given: Values, dtype: torch.dtype = torch.int8) -> Tensor:
        codes, scale = reference.quantise_rows(some_rows(given.x), dtype)
        wq, w_scale = reference.quantise_rows(given.w, dtype)
        total = codes.float().double() @ wq.float().double().T
        return total * scale.double()[:, None] * w_scale.double() + given.bias.double()

    def exact_floats(given: Values) -> Tensor:
        return some_rows(given.x).double() @ given.w.double().T + given.bias.to(_DTYPE).double()

    # Linear layers have their bias in the type of their weight.
    def floats(given: Values) -> tuple[Any, ...]:
        return given.x, given.w, given.bias.to(_DTYPE)

    alone = costs.quantised_linear_cost(rows, channels, columns, bias=True, out_dtype=_DTYPE)
    # x is read as bf16 once and its codes stay on the chip.
    fused = Cost(alone.operations, alone.bytes + rows * (columns - 4))
    size = 2 * (rows * columns + channels * columns + rows * channels + channels)
    dense = Cost(rows * channels * (2 * columns + 1), size)
    ours: dict[str, Any] = {"ours": True, "sample": some_rows, "peak": "int8"}
    variants = [
        Variant(
            "quantise_rows + int8_linear",
            counted,
            lambda x, wq, w_scale, bias: int8_linear(*quantise_rows(x), wq, w_scale, bias, out_dtype=_DTYPE),
            exact,
            fused,
            **ours,
        ),
        Variant("int8_linear of codes", coded, lambda *o: int8_linear(*o, out_dtype=_DTYPE), exact, alone, **ours),
        Variant(
            "fp8_linear of codes",
            lambda given: coded(given, FP8),
            lambda *o: fp8_linear(*o, out_dtype=_DTYPE),
            lambda given: exact(given, FP8),
            alone,
            **ours,
        ),
        Variant(
            CUBLAS,
            floats,
            functional.linear,
            exact_floats,
            dense,
            "bf16",
            some_rows,
        ),
        Variant("quantise + _int_mm, eager", counted, int_mm, exact, fused, "int8", some_rows),
        Variant("quantise + _int_mm, compiled", counted, int_mm, exact, fused, "int8", some_rows, compiled=True),
        Variant(
            "_scaled_mm fp8 of codes",
            lambda given: coded(given, FP8),
            scaled_mm,
            lambda given: exact(given, FP8),
            alone,
            "int8",
            some_rows,
        ),
    ]
    facts = {"layer": layer, "m": rows, "n": channels, "k": columns}
    name = f"{layer} {rows} x {channels} x {columns}"
    tunings = _tunings(rows, channels, columns)
    return Case(OPERATOR, name, _DTYPE, facts, values, variants, CUBLAS, priority, tunings)


def _tunings(rows: int, channels: int, columns: int) -> list[Tuning]:
    def codes_for(dtype: torch.dtype) -> Any:
        def prepare(given: Values) -> tuple[Any, ...]:
            out = given.x.new_empty(rows, channels)
            return *reference.quantise_rows(given.x, dtype), *reference.quantise_rows(given.w, dtype), given.bias, out

        return prepare

    def int8(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor, out: Tensor, setting: Any) -> None:
        int8_module.run_kernel(xq, xs, wq, ws, bias, None, None, out, activation="none", setting=setting)

    def fp8(*arguments: Any) -> None:
        fp8_module.run_kernel(*arguments[:-1], setting=arguments[-1])

    shape = torch.empty(rows, columns, dtype=_DTYPE, device="meta")
    return [
        Tuning(
            "int8_linear",
            int8_module.tuning_key(rows, channels, columns, 0, _DTYPE),
            int8_module.default_setting(rows, channels),
            int8_module.candidates(rows),
            codes_for(torch.int8),
            int8,
        ),
        rows_tuning("quantise_rows", shape),
        Tuning(
            "fp8_linear",
            fp8_module.tuning_key(rows, channels, columns, _DTYPE),
            fp8_module.default_setting(rows, channels),
            fp8_module.candidates(rows),
            codes_for(FP8),
            fp8,
        ),
    ]


def rows_tuning(operator: str, shape: Tensor) -> Tuning:
    """Of one of the three operators that quantise rows; ``shape`` is of x, and ``values`` have it first."""
    before = quantise_module.OPERATORS.index(operator)

    def prepare(given: Any) -> tuple[Any, ...]:
        x = given[0]
        codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
        weights = (given[1], given[2]) if operator == "layer_norm_quantise" else (None, None)
        return x, *weights, codes, scales

    def run(*arguments: Any) -> None:
        quantise_module.run_kernel(*arguments[:-1], before=before, eps=1e-6, setting=arguments[-1])

    columns = shape.shape[1]
    default, found = quantise_module.default_setting(columns), quantise_module.candidates(columns)
    return Tuning(operator, quantise_module.tuning_key(shape), default, found, prepare, run)
