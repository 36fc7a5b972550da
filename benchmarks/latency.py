"""Latency on this processor, predicted from operators: against careful measurement, multiply-adds and parameters.

100 random networks of the FBNet-tiny space and 40 models of timm at batch 1, one thread. Their operators are profiled;
the correction from sums to networks is fitted to other networks of both kinds; then all are measured in fresh
processes, and compared. "trees" prices every operator of the test networks by trees that saw none of timm's test
models: what a prediction is worth where the table lacks everything.

    python benchmarks/latency.py [--quick] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, show, write_json
from rich.console import Console
from scipy.stats import spearmanr

from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.measurement import Settings, measured_elsewhere
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.predictors.operator_prices import OperatorPrices
from archfront.evaluators.latency.profile import Profile, profile_operators
from archfront.evaluators.latency.tracing import Trace, trace
from archfront.spaces.fbnet import FBNet
from archfront.spaces.named_models import build_model, input_shape
from archfront.spaces.registry import SPACES

SPACE = {"name": "fbnet-tiny", "resolution": 16, "layers": 12}
TEST_MODELS = (
    "resnet18", "resnet50", "resnet26d", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "efficientnet_b0", "efficientnet_b1", "fbnetc_100", "mnasnet_100", "spnasnet_100", "ghostnet_100", "regnetx_002",
    "regnetx_008", "regnety_004", "densenet121", "dpn68", "hrnet_w18_small", "repvgg_a0", "vgg11", "convnext_atto",
    "convnext_femto", "vit_tiny_patch16_224", "vit_small_patch32_224", "deit_tiny_patch16_224", "mixer_s32_224",
    "swin_tiny_patch4_window7_224", "poolformer_s12", "pvt_v2_b0", "edgenext_xx_small", "mobilevit_xxs",
    "resmlp_12_224",
    "gmlp_ti16_224", "xcit_nano_12_p16_224", "levit_128s", "tinynet_a", "lcnet_100", "semnasnet_100", "rexnet_100",
    "selecsls42b",
)  # fmt: skip
CALIBRATION_MODELS = (
    "resnet34", "resnext50_32x4d", "mobilenetv2_050", "efficientnet_lite0", "mnasnet_small", "regnetx_004",
    "regnety_002", "convnext_pico", "vit_tiny_r_s16_p8_224", "deit_small_patch16_224", "mixer_s16_224", "pvt_v2_b1",
    "poolformerv2_s12", "mobilevit_xs", "ghostnet_050", "repvgg_b0", "hardcorenas_a", "tinynet_c", "lcnet_050",
    "edgenext_x_small",
)  # fmt: skip
CONFIDENCE = 0.9


def traces_of(space: FBNet, genotypes: Sequence[Any], models: Sequence[str]) -> list[Trace]:
    found = []
    for genotype in genotypes:
        with torch.device("meta"):
            model = space.build(genotype)
        found.append(trace(model, (space.in_channels, space.resolution, space.resolution)))
    for name in models:
        with torch.device("meta"):
            model = build_model(f"timm:{name}")
        found.append(trace(model, input_shape(model)))
    return found


def measure_all(items: Sequence[dict[str, Any]], threads: int, settings: Settings, processes: int) -> np.ndarray:
    """``(n,)`` ms: of each network the least median of several processes, since load only ever adds."""
    times = np.full((processes, len(items)), np.nan)
    small = [i for i, item in enumerate(items) if "genotype" in item]
    large = [i for i, item in enumerate(items) if "model" in item]
    chunks = [small[i : i + 60] for i in range(0, len(small), 60)] + [large[i : i + 6] for i in range(0, len(large), 6)]
    for process in range(processes):
        for chunk in chunks:
            timings, _ = measured_elsewhere(
                SPACE, [items[i] for i in chunk], threads=threads, settings=settings, timeout_s=900
            )
            for i, timing in zip(chunk, timings, strict=True):
                if timing.error is not None:
                    raise RuntimeError(f"{items[i]}: {timing.error}")
                times[process, i] = timing.median_ms
    return times.min(axis=0)


def scores(name: str, predicted: np.ndarray, measured: np.ndarray, inside: np.ndarray | None, tiny: int) -> list[Any]:
    error = np.abs(predicted / measured - 1)
    parts: list[Any] = [name]
    for part in (slice(None), slice(0, tiny), slice(tiny, None)):
        parts += [float(spearmanr(predicted[part], measured[part])[0]), float(np.median(error[part]))]
    return [*parts, None if inside is None else float(inside.mean())]


def scaled(
    count: Callable[[Trace], float], calibration: Sequence[Trace], ms: np.ndarray, tests: Sequence[Trace]
) -> np.ndarray:
    """A count as a predictor: a line with the least squared relative errors on the calibration networks."""
    design = np.array([[1.0, count(t)] for t in calibration]) / ms[:, None]
    weights = np.linalg.lstsq(design, np.ones(len(ms)), rcond=None)[0]
    return np.maximum(np.array([[1.0, count(t)] for t in tests]) @ weights, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few networks: a smoke test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="that measure every network")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    facts, console = machine(), Console()
    tiny, models, calibration_models = (100, TEST_MODELS, CALIBRATION_MODELS)
    if options.quick:
        tiny, models, calibration_models = 4, ("lcnet_050",), ("mobilenetv3_small_050", "tinynet_e")
    space = SPACES.build(SPACE, "space")
    assert isinstance(space, FBNet)
    tests = space.to_json(space.sample(np.random.default_rng(0), tiny))
    others = space.to_json(space.sample_spread(np.random.default_rng(1), 4 if options.quick else 20))
    test_traces = traces_of(space, tests, models)
    fit_traces = traces_of(space, others, calibration_models)
    start = time.perf_counter()
    empty = Profile(device=fingerprint(options.threads).to_json(), threads=options.threads)
    operators = [o for t in (*fit_traces, *test_traces) for o in t.operators]
    profile = profile_operators(
        operators,
        empty,
        observe=lambda p: console.print(f"profiled {p.done:,} of {p.total:,} operators", highlight=False),
    )
    profile_s = time.perf_counter() - start
    quick = Settings(rounds=5, sample_ms=1.0) if options.quick else Settings(rounds=15, sample_ms=3.0, warmup_ms=50.0)
    start = time.perf_counter()
    items = [{"genotype": g} for g in (*tests, *others)] + [
        {"model": f"timm:{m}"} for m in (*models, *calibration_models)
    ]
    times = measure_all(items, options.threads, quick, options.processes)
    measured = np.concatenate([times[:tiny], times[tiny + len(others) : tiny + len(others) + len(models)]])
    fit_ms = np.concatenate([times[tiny : tiny + len(others)], times[tiny + len(others) + len(models) :]])
    measure_s = time.perf_counter() - start

    predictor = NetworkLatency(profile).fit(fit_traces, fit_ms)
    table = predictor.predict(test_traces, CONFIDENCE)
    # Trees that saw only the operators of the calibration networks.
    seen = {o.call for t in fit_traces for o in t.operators}
    less = replace(profile, ms={c: v for c, v in profile.ms.items() if c in seen})
    trees = NetworkLatency(less).fit(fit_traces, fit_ms).predict(test_traces, CONFIDENCE)
    sums = predictor.terms(test_traces)[:, 0]
    rows = [
        scores("operators: table and correction", table.ms, measured, inside(table, measured), tiny),
        scores("operators of other networks, trees for the rest", trees.ms, measured, inside(trees, measured), tiny),
        scores("plain sum of the table", sums, measured, None, tiny),
        scores("multiply-adds", scaled(lambda t: t.macs, fit_traces, fit_ms, test_traces), measured, None, tiny),
        scores("parameters", scaled(lambda t: t.params, fit_traces, fit_ms, test_traces), measured, None, tiny),
    ]
    titles = ["predictor", "Spearman, all", "median error", "Spearman, FBNet-tiny", "median error", "Spearman, timm",
              "median error", "inside 90 % interval"]  # fmt: skip
    show(f"{tiny} FBNet-tiny networks and {len(models)} of timm, batch 1, {options.threads} thread(s)", titles, rows)
    unseen = [o for t in test_traces for o in t.operators if o.call not in seen and o.call in profile.ms]
    unique = list({o.call: o for o in unseen}.values())
    guessed = OperatorPrices(less).guess(unique) / np.array([profile.ms[o.call] for o in unique]) - 1
    console.print(
        f"{len(profile.ms):,} operators profiled in {profile_s:.0f} s; networks measured in {measure_s:.0f} s"
    )
    console.print(f"trees on {len(unique):,} operators they never saw: median error {np.median(np.abs(guessed)):.1%}")
    console.print(f"correction: {predictor.correction}")
    names = [*(f"fbnet-tiny {i}" for i in range(tiny)), *models]
    networks = [
        {"name": n, "measured_ms": float(m), "predicted_ms": float(p), "low_ms": float(a), "high_ms": float(b)}
        for n, m, p, a, b in zip(names, measured, table.ms, table.low_ms, table.high_ms, strict=True)
    ]
    write_json(
        options.json, facts, rows=[dict(zip(titles, row, strict=False)) for row in rows], networks=networks,
        profile={"operators": len(profile.ms), "failed": dict(profile.failed), "seconds": profile_s},
        correction=predictor.correction, trees_median_error=float(np.median(np.abs(guessed))),
    )  # fmt: skip


def inside(prediction: Any, measured: np.ndarray) -> np.ndarray:
    return (prediction.low_ms <= measured) & (measured <= prediction.high_ms)


if __name__ == "__main__":
    main()
