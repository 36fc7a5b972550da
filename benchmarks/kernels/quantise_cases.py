"""Rows to int8 codes after a layer norm, after a GELU and alone, beside the same through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from case import Case, Variant, normal, some_rows
from int8_cases import quantised, rows_tuning
from torch import Tensor

from archfront.kernels.ops import quantise_rows as module
from archfront.kernels.reference import low_bit_costs as costs

COMPILED = "torch, compiled"
_DTYPE = torch.bfloat16
_EPS = 1e-6
_ROWS = 197 * 256


class Values(NamedTuple):
    """Only the layer norm has weights."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """What stands before the linear layers of ViT-B, DeiT-S and Llama."""
    if device.type == "cpu":
        for operator in module.OPERATORS:
            yield _case(operator, 9, 48, 0, device)
        return
    sizes = [
        ("layer_norm_quantise", _ROWS, 768),
        ("gelu_quantise", _ROWS, 3072),
        ("layer_norm_quantise", _ROWS, 384),
        ("gelu_quantise", _ROWS, 1536),
        ("quantise_rows", _ROWS, 768),
        ("quantise_rows", 2048, 4096),
        ("quantise_rows", 2048, 14336),
        ("quantise_rows", 1, 4096),
    ]
    for operator, rows, columns in sizes:
        yield _case(operator, rows, columns, 1 if columns < 3072 else 2, device)


def _before(operator: str, values: Values) -> Tensor:
    if operator == "gelu_quantise":
        return functional.gelu(values.x)
    if operator == "layer_norm_quantise":
        return functional.layer_norm(values.x, (values.x.shape[1],), values.weight, values.bias, _EPS)
    return values.x


def _decoded(found: tuple[Tensor, Tensor]) -> Tensor:
    codes, scale = (some_rows(part) for part in found)
    return codes.double() * scale.double().reshape(-1, 1)


def _case(operator: str, rows: int, columns: int, priority: int, device: torch.device) -> Case:
    def values(seed: int) -> Values:
        vectors = (1 + normal((columns,), 3 * seed + 1, device, scale=0.1), normal((columns,), 3 * seed + 2, device))
        return Values(normal((rows, columns), 3 * seed, device), *vectors)

    def exact(given: Values) -> Tensor:
        rounded = _before(operator, Values(some_rows(given.x).double(), given.weight.double(), given.bias.double()))
        scale = rounded.abs().amax(1, keepdim=True) / 127
        return (rounded / scale).round() * scale

    def plain(*given: Tensor) -> tuple[Tensor, Tensor]:
        return quantised(_before(operator, Values(*given)))

    norm = operator == "layer_norm_quantise"
    calls: dict[str, Callable[..., Any]] = {
        "layer_norm_quantise": lambda x, weight, bias: module.layer_norm_quantise(x, weight, bias, eps=_EPS),
        "gelu_quantise": lambda x, _, __: module.gelu_quantise(x),
        "quantise_rows": lambda x, _, __: module.quantise_rows(x),
    }
    cost = {
        "layer_norm_quantise": lambda: costs.layer_norm_quantise_cost(rows, columns, dtype=_DTYPE, bias=True),
        "gelu_quantise": lambda: costs.gelu_quantise_cost(rows, columns, dtype=_DTYPE),
        "quantise_rows": lambda: costs.quantise_rows_cost(rows, columns, dtype=_DTYPE),
    }[operator]()
    variants = [
        Variant(operator, tuple, calls[operator], exact, cost, "float32", _decoded, ours=True),
        Variant("torch, eager", tuple, plain, exact, cost, "float32", _decoded),
        Variant(COMPILED, tuple, plain, exact, cost, "float32", _decoded, compiled=True),
    ]
    shape = torch.empty(rows, columns, dtype=_DTYPE, device="meta")
    facts = {"m": rows, "k": columns, "norm": norm}
    tunings = [rows_tuning(operator, shape)]
    return Case(operator, f"{rows} x {columns}", _DTYPE, facts, values, variants, COMPILED, priority, tunings)
