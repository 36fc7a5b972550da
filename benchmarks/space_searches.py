"""A search on each space, and evolution from known networks against chance on einspace, on real data.

Two parts, both of handwritten digits that scikit-learn ships, upsampled where a space wants larger images:

- ``spaces``: one job for each space of the table, through the whole stack;
- ``einspace``: RE(Mix) and random search with several seeds of the random generator, and the seed networks alone;
  the hypervolume of (validation accuracy, parameters) after so many evaluations.

    python benchmarks/space_searches.py [--parts spaces,einspace] [--evaluations 150] [--seeds 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, show, write_json
from scipy import stats

import archfront
from archfront.db.dominance import hypervolume
from archfront.report.drawing import draw
from archfront.spaces.registry import SPACES

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "winners"
ACCURACY = {"metric": "accuracy", "direction": "max"}
PARAMS = {"metric": "params", "direction": "min"}
COSTS = {"name": "costs"}
IMAGES = {"in_channels": 1, "resolution": 8}
NSGA2 = {"name": "nsga2", "population": 12}
EVOLUTION = {"name": "regularized-evolution", "population": 16, "sample": 4}
ANCHORS = ("resnet", "mobilenet", "efficientnet")
LARGEST = 12_000_000
"""Parameters at which a network is worth nothing; ResNet-18 has 11.2 million."""

EINSPACE = {"name": "einspace", **IMAGES, "params": LARGEST, "macs": 60_000_000, "activations": 1_000_000}
SEEDS = ["resnet18", "wrn16_4", "transformer", "mixer"]


def training(epochs: int, **changes: Any) -> dict[str, Any]:
    return {"name": "training", "fidelities": [epochs], **changes}


def space_jobs() -> dict[str, dict[str, Any]]:
    """What differs between the jobs of the spaces."""
    bits = {"name": "choices", "columns": {"dropout": [0.0, 0.1], "smooth": [False, True]}}
    return {
        "fbnet-tiny": {"space": {"name": "fbnet-tiny"}, "evaluators": [training(3), COSTS]},
        "nasbench201": {
            "space": {"name": "nasbench201", "channels": 8, "cells": 1, **IMAGES},
            "evaluators": [training(4), COSTS],
        },
        "nasnet": {
            "space": {"name": "nasnet", "filters": 8, "cells": 1, "stages": 2, "blocks": 3, **IMAGES},
            "evaluators": [training(4), COSTS],
        },
        "scaled": {
            "space": {
                "name": "scaled", "family": "timm:mobilenetv3_small_050", "resolutions": [24, 32, 40],
                "classes": 10, "in_channels": 1, "resolution": 32,
            },
            "evaluators": [training(4), COSTS],
        },
        "evonorm": {
            "space": {"name": "evonorm", **IMAGES},
            "evaluators": [{"name": "evonorm-protocols"}],
            "objectives": [{"metric": f"accuracy_{name}", "direction": "max"} for name in ANCHORS],
            "constraints": ["rejected <= 0"],
            "strategy": {**EVOLUTION, "winner": "front"},
            "seeds": ["bn-relu"],
        },
        "skan": {
            "space": {"name": "skan", "kind": "conv", "widths": [8, 16], **IMAGES},
            "evaluators": [training(4), COSTS],
        },
        "einspace": {
            "space": {**EINSPACE, "params": 200_000, "macs": 5_000_000}, "evaluators": [training(4), COSTS],
            "strategy": EVOLUTION,
        },
        "tabular": {"space": {"name": "tabular"}, "evaluators": [training(6), COSTS], "strategy": EVOLUTION},
        "joint": {
            "space": {"name": "joint", "parts": {"network": {"name": "fbnet-tiny"}, "rest": bits}},
            "evaluators": [training(3), COSTS],
        },
        "bounded": {
            "space": {"name": "bounded", "of": {"name": "fbnet-tiny"}, "macs": [1.0e6, 2.0e6]},
            "evaluators": [training(3), COSTS],
        },
    }  # fmt: skip


def job_of(name: str, evaluations: int, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "data": {"name": "digits"}, "objectives": [ACCURACY, PARAMS], "strategy": NSGA2,
        "budget": {"evaluations": evaluations}, "workers": {"count": 2, "executor": "process"}, "seed": seed,
    } | changes  # fmt: skip


def spaces(evaluations: int, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, changes in space_jobs().items():
        begun = time.perf_counter()
        job = archfront.run(job_of(name, evaluations, 0, **changes), db=folder / f"{name}.db")
        status, front = job.status(), job.front()
        first = job.spec["objectives"][0]["metric"]
        best = max(front, key=lambda row: row[first])
        row = {
            "space": name, "evaluations": status["evaluations"]["done"], "failed": status["evaluations"]["failed"],
            "front": len(front), "metric": first, "best": best[first], "params": best.get("params"),
            "genotype": best["genotype"], "config": changes["space"], "seconds": time.perf_counter() - begun,
        }  # fmt: skip
        print(f"{name}: {row['seconds']:.0f} s, best {first} {row['best']:.2f}", flush=True)
        rows.append(row)
    return rows


def searches() -> dict[str, dict[str, Any]]:
    mix = {"name": "regularized-evolution", "population": 100, "sample": 10, "random": 0}
    return {
        "RE(Mix)": {"strategy": mix, "seeds": SEEDS},
        "random": {"strategy": {"name": "random"}},
        "seeds alone": {"strategy": {"name": "random"}, "seeds": SEEDS, "budget": {"evaluations": len(SEEDS)}},
    }


def einspace(evaluations: int, seeds: int, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        for name, changes in searches().items():
            begun = time.perf_counter()
            evaluators = [training(2, batch=64, learning_rate=0.04), COSTS]
            spec = job_of(name, evaluations, seed, space=EINSPACE, evaluators=evaluators, **changes)
            job = archfront.run(spec, db=folder / f"{name}-{seed}.db")
            front = [(row["accuracy"], row["params"]) for row in job.front()]
            best = max(job.front(), key=lambda row: row["accuracy"])
            row = {
                "search": name, "seed": seed, "evaluations": job.status()["evaluations"]["done"],
                "hypervolume": volume(front, logarithmic=False), "hypervolume_log": volume(front, logarithmic=True),
                "accuracy": best["accuracy"], "params": best["params"], "genotype": best["genotype"], "front": front,
                "seconds": time.perf_counter() - begun,
            }  # fmt: skip
            print(f"{name}, seed {seed}: {row['seconds']:.0f} s, hypervolume {row['hypervolume']:.4f}", flush=True)
            rows.append(row)
    return rows


def volume(front: Sequence[tuple[float, float]], *, logarithmic: bool) -> float:
    """Share of the box between (0 %, ``LARGEST`` parameters) and (100 %, none; 10 if logarithmic) that is dominated."""
    points = np.array(front, dtype=np.float64)
    params = points[:, 1]
    size = np.log(np.maximum(params, 10) / 10) / math.log(LARGEST / 10) if logarithmic else params / LARGEST
    return hypervolume(np.stack([1 - points[:, 0] / 100, size], axis=1), np.ones(2))


def interval(values: Sequence[float]) -> str:
    """Mean and the half width of its 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean:.4f} ± {half:.4f}"


