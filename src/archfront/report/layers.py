"""What the report says of each layer of a finalist: on which kernel it ran, how long, and what its shape allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archfront.client import Job
from archfront.report.facts import Finalist
from archfront.spaces.space import Space


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer; times in ms, None where nobody knows.

    Attributes:
        layer: its path; empty for all that lies between layers, together.
        choice: what the policy chose for it.
        kernel: that computes it.
        predicted_ms: what the search reckoned with.
        measured_ms: by the runtime's profiler, which makes all a little slower.
        floor_ms: the least that this arithmetic and these bytes take here.
        ceiling: how many times as fast as in float32 it could be at most: the ratio of the floors.
    """

    layer: str
    choice: str = ""
    kernel: str = ""
    predicted_ms: float | None = None
    measured_ms: float | None = None
    floor_ms: float | None = None
    ceiling: float | None = None


def layer_table(job: Job, space: Space, finalist: Finalist) -> tuple[str, list[LayerRow]] | None:
    """Backend and layers of the finalist's fastest measurement that tells of them; None if none does."""
    told = [(c["median_ms"], s["backend"], c) for s, c in finalist.newest() if c.get("layers")]
    if not told:
        return None
    _, backend, content = min(told, key=lambda one: one[:2])
    chosen = {layer.name: layer.kind for layer in space.describe(finalist.row["genotype"])}
    environment = content.get("environment") or {}
    prices = _prices(job, space, environment.get("device") or {})
    rates = environment.get("rates")
    return backend, [_row(found, chosen, prices, rates) for found in content["layers"]]


def _prices(job: Job, space: Space, device: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What predictions on a device take for each layer."""
    from archfront.evaluators.latency.predictors.layers import FORMAT, LayerLatency

    found = job.ledger.artifacts("latency", f"{FORMAT}:{device.get('digest')}:{space.digest}:")
    if not found:
        return {}
    prices = {price.layer: price for price in LayerLatency.from_json(found[-1]).layers}
    return {path: {"float_ms": p.float_ms, "int8_ms": p.int8_ms} for path, p in prices.items()}


def _row(
    found: Mapping[str, Any],
    chosen: Mapping[str, str],
    prices: Mapping[str, Mapping[str, float]],
    rates: Mapping[str, float] | None,
) -> LayerRow:
    if "path" in found:  # of a GPU, where kernels are chosen by what is faster
        own, dense = found.get("kernel_ms"), found.get("dense_ms")
        measured = dense if found["kernel"] == "dense" else own
        return LayerRow(
            layer=found["path"], choice=chosen.get(found["path"], ""), kernel=found["kernel"], measured_ms=measured
        )
    from archfront.evaluators.deployment.processor_rates import floor_ms

    layer, macs, moved = found["layer"], found["macs"], found["bytes"]
    floor = ceiling = None
    if rates and macs:
        floor = floor_ms(macs, moved, rates, int8=found["int8"])
        # In float32 every element has four bytes: those of int8 kernels have one.
        ceiling = floor_ms(macs, moved * (4 if found["int8"] else 1), rates, int8=False) / floor
    return LayerRow(
        layer=layer,
        choice=chosen.get(layer, ""),
        kernel=found["kernel"],
        predicted_ms=prices.get(layer, {}).get("int8_ms" if found["int8"] else "float_ms"),
        measured_ms=found["ms"],
        floor_ms=floor,
        ceiling=ceiling,
    )
