"""Makes a predictor of a network's policies on an int8 backend: files of some policies, measured on this host."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archfront.errors import InputError
from archfront.evaluators.deployment.int8_files import file_layers, write_dynamic, write_static
from archfront.evaluators.deployment.layer_times import LayerNode
from archfront.evaluators.latency.measurement import (
    MeasurementError,
    Settings,
    Timing,
    affordable,
    measured_elsewhere,
    pace,
)
from archfront.evaluators.latency.predictors.layers import LayerLatency, LayerPrice, Mask
from archfront.evaluators.onnx_files import export_onnx
from archfront.spaces.policies.bits import Bits
from archfront.spaces.space import Genotype, Space

LEAST_NETWORKS, MOST_NETWORKS = 20, 80
NETWORKS_S = 45.0
"""What those beyond the least may take a process to measure."""
PROCESSES = 2
_POOL = 400
_INT8 = 8
_SETTINGS = Settings(rounds=40)
_TIMEOUT_S = 900.0


def bits_of(space: Space) -> Bits:
    """The space, as one of bits.

    Raises:
        InputError: it is another.
    """
    if not isinstance(space, Bits):
        remedy = "Choose the space bits, or leave the latency to the finalists."
        raise InputError("evaluators.latency.mode", "layers", f"does not serve {space.name}", remedy)
    return space


def int8_mask(space: Bits, paths: Sequence[str], genotypes: Sequence[Genotype]) -> Mask:
    """``(n, layers)``: which layers have weights and inputs that int8 carries."""
    rows = []
    for genotype in genotypes:
        bits = space.layer_bits(genotype)
        rows.append([bits[p].weights <= _INT8 and bits[p].activations <= _INT8 for p in paths])
    return np.array(rows, dtype=np.bool_).reshape(len(rows), len(paths))


def policy_latency(
    space: Space,
    device: Mapping[str, Any],
    *,
    backend: str = "onnx-int8",
    batch: int = 1,
    threads: int = 1,
    networks: int | None = None,
    settings: Settings = _SETTINGS,
    timeout_s: float = _TIMEOUT_S,
) -> LayerLatency:
    """Measure a predictor. Ranges and values are of no account for time, so no data are needed.

    Args:
        space: of bits.
        device: this host's fingerprint as JSON.
        backend: ``onnx-int8`` or ``onnx-int8-dynamic``.
        batch: samples a pass.
        threads: that an operator may use.
        networks: policies that are measured, those all in float and all in int8 included; by default 20, and more of
            quick networks.
        settings: how long each.
        timeout_s: of one measuring process.

    Raises:
        InputError: no space of bits, or none of whose policies has layers in int8.
        MissingExtraError: ONNX Runtime is not installed.
        MeasurementError: a file cannot be measured.
    """
    bits = bits_of(space)
    with tempfile.TemporaryDirectory(prefix="archfront-layers-") as folder:
        source = Path(folder) / "float.onnx"
        model = bits.source.build().eval()
        export_onnx(model, bits.source.example(2), source, any_batch=True, for_onnxruntime=True)
        layers = file_layers(source, [layer.path for layer in bits.layers.found])
        if networks is None:
            networks = _affordable_networks(bits, source, batch, threads, settings)
        masks = _calibration(bits, layers, networks, dynamic=backend.endswith("dynamic"))
        items = mask_items(bits, source, [layer.path for layer in layers], masks, backend=backend, batch=batch)
        for item in items[:2]:  # all in float, and all in int8
            item["layers"] = [list(layer) for layer in layers]
        timed = [
            measured_elsewhere(None, items, threads=threads, settings=settings, timeout_s=timeout_s)
            for _ in range(PROCESSES)
        ]
    return _fitted(layers, masks, timed, device)


def _affordable_networks(space: Bits, source: Path, batch: int, threads: int, settings: Settings) -> int:
    [item] = mask_items(space, source, [], np.zeros((1, 0), dtype=np.bool_), backend="onnx-int8", batch=batch)
    [timing], _ = measured_elsewhere(None, [item], threads=threads, settings=Settings(rounds=5), timeout_s=_TIMEOUT_S)
    if timing.error is not None:
        raise MeasurementError(f"The network's file cannot be measured: {timing.error}")
    return affordable(timing.median_ms, settings, seconds=NETWORKS_S, least=LEAST_NETWORKS, most=MOST_NETWORKS)


def mask_items(
    space: Bits, source: Path, paths: Sequence[str], masks: Mask, *, backend: str, batch: int = 1
) -> list[dict[str, Any]]:
    """Files of policies beside the float one, as items for the measuring process. Their int8 layers compute nothing of
    use, for no data have been seen.

    Args:
        source: the float file.
        paths: of the layers.
        masks: which of these shall be in int8.
    """
    example = space.source.example(2)
    items = []
    for number, mask in enumerate(masks):
        chosen = [path for path, int8 in zip(paths, mask, strict=True) if int8]
        file = source.with_name(f"{number}.onnx") if chosen else source
        if chosen and backend.endswith("dynamic"):
            write_dynamic(source, file, chosen)
        elif chosen:
            write_static(source, file, [example.numpy()], dict.fromkeys(chosen), channels_last=True)
        items.append({"file": str(file), "runtime": "onnx", "shape": list(example.shape[1:]), "batch": batch})
    return items


def _calibration(space: Bits, layers: Sequence[LayerNode], count: int, *, dynamic: bool) -> Mask:
    """All in float, all that some policy has in int8, and others between, each once."""
    paths = [layer.path for layer in layers]
    rng = np.random.default_rng(0)
    drawn = int8_mask(space, paths, space.to_json(space.sample_spread(rng, _POOL)))
    drawn &= ~np.array([dynamic and layer.convolution for layer in layers])
    most = drawn.any(axis=0)
    if not most.any():
        problem = "has no layer whose weights and inputs have 8 bits or fewer in some policy"
        raise InputError("space.activations", space.options["activations"], problem, "Set it to follow.")
    # Uniform draws have about half of their layers in int8; those that a search ends at have nearly all.
    shares = rng.random((_POOL, 1))
    drawn = np.concatenate([drawn, most & (rng.random((_POOL, len(paths))) < shares)])
    ends = np.stack([np.zeros_like(most), most])
    _, first = np.unique(np.concatenate([ends, drawn]), axis=0, return_index=True)
    others = np.concatenate([ends, drawn])[np.sort(first[first > 1])]
    order = np.argsort(others.mean(axis=1), kind="stable")
    picked = np.unique(np.linspace(0, len(order) - 1, max(count - 2, 0)).round().astype(int))
    return np.concatenate([ends, others[order[picked]]])


def _fitted(
    layers: Sequence[LayerNode],
    masks: Mask,
    timed: Sequence[tuple[Sequence[Timing], Mapping[str, Any]]],
    device: Mapping[str, Any],
) -> LayerLatency:
    for timings, _ in timed:
        for timing in timings:
            if timing.error is not None:
                raise MeasurementError(f"A policy's file cannot be measured: {timing.error}")
    probe_ms = timed[0][1].get("probe_ms")
    ms = np.min([[pace(env, probe_ms) * t.quiet_ms for t in timings] for timings, env in timed], axis=0)
    tables = [{row["layer"]: row for row in timing.layers} for timing in timed[0][0][:2]]
    prices = [
        LayerPrice(
            layer=layer.path,
            float_ms=(plain := tables[0].get(layer.path, _NOTHING))["ms"],
            int8_ms=tables[1].get(layer.path, plain)["ms"],
            elements=plain["elements"],
        )
        for layer in layers
    ]
    rest = (float(tables[0][""]["ms"]), float(tables[1][""]["ms"]))
    return LayerLatency(prices, rest, device, probe_ms).fit(masks, ms)


_NOTHING: Mapping[str, Any] = {"ms": 0.0, "elements": 0}
