"""How fast latencies are predicted: a population matrix of the published FBNet space (22 layers), on one core.

Goals: 1,000,000 genotypes a second by the table of blocks, 20,000 by operators that trees price.

    python benchmarks/prediction_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine, show, write_json

from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.predictors.populations import BlockTerms
from archfront.evaluators.latency.profile import Profile
from archfront.evaluators.latency.space_traces import traced_genotypes
from archfront.evaluators.latency.table import Correction, LatencyTable
from archfront.spaces.fbnet import FBNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer genotypes: a smoke test")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    space, rng = FBNet(), np.random.default_rng(0)
    population = space.sample(rng, 20_000 if options.quick else 1_000_000)
    # Speed does not depend on the prices: they need no measurement here.
    blocks = {spec.descriptor: float(rng.random()) for spec in space.block_catalogue()}
    correction = Correction(intercept_ms=0.1, slope=1.1, relative_std=0.05, networks=16)
    device = fingerprint(1).to_json()
    table = LatencyTable(
        space=space.digest, device=device, batch=1, threads=1, backend="eager", blocks=blocks, correction=correction,
        fitted=[],
    )  # fmt: skip
    rows = []

    def timed(name: str, count: int, call: object, goal: int) -> None:
        assert callable(call)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        rows.append([name, count, count / sorted(times)[2], goal])

    timed("table of blocks", len(population), lambda: table.predict(space, population), 1_000_000)
    few = space.to_json(population[:40])
    traces = list(traced_genotypes(space, few))
    operators = {o.call: o for t in traces[:10] for o in t.operators}
    profile = Profile(
        device=device, threads=1, ms={c: 0.01 + o.macs / 1e8 for c, o in operators.items()},
        std_ms=dict.fromkeys(operators, 0.0),
        facts={c: (o.macs, o.read_bytes, o.written_bytes, o.weight_bytes) for c, o in operators.items()},
    )  # fmt: skip
    predictor = NetworkLatency(profile).fit(traces, np.linspace(1, 2, len(traces)))
    start = time.perf_counter()
    priced = BlockTerms(space, predictor)
    made_s = time.perf_counter() - start
    timed("operators and trees, blocks priced before", len(population), lambda: priced.ms(population), 20_000)

    def with_pricing() -> None:
        again = NetworkLatency.from_json(predictor.to_json())
        BlockTerms(space, again).ms(population)

    timed("the same, trees fitted and blocks priced anew", len(population), with_pricing, 20_000)
    timed("traces of networks, priced one by one", len(traces), lambda: predictor.predict(traces), 0)
    show("Predictions on one core", ("", "genotypes", "a second", "goal"), rows)
    print(f"pricing the {len(space.block_catalogue())} blocks of the space took {made_s:.2f} s")
    titles = ("name", "genotypes", "per_second", "goal")
    write_json(options.json, facts, rows=[dict(zip(titles, row, strict=True)) for row in rows], pricing_s=made_s)


if __name__ == "__main__":
    main()
