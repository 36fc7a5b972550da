"""The goals that the operators were given, held against rows: met, not met or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""As ``rows.FIELDS``."""


class Verdict(NamedTuple):
    """A goal, how it stands, and the figures that say so."""

    goal: str
    state: str
    found: str


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """All goals; a goal for several shapes is met if all that were tried meet it, and what failed does not."""
    # Twins on a CPU meet no goal and miss none.
    known = [row for row in rows if row["backend"] == "triton" or (not row["ours"] and row["median_us"] is not None)]
    ours = [row for row in known if row["ours"]]
    return [
        *_int8(known),
        *_weights(ours),
        *_attention(ours),
        _least(
            "token reduction: 5 x ToMe's algorithm in torch",
            5.0,
            _of(ours, "token_match + token_merge"),
            lambda row: row["speedup"],
        ),
        _least(
            "depthwise 3 x 3, batch 256: 75 % of copy bandwidth",
            0.75,
            [row for row in _of(ours, "depthwise_scale_shift") if row["facts"]["kernel"] == 3 and _large(row)],
            lambda row: row["efficiency"],
        ),
        *_others(ours),
    ]


def _int8(known: list[Row]) -> list[Verdict]:
    counted = [row for row in _of(known, "int8_linear") if row["facts"]["m"] >= 4096]
    ours = [row for row in counted if row["variant"] == "quantise_rows + int8_linear"]
    compiled = {row["shape"]: row["median_us"] for row in counted if row["variant"] == "quantise + _int_mm, compiled"}
    pairs = [row for row in ours if row["shape"] in compiled]
    return [
        _least(
            "W8A8: 1.4 x cuBLAS bf16 at M >= 4096, quantisation of x counted", 1.4, ours, lambda row: row["speedup"]
        ),
        _least(
            "W8A8: not slower than _int_mm with its epilogue compiled, M >= 4096",
            1.0,
            pairs,
            lambda row: compiled[row["shape"]] / row["median_us"],
        ),
    ]


def _weights(ours: list[Row]) -> list[Verdict]:
    four = [row for row in _of(ours, "weight_only_linear") if row["facts"]["bits"] == 4 and row["facts"]["n"] >= 4096]
    one, sixteen = ([row for row in four if row["facts"]["m"] == rows] for rows in (1, 16))
    return [
        _least("W4 at M = 1: 70 % of the floor", 0.7, one, lambda row: row["efficiency"]),
        _least("W4 at M = 1: 2.6 x cuBLAS bf16", 2.6, one, lambda row: row["speedup"]),
        _least("W4 at M = 16: 65 % of the floor", 0.65, sixteen, lambda row: row["efficiency"]),
    ]


def _attention(ours: list[Row]) -> list[Verdict]:
    rows = _of(ours, "pattern_attention")

    def size(row: Row) -> tuple[int, ...]:
        return tuple(row["facts"][name] for name in ("b", "h", "length", "d"))

    dense = {size(row): row["median_us"] for row in rows if row["facts"]["pattern"] == "dense" and row["median_us"]}
    long = [row for row in rows if row["facts"]["length"] >= 4096 and row["facts"]["pattern"] != "dense"]
    # Of a goal of 15 %, rounding of widths to tokens leaves a little more or less.
    listed = [row for row in long if row["facts"]["density"] >= 0.14 and size(row) in dense]
    return [
        _least(
            "pattern attention, 4096 tokens and more, density 15 % and more: 85 % of linear to our dense",
            0.85,
            listed,
            lambda row: dense[size(row)] * row["facts"]["density"] / row["median_us"],
        ),
        _least(
            "pattern attention, 4096 tokens and more: not slower than FlexAttention",
            1.0,
            long,
            lambda row: row["speedup"],
        ),
    ]


def _others(ours: list[Row]) -> list[Verdict]:
    """Sparse layers and EvoNorm."""
    blocks = _of(ours, "block_sparse_linear")
    sparse = [row for row in blocks if row["facts"]["sparsity"] == 0.75 and row["facts"]["m"] >= 2048]
    return [
        _least(
            "block-sparse, 75 % zero, M >= 2048: 70 % of linear to cuBLAS",
            0.7,
            sparse,
            lambda row: None if row["speedup"] is None else row["speedup"] * (1 - row["facts"]["sparsity"]),
        ),
        _least(
            "EvoNorm-S0: 80 % of copy bandwidth",
            0.8,
            [row for row in _of(ours, "evonorm_s0") if _large(row)],
            lambda row: row["efficiency"],
        ),
    ]


def _of(rows: Iterable[Row], operator: str) -> list[Row]:
    return [row for row in rows if row["operator"] == operator]


def _large(row: Row) -> bool:
    return bool(row["facts"]["n"] >= 256)


def _least(goal: str, wanted: float, rows: list[Row], measure: Callable[[Row], float | None]) -> Verdict:
    found: dict[str, float] = {}
    for row in rows:
        value = 0.0 if row["failure"] else measure(row)
        if value is not None:
            found[row["shape"]] = value
    if not found:
        return Verdict(goal, "not measured", "")
    worst = min(found, key=lambda shape: found[shape])
    good = sum(value >= wanted for value in found.values())
    text = f"{found[worst]:.2f} at worst ({worst}), {max(found.values()):.2f} at best; {good} of {len(found)} shapes"
    return Verdict(goal, "met" if good == len(found) else "not met", text)