def pictures(found: dict[str, Any]) -> None:
    """Draw the most accurate network of each space, and of all of RE(Mix)."""
    winners = [(row["space"], row["config"], row["genotype"]) for row in found.get("spaces", [])]
    mixed = [row for row in found.get("einspace", []) if row["search"] == "RE(Mix)"]
    if mixed:
        winners.append(("einspace-mix", EINSPACE, max(mixed, key=lambda row: row["accuracy"])["genotype"]))
    PICTURES.mkdir(exist_ok=True)
    for name, config, genotype in winners:
        svg = str(draw(SPACES.build(config, "space").describe(genotype)))
        svg = svg.replace("<svg ", '<svg style="background:#fff" ', 1)
        (PICTURES / f"{name}.svg").write_text(f"{svg}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="spaces,einspace")
    parser.add_argument("--evaluations", type=int, default=150, help="of each search on einspace")
    parser.add_argument("--seeds", type=int, default=5, help="of the random generator")
    parser.add_argument("--each", type=int, default=40, help="evaluations of each space's job")
    parser.add_argument("--quick", action="store_true", help="a few evaluations each: a smoke test")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    each, evaluations, seeds = (6, 6, 1) if options.quick else (options.each, options.evaluations, options.seeds)
    facts = machine()
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    found.pop("machine", None)
    with tempfile.TemporaryDirectory() as folder:
        if "spaces" in options.parts:
            found["spaces"] = spaces(each, Path(folder))
        if "einspace" in options.parts:
            found["einspace"] = einspace(evaluations, seeds, Path(folder))
    if not options.quick:
        pictures(found)
    del facts["load_before"]  # accuracy and size do not depend on it
    columns = ("space", "evaluations", "failed", "front", "metric", "best", "params", "seconds")
    show("A search on each space", columns, [[row[c] for c in columns] for row in found.get("spaces", [])])
    table = []
    for name in searches():
        rows = [row for row in found.get("einspace", []) if row["search"] == name]
        if rows:
            measures = ("hypervolume", "hypervolume_log", "accuracy")
            table.append([name, rows[0]["evaluations"], *(interval([row[m] for row in rows]) for m in measures)])
    titles = ("einspace", "evaluations", "hypervolume", "over log parameters", "best accuracy, %")
    show(f"Means of {seeds} seeds, 95 % intervals", titles, table)
    write_json(options.json, facts, **found)


if __name__ == "__main__":
    main()
