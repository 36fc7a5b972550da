"""Every operator on the device against float64 from the same values: passed or not, by gates for each type.

Each call is made twice, the second time into memory that was full of NaN, and both must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from ceilings import reason
from rows import Deadline
from torch import Tensor

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
GATES = {FULL: 1e-5, HALF: 1e-3, BRAIN: 4e-3}
"""Of ``norm(result - exact) / norm(exact)``; of int8 sums it is 0, of attention in bf16 1e-2."""


class Check(NamedTuple):
    """``run`` gives the error, which passes up to ``gate``; NaN does not pass."""

    operator: str
    what: str
    gate: float
    run: Callable[[], float]


def run_all(checks: Iterable[Check], deadline: Deadline) -> list[dict[str, Any]]:
    """A line each; operators take turns, so that a stop leaves something of each."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.operator, []).append(check)
    lines = []
    for check in (check for several in zip_longest(*groups.values()) for check in several if check is not None):
        line: dict[str, Any] = {"operator": check.operator, "what": check.what, "gate": check.gate, "error": None}
        lines.append(line)
        if deadline.left_s <= 0:
            line |= {"state": "not reached", "problem": None}
            continue
        try:
            error = check.run()
        # A check that cannot be made is one that fails.
        except Exception as problem:
            line |= {"state": "failed", "problem": reason(problem)}
            continue
        line |= {"error": error, "state": "passed" if error <= check.gate else "failed", "problem": None}
    return lines


def described(lines: list[Mapping[str, Any]]) -> tuple[list[list[Any]], list[str]]:
    """Rows of a table, an operator each, and a line for each check that failed."""
    rows = []
    for operator in dict.fromkeys(line["operator"] for line in lines):
        members = [line for line in lines if line["operator"] == operator]
        counts = [sum(line["state"] == state for line in members) for state in ("passed", "failed", "not reached")]
        nearest = max((line["error"] / line["gate"] for line in members if line["error"] and line["gate"]), default=0.0)
        rows.append([operator, *counts, f"{nearest:.0%}"])
    failed = [line for line in lines if line["state"] == "failed"]
    return rows, [
        f"  failed: {line['operator']} {line['what']}: "
        + (line["problem"] or f"error {line['error']:.2e}, gate {line['gate']:.0e}")
        for line in failed
    ]


def settled(call: Callable[[], Any]) -> Any:
    """The result of a second call into memory full of NaN.

    Raises:
        RuntimeError: its bits are not those of the first.
    """
    kept = [tensor.clone() for tensor in _together(call())]
    # What was freed last is given out first, so the next results most likely lie where these were.
    poison = [torch.full_like(tensor.float(), torch.nan).to(tensor.dtype) for tensor in kept]
    del poison
    result = call()
    for first, second in zip(kept, _together(result), strict=True):
        if not torch.equal(_bits(first), _bits(second)):
            raise RuntimeError("two calls with the same inputs gave different bits")
    return result


def relative(found: Tensor, exact: Tensor) -> float:
    """``norm(found - exact) / norm(exact)``; infinity where it is not of the shape."""
    if found.shape != exact.shape:
        return float("inf")
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def hard(x: Tensor) -> Tensor:
    """With some channels 50 times as large, and every fifth row zeros."""
    x = x.clone()
    x[..., ::17] *= 50
    x[4::5] = 0
    return x


def _together(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
