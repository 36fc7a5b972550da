"""Latency predicted for backends that fuse operators: ONNX Runtime and torch.compile against eager torch.

Random networks of the FBNet-tiny space at batch 1, one thread. The operators are profiled eagerly and alone; the
correction is fitted to other networks that ran on the backend. In the same table: the eager sum as it is.

    python benchmarks/fused_latency.py [--quick] [--backends eager,onnx,compile]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency import CONFIDENCE, SPACE, traces_of
from machine import machine, show, write_json
from scipy.stats import spearmanr

from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.measurement import Settings, quiet_elsewhere
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.profile import Profile, profile_operators
from archfront.spaces.registry import SPACES


def scored(name: str, backend: str, ms: np.ndarray, measured: np.ndarray, inside: float | None) -> list[Any]:
    error = float(np.median(np.abs(ms / measured - 1)))
    return [backend, name, float(np.median(measured)), float(spearmanr(ms, measured)[0]), error, inside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few networks on ONNX Runtime: a smoke test")
    parser.add_argument("--backends", default="eager,onnx,compile")
    parser.add_argument("--tests", type=int, default=40)
    parser.add_argument("--others", type=int, default=24, help="networks that the correction is fitted to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    tests, others, backends = options.tests, options.others, options.backends.split(",")
    settings = Settings(rounds=15, sample_ms=3.0, warmup_ms=50.0)
    if options.quick:
        tests, others, backends = 4, 8, ["onnx"]
        settings = Settings(rounds=5, sample_ms=1.0)
    facts = machine()
    space = SPACES.build(SPACE, "space")
    rng = np.random.default_rng(1)
    genotypes = space.to_json(space.sample(rng, tests)) + space.to_json(space.sample_spread(rng, others))
    traces = traces_of(space, genotypes, [])  # type: ignore[arg-type]
    device = fingerprint(options.threads)
    empty = Profile(device=device.to_json(), threads=options.threads)
    profile = profile_operators([o for t in traces for o in t.operators], empty, timeout_s=900)
    sums = NetworkLatency(profile).predict(traces[:tests]).ms
    rows = []
    for backend in backends:
        begun = time.perf_counter()
        items = [{"genotype": genotype, "batch": 1, "backend": backend} for genotype in genotypes]
        ms, _ = quiet_elsewhere(SPACE, items, threads=options.threads, settings=settings, timeout_s=3600)
        seconds = time.perf_counter() - begun
        print(f"{backend}: {len(items)} networks measured in {seconds:.0f} s", flush=True)
        found = NetworkLatency(profile).fit(traces[tests:], ms[tests:]).predict(traces[:tests], CONFIDENCE)
        inside = float(((found.low_ms <= ms[:tests]) & (ms[:tests] <= found.high_ms)).mean())
        rows.append(scored("operators and correction", backend, found.ms, ms[:tests], inside))
        rows.append(scored("eager sum as it is", backend, sums, ms[:tests], None))
    columns = ["backend", "predictor", "median, ms", "Spearman", "median error", f"inside {CONFIDENCE:.0%} interval"]
    shown = [[*row[:2], f"{row[2]:.2f}", f"{row[3]:.3f}", f"{row[4]:.1%}", "" if row[5] is None else f"{row[5]:.0%}"]
             for row in rows]  # fmt: skip
    show("Latency of fused backends", columns, shown)
    write_json(options.json, facts, rows=[dict(zip(columns, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
