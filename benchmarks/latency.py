"""Latency on this processor, predicted from operators: against careful measurement, multiply-adds and parameters.

100 random networks of the FBNet-tiny space and 40 models of timm at batch 1, one thread. Their operators are profiled;
the correction from sums to networks is fitted to other networks, of the space for the space and of timm for timm, as a
job does; then all are measured in fresh processes, and compared. "Trees for the rest" is the same with a profile that
holds the operators of those other networks alone.

    python benchmarks/latency.py [--quick] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, show, write_json
from rich.console import Console
from scipy.stats import spearmanr

from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.measurement import Settings, quiet_elsewhere
from archfront.evaluators.latency.network_profile import MOST_RANDOM, NETWORKS
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
OTHER_MODELS = (
    "resnet34", "resnext50_32x4d", "mobilenetv2_050", "efficientnet_lite0", "mnasnet_small", "regnetx_004",
    "regnety_002", "convnext_pico", "vit_tiny_r_s16_p8_224", "deit_small_patch16_224", "mixer_s16_224", "pvt_v2_b1",
    "poolformerv2_s12", "mobilevit_xs", "ghostnet_050", "repvgg_b0", "hardcorenas_a", "tinynet_c", "lcnet_050",
    "edgenext_x_small", "resnet14t", "resnet32ts", "mobilenetv2_140", "mobilenetv3_rw", "efficientnet_es",
    "efficientnet_b2_pruned", "fbnetv3_b", "mnasnet_050", "ghostnet_130", "regnetx_006", "regnety_008",
    "densenetblur121d", "dla34", "hrnet_w18_small_v2", "repvgg_a1", "convnextv2_atto", "vit_tiny_patch16_384",
    "deit3_small_patch16_224", "levit_192", "rexnet_130",
)  # fmt: skip
QUICK_MODELS = ("mobilenetv3_small_050", "tinynet_e", "lcnet_035", "mnasnet_small", "mobilenetv2_035", "regnetx_002",
                "lcnet_100", "tinynet_d", "ghostnet_050")  # fmt: skip
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


def measure_all(
    items: Sequence[dict[str, Any]], threads: int, settings: Settings, processes: int, probe_ms: float | None
) -> np.ndarray:
    """``(n,)`` ms, undisturbed, at the profile's pace: of several processes the least, since load only ever adds."""
    times = np.full((2 * processes, len(items)), np.nan)
    small = [i for i, item in enumerate(items) if "genotype" in item]
    large = [i for i, item in enumerate(items) if "model" in item]
    # A process shifts all its figures alike, so what is fitted and what is tested is measured together.
    count = max(1, len(large) // 8)
    chunks = [small, *(large[i::count] for i in range(count))]
    for process in range(2 * processes):
        # Small ones take little time, and are the more disturbed.
        for chunk in chunks if process < processes else [small]:
            times[process, chunk], _ = quiet_elsewhere(
                SPACE, [items[i] for i in chunk], threads=threads, settings=settings, timeout_s=900, probe_ms=probe_ms
            )
    return np.nanmin(times, axis=0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Networks of one kind: those to predict, and others that the correction is fitted to, of which some are such as
    will be asked for, and give the intervals."""

    tests: Sequence[Trace]
    test_ms: np.ndarray
    others: Sequence[Trace]
    other_ms: np.ndarray
    alike: Sequence[bool]


Fitted = Callable[[Part], Any]


def operators_of(profile: Profile) -> Fitted:
    return lambda part: (
        NetworkLatency(profile).fit(part.others, part.other_ms, part.alike).predict(part.tests, CONFIDENCE)
    )


def counted(count: Callable[[Trace], float]) -> Fitted:
    """A count as a predictor: a line with the least squared relative errors on the other networks."""

    def fitted(part: Part) -> np.ndarray:
        design = np.array([[1.0, count(t)] for t in part.others]) / part.other_ms[:, None]
        weights = np.linalg.lstsq(design, np.ones(len(part.other_ms)), rcond=None)[0]
        return np.maximum(np.array([[1.0, count(t)] for t in part.tests]) @ weights, 1e-3)

    return fitted


def scores(name: str, parts: Sequence[Part], predictions: Sequence[Any]) -> list[Any]:
    """Spearman and median error of all and of each part, and how many lie inside of their intervals."""
    measured = [part.test_ms for part in parts]
    predicted = [getattr(p, "ms", p) for p in predictions]
    row: list[Any] = [name]
    for one, other in [(np.concatenate(predicted), np.concatenate(measured)), *zip(predicted, measured, strict=True)]:
        row += [float(spearmanr(one, other)[0]), float(np.median(np.abs(one / other - 1)))]
    for_all = [
        (p.low_ms <= m) & (m <= p.high_ms) for p, m in zip(predictions, measured, strict=True) if hasattr(p, "ms")
    ]
    return [*row, float(np.concatenate(for_all).mean()) if for_all else None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few networks: a smoke test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="that measure every network")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    facts, console = machine(), Console()
    tiny, spread, randoms, models, other_models = 100, NETWORKS, MOST_RANDOM, TEST_MODELS, OTHER_MODELS
    settings = Settings(rounds=15, sample_ms=3.0, warmup_ms=50.0)
    if options.quick:
        tiny, spread, randoms, models, other_models = 4, 6, 10, ("lcnet_050", "lcnet_075"), QUICK_MODELS
        settings = Settings(rounds=5, sample_ms=1.0)
    space = SPACES.build(SPACE, "space")
    assert isinstance(space, FBNet)
    tests = space.to_json(space.sample(np.random.default_rng(0), tiny))
    rng = np.random.default_rng(1)
    others = space.to_json(space.sample_spread(rng, spread)) + space.to_json(space.sample(rng, randoms))
    small, large = traces_of(space, [*tests, *others], []), traces_of(space, [], [*models, *other_models])
    start = time.perf_counter()
    profile = profile_operators(
        [o for t in (*small, *large) for o in t.operators],
        Profile(device=fingerprint(options.threads).to_json(), threads=options.threads),
        observe=lambda p: console.print(f"profiled {p.done:,} of {p.total:,} operators", highlight=False),
    )
    profile_s = time.perf_counter() - start
    start = time.perf_counter()
    items = [{"genotype": g} for g in (*tests, *others)] + [{"model": f"timm:{m}"} for m in (*models, *other_models)]
    times = measure_all(items, options.threads, settings, options.processes, profile.probe_ms)
    measure_s = time.perf_counter() - start

    small_ms, large_ms = times[: len(small)], times[len(small) :]
    parts = [
        Part(tests=traces[:count], test_ms=ms[:count], others=traces[count:], other_ms=ms[count:], alike=alike)
        for traces, ms, count, alike in (
            (small, small_ms, tiny, [False] * spread + [True] * randoms),
            (large, large_ms, len(models), [True] * len(other_models)),
        )
    ]
    seen = {o.call for part in parts for t in part.others for o in t.operators}
    less = replace(profile, ms={c: v for c, v in profile.ms.items() if c in seen})
    plain = [NetworkLatency(profile).terms(part.tests)[:, 0] for part in parts]
    predictors: list[tuple[str, Fitted]] = [
        ("operators: table and correction", operators_of(profile)),
        ("operators of the other networks, trees for the rest", operators_of(less)),
        ("multiply-adds", counted(lambda t: t.macs)),
        ("parameters", counted(lambda t: t.params)),
    ]
    found = {name: [fitted(part) for part in parts] for name, fitted in predictors}
    rows = [scores(name, parts, predictions) for name, predictions in found.items()]
    rows.insert(2, scores("plain sum of the table", parts, plain))
    titles = ["predictor", "Spearman, all", "median error, all", "Spearman, FBNet-tiny", "median error, FBNet-tiny",
              "Spearman, timm", "median error, timm", "inside 90 % interval"]  # fmt: skip
    show(f"{tiny} FBNet-tiny networks and {len(models)} of timm, batch 1, {options.threads} thread(s)", titles, rows)
    unseen = [
        o for part in parts for t in part.tests for o in t.operators if o.call not in seen and o.call in profile.ms
    ]
    unique = list({o.call: o for o in unseen}.values())
    guessed = OperatorPrices(less).guess(unique) / np.array([profile.ms[o.call] for o in unique]) - 1
    console.print(
        f"{len(profile.ms):,} operators profiled in {profile_s:.0f} s; networks measured in {measure_s:.0f} s"
    )
    console.print(f"trees on {len(unique):,} operators they never saw: median error {np.median(np.abs(guessed)):.1%}")
    names = [*(f"fbnet-tiny {i}" for i in range(tiny)), *models]
    table = found["operators: table and correction"]
    columns = [np.concatenate([getattr(p, field) for p in table]) for field in ("ms", "low_ms", "high_ms")]
    measured = np.concatenate([part.test_ms for part in parts])
    networks = [
        dict(zip(("name", "measured_ms", "predicted_ms", "low_ms", "high_ms"), row, strict=True))
        for row in zip(names, measured.tolist(), *(column.tolist() for column in columns), strict=True)
    ]
    write_json(
        options.json, facts, rows=[dict(zip(titles, row, strict=True)) for row in rows], networks=networks,
        profile={"operators": len(profile.ms), "failed": dict(profile.failed), "seconds": profile_s},
        measured_s=measure_s, trees_median_error=float(np.median(np.abs(guessed))),
        terms={"others": [NetworkLatency(profile).terms(part.others).tolist() for part in parts],
               "others_ms": [part.other_ms.tolist() for part in parts],
               "tests": [NetworkLatency(profile).terms(part.tests).tolist() for part in parts]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
