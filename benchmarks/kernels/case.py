"""What a benchmark of an operator consists of: shapes with inputs, our variants, baselines, costs, settings to tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from archfront.kernels.reference.cost import Cost
from archfront.kernels.tuning import Setting

_SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: in tables.
        prepare: from the case's values to the arguments of ``call``, outside of what is timed.
        call: what is timed.
        exact: in float64, from the same values, what ``sample`` takes of the result.
        cost: the least that this function costs.
        peak: which measured rate bounds its arithmetic.
        sample: the part of the result that is compared.
        compiled: whether ``call`` goes through ``torch.compile``.
        ours: whether it is archfront's, and not a baseline.
    """

    name: str
    prepare: Callable[[Any], tuple[Any, ...]]
    call: Callable[..., Any]
    exact: Callable[[Any], Tensor]
    cost: Cost
    peak: str
    sample: Callable[[Any], Tensor]
    compiled: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Tuning:
    """Settings of a kernel for the key that a case looks up.

    Attributes:
        operator, key, default: as ``tuning.chosen`` takes them.
        candidates: to be measured.
        prepare: from the case's values to the first arguments of ``run``.
        run: launches once with a setting, its last argument.
    """

    operator: str
    key: str
    default: Setting
    candidates: Sequence[Setting]
    prepare: Callable[[Any], tuple[Any, ...]]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        operator: name of the table.
        shape: in words.
        dtype: of input and result.
        facts: sizes by name, for the goals.
        values: random ones from a seed, on the device.
        variants: ours first; the first is timed twice, for the noise.
        named: the baseline that speed-ups are over.
        priority: 0 for what goals are about, measured first.
        tunings: of the kernels that it launches.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    facts: dict[str, Any]
    values: Callable[[int], Any]
    variants: Sequence[Variant]
    named: str
    priority: int = 1
    tunings: Sequence[Tuning] = field(default_factory=tuple)


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(
    shape: Sequence[int], seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
) -> Tensor:
    """Random, since products of zeros take less power and run faster."""
    return torch.randn(*shape, generator=generator(seed, device), device=device, dtype=dtype) * scale


def some_rows(matrix: Tensor) -> Tensor:
    """About a thousand rows from everywhere: float64 for all of a large matrix takes longer than the measurement."""
    return matrix[:: max(1, len(matrix) // _SAMPLED_ROWS)]


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Norm of the difference over that of the exact, and the largest difference over its root mean square.

    NaN where anything is NaN; with an exact of zeros, the difference itself.
    """
    if found.shape != exact.shape:
        raise ValueError(f"result: {tuple(found.shape)}, and of float64 {tuple(exact.shape)}")
    difference = found.double() - exact
    norm, root = float(exact.norm()), float(exact.square().mean().sqrt())
    return float(difference.norm()) / (norm or 1.0), float(difference.abs().max()) / (root or 1.0)


def short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
