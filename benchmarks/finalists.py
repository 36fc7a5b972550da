"""Finalists on this processor: does what a policy promised come true as a file?

Two vision transformers (MNIST; as wide as DeiT-S and DeiT-Ti) and an FBNet (CIFAR-10) are trained here; a search over
bit widths goes by predicted latency, its finalists are measured on every backend against the network itself on its
fastest backend in float32, and 30 random policies tell how well predicted ranks hold. Then, measured together: a
ResNet-20 with half the channels of its blocks, of all or but the first stage, alone and in int8, beside policies of
8, 4, 3 and 2 bits; and the narrower transformer with merged tokens.

    python benchmarks/finalists.py [--quick] [--work FOLDER] [--only vit vit-192 tokens resnet20 fbnet]

Needs ``ARCHFRONT_DATA``, ``archfront[onnx]``, and OpenVINO for its rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, show
from safetensors.torch import save_file
from scipy.stats import spearmanr

import archfront
from archfront.cli.benching import measured, served_backends
from archfront.db.queries import find_evaluation
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.datasets.dataset import load
from archfront.evaluators.deployment.deployed import deployed_items
from archfront.evaluators.deployment.int8_files import vnni
from archfront.evaluators.deployment.policy_latency import bits_of, int8_mask, mask_items
from archfront.evaluators.latency.measurement import Settings, measured_elsewhere, pace
from archfront.evaluators.latency.predictors.layers import FORMAT, LayerLatency
from archfront.evaluators.onnx_files import export_onnx
from archfront.evaluators.training_loop import Run
from archfront.evaluators.training_recipe import Recipe
from archfront.plugins import read_plugins
from archfront.search.job import Finalists
from archfront.search.plugins import load_plugins
from archfront.spaces.models.registry import MODELS
from archfront.spaces.policies.policy_chain import policies_of
from archfront.spaces.registry import SPACES

PLUGIN = Path(__file__).parents[1] / "tests" / "plugins" / "throw_away_policies.py"


@dataclass(frozen=True)
class Network:
    """A network whose policies are searched.

    Attributes:
        source, data: as in a job file.
        images, epochs: of its training.
        judged: validation images that a policy is judged by.
    """

    source: Mapping[str, Any]
    data: Mapping[str, Any]
    recipe: Recipe
    images: int
    epochs: int
    judged: int


FBNET = {"name": "fbnet", "resolution": 128, "classes": 10}
"""The paper's, for smaller pictures."""
TRANSFORMER = Recipe(optimizer="adamw", learning_rate=0.001, batch=128, augmentation="shift")

NETWORKS = {
    "vit": Network(
        {"name": "vit", "patch": 7, "depth": 4, "dim": 384, "heads": 6}, {"name": "mnist"}, TRANSFORMER, 20_000, 4, 1000
    ),
    "vit-192": Network(
        {"name": "vit", "patch": 7, "depth": 4, "dim": 192}, {"name": "mnist"}, TRANSFORMER, 20_000, 4, 1000
    ),
    "fbnet": Network(
        {"name": "network", "space": FBNET, "genotype": ["k3_e6"] * 22}, {"name": "cifar10"},
        Recipe(optimizer="sgd", learning_rate=0.1, batch=128), 12_000, 2, 100,
    ),
}  # fmt: skip
RESNET = {
    "name": "cifar-resnet", "depth": 20, "normalisation": "imagenet", "weights": "checkpoints/resnet20-12fca82f.th"
}  # fmt: skip
SETTINGS = Settings(rounds=60)
COLUMNS = ["network", "policy", "backend", "ms", "times as fast", "points lost, test", "packed MiB"]


def trained(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """A network's job-file mapping, with weights that are trained once."""
    network = NETWORKS[name]
    source, images, epochs = network.source, *((640, 1) if quick else (network.images, network.epochs))
    file = work / f"{name}.safetensors"
    if not file.exists():
        made = MODELS.build(source, "model")
        raw = load(network.data, made.resolution, made.in_channels)
        part = replace(raw, split={**raw.split, "train": raw.split["train"][:images]})
        run = Run(made.architecture, part, network.recipe, seed=0)
        for epoch in range(1, epochs + 1):
            run.train(epoch, epochs)
            print(f"  {name}: epoch {epoch} of {epochs}, loss {run.loss:.3f}", flush=True)
        save_file({key: value.detach().contiguous() for key, value in run.model.state_dict().items()}, file)
    return {**source, "weights": str(file)}


def searched(name: str, model: dict[str, Any], work: Path, quick: bool) -> tuple[list[list[Any]], dict[str, Any]]:
    """Rows of the finalists of a search over bits, and how predicted and measured ranks agree."""
    config = {"name": "bits", "model": model, "weights": [4, 8, 32], "activations": "follow"}
    space = SPACES.build(config, "space")
    db = work / f"{name}.db"
    for old in work.glob(f"{db.name}*"):
        old.unlink()
    job = archfront.run(
        {
            "name": name, "space": config, "data": NETWORKS[name].data,
            "evaluators": [
                {"name": "compression", "fidelities": [100 if quick else NETWORKS[name].judged]},
                {"name": "latency", "mode": "layers", "backend": "onnx-int8"},
            ],
            "objectives": [
                {"metric": "divergence", "direction": "min"}, {"metric": "latency_ms", "direction": "min"}
            ],
            "seeds": [space.genotype({s.id: 8 for s in space.sites})],  # type: ignore[attr-defined]
            "strategy": {"name": "surrogate-nsga2", "population": 20},
            "budget": {"evaluations": 20 if quick else 80}, "workers": {"executor": "process", "count": 1},
        },
        db=db,
    )  # fmt: skip
    plan = Finalists(count=1 if quick else 3, backends=_backends(), batches=[1], where="accuracy_drop <= 2")
    job.resume(bench=plan, accept_changes=lambda _: True, announce=print)
    rows = [_row(name, f"finalist {r['evaluation']}", r, None) for r in measured(job) if not r["error"]]
    return rows, ranked(name, job, space, quick)


def ranked(name: str, job: archfront.Job, space: Any, quick: bool) -> dict[str, Any]:
    """How predicted and measured ranks agree over a job's finalists and random policies."""
    with job.ledger.engine.connect() as connection:
        numbers = dict.fromkeys(str(r["evaluation"]) for r in measured(job))
        finalists = [find_evaluation(connection, job.id, number)["genotype"] for number in numbers]
    [content] = job.ledger.artifacts("latency", f"{FORMAT}:")
    return {"network": name, **ranks(space, LayerLatency.from_json(content), finalists, 5 if quick else 30)}


def ranks(space: Any, predictor: LayerLatency, finalists: Sequence[Any], count: int) -> dict[str, Any]:
    """Predicted and measured latency of finalists and random policies on the predictor's backend, and how long the
    network itself takes as torch exports it and as it is written for ONNX Runtime."""
    bits = bits_of(space)
    drawn = space.to_json(space.sample_spread(np.random.default_rng(11), count))
    paths = [price.layer for price in predictor.layers]
    masks = int8_mask(bits, paths, [*finalists, *drawn])
    with tempfile.TemporaryDirectory() as folder:
        source, exported = Path(folder) / "float.onnx", Path(folder) / "exported.onnx"
        model = bits.source.build().eval()
        for file, own in ((source, True), (exported, False)):
            export_onnx(model, bits.source.example(2), file, any_batch=True, for_onnxruntime=own)
        items = mask_items(bits, source, paths, masks, backend="onnx-int8")
        items += [{**items[0], "file": str(file)} for file in (exported, source)]
        # A process places its memory by chance: of two the mean.
        timed = [measured_elsewhere(None, items, threads=1, settings=SETTINGS) for _ in range(2)]
    found = predictor.predict(masks)
    paces = [pace(environment, predictor.probe_ms) for _, environment in timed]
    ms = np.mean([[share * t.median_ms for t in ts] for share, (ts, _) in zip(paces, timed, strict=True)], axis=0)
    quiet = np.mean([[share * t.quiet_ms for t in ts] for share, (ts, _) in zip(paces, timed, strict=True)], axis=0)
    itself, ms, quiet = ms[-2:], ms[:-2], quiet[:-2]
    return {
        "float32 as exported, ms": float(itself[0]), "float32, ms": float(itself[1]),
        "policies": len(ms), "least ms": float(ms.min()), "most ms": float(ms.max()),
        "Spearman": float(spearmanr(found.ms, ms)[0]), "Spearman, undisturbed": float(spearmanr(found.ms, quiet)[0]),
        "median error, undisturbed": float(np.median(np.abs(found.ms / quiet - 1))),
        "predicted_ms": found.ms.tolist(), "measured_ms": ms.tolist(), "quiet_ms": quiet.tolist(),
    }  # fmt: skip


def together(name: str, space: Any, data: Mapping[str, Any], policies: Mapping[str, Any]) -> list[list[Any]]:
    """Policies by name, as files on every backend, measured together with the network itself."""
    made = load(data, space.resolution, space.in_channels)
    network = Compressible(policies_of(space, name), made, 256)
    backends = [b for b in _backends() if b != "onnx-int8-dynamic" or name == "tokens"]
    floats = [b for b in backends if "int8" not in b]
    items = [{"untouched": True, "backend": backend} for backend in floats]
    items += [{"genotype": genotype, "backend": backend} for genotype in policies.values() for backend in backends]
    names = [name for name in policies for _ in backends]
    with tempfile.TemporaryDirectory() as folder:
        given, facts = deployed_items(network, items, Path(folder), 1)
        timings, _ = measured_elsewhere(None, given, threads=1, settings=SETTINGS)
    base = min(t.median_ms for t in timings[: len(floats)])
    rows = [["", "the network itself", b, t.median_ms, base / t.median_ms, 0.0, None]
            for b, t in zip(floats, timings, strict=False)]  # fmt: skip
    for policy, item, timing, known in zip(names, items[len(floats) :], timings[len(floats) :], facts[len(floats) :],
                                           strict=True):  # fmt: skip
        if timing.error is None:
            size = network.costs(network.space.variant(item["genotype"]), 0)["model_mb"]
            rows.append(["", policy, item["backend"], timing.median_ms, base / timing.median_ms,
                         known["test_accuracy_drop"], size])  # fmt: skip
    return [[name, *row[1:]] for row in rows]


def pruned_resnet() -> list[list[Any]]:
    """Channels and bits: half of the channels between the convolutions of blocks, and 8, 4, 3 and 2 bits.

    Kernels of int8 take 16 channels at a time: the first stage has no more to give.
    """
    config = {
        "name": "joint",
        "parts": {
            "pruned": {"name": "pruned-channels", "model": RESNET, "shares": [0.5, 1.0]},
            "bits": {"name": "bits", "model": RESNET, "weights": [2, 3, 4, 8, 32], "activations": [8, 32]},
        },
    }
    space: Any = SPACES.build(config, "space")
    chain = policies_of(space, "resnet20")

    def policy(stages: Sequence[str], bits: int) -> Any:
        pruned = tuple(f"pruned.{stage}" for stage in stages)
        choices: dict[str, float] = {}
        for site in chain.sites:
            if site.kind == "channels":
                choices[site.id] = 0.5 if site.id.startswith(pruned) else 1.0
            else:
                choices[site.id] = bits if site.kind == "weight-bits" else min(max(bits, 8), 32)
        return chain.genotype(choices)

    every, later = ("layer1", "layer2", "layer3"), ("layer2", "layer3")
    named = {
        f"half the channels{where}{width}": policy(stages, bits)
        for where, stages in (("", every), (" but in the first stage", later))
        for width, bits in (("", 32), (", 8 bits", 8))
    }
    named |= {f"{bits} bits (in int8)": policy((), bits) for bits in (8, 4, 3, 2)}
    return together("resnet20", space, {"name": "cifar10"}, named)


def merged_tokens(model: dict[str, Any]) -> list[list[Any]]:
    """Two pairs of tokens merged before each block, alone and in int8."""
    config = {
        "name": "joint",
        "parts": {
            "tokens": {"name": "merge-schedule", "model": model, "pairs": [2, 0]},
            "bits": {"name": "bits", "model": model, "weights": [8, 32], "activations": "follow"},
        },
    }
    space: Any = SPACES.build(config, "space")
    chain = policies_of(space, "tokens")

    def policy(pairs: int, bits: int) -> Any:
        return chain.genotype({s.id: pairs if s.kind == "tokens" else bits for s in chain.sites})

    own, less = (chain.cost_table(chain.from_json([policy(pairs, 32)]))["macs"][0] for pairs in (0, 2))
    named = {f"2 pairs merged a block: {own / less:.2f} times fewer operations": policy(2, 32),
             "2 pairs merged, 8 bits": policy(2, 8), "8 bits": policy(0, 8)}  # fmt: skip
    return together("tokens", space, {"name": "mnist"}, named)


def _row(network: str, policy: str, row: Mapping[str, Any], size: float | None) -> list[Any]:
    ratio = row["baseline"]["median_ms"] / row["median_ms"] if row.get("baseline") else None
    return [network, policy, row["backend"], row["median_ms"], ratio, row.get("test_accuracy_drop"), size]


def _backends() -> list[Any]:
    return [b for b in served_backends(policies=True) if b.startswith(("onnx", "openvino"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of everything: a smoke test")
    parser.add_argument("--only", nargs="+", default=["vit", "vit-192", "tokens", "resnet20", "fbnet"])
    parser.add_argument("--work", type=Path, default=Path("finalists"), help="folder for weights and searches")
    parser.add_argument("--ranks", action="store_true", help="measure the ranks again, of searches in --work")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    facts = {**machine(), "vnni": vnni()}
    options.work.mkdir(parents=True, exist_ok=True)
    load_plugins(read_plugins([str(PLUGIN)]))
    if options.ranks:
        content = json.loads(options.json.read_text())
        jobs = [archfront.Job(options.work / f"{name}.db", "last") for name in options.only if name in NETWORKS]
        content["ranks"] = [ranked(j.name, j, SPACES.build(j.spec["space"], "space"), options.quick) for j in jobs]
        options.json.write_text(json.dumps(content, indent=2) + "\n")
        _show_ranks(content["ranks"])
        return
    rows: list[list[Any]] = []
    agreements: list[dict[str, Any]] = []
    for name in options.only:
        if name in NETWORKS:
            found, agreement = searched(name, trained(name, options.work, options.quick), options.work, options.quick)
            rows += found
            agreements.append(agreement)
        elif name == "resnet20":
            rows += pruned_resnet()
        else:
            rows += merged_tokens(trained("vit-192", options.work, options.quick))
        content = {"rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows], "ranks": agreements}
        options.json.write_text(json.dumps({"machine": facts, **content}, indent=2) + "\n")
    show("Finalists as files, batch 1, one thread", COLUMNS, rows)
    _show_ranks(agreements)


def _show_ranks(agreements: Sequence[Mapping[str, Any]]) -> None:
    if agreements:
        keys = [key for key in agreements[-1] if not key.endswith("_ms")]
        show("Predicted and measured latency, onnx-int8", keys, [[one[key] for key in keys] for one in agreements])


if __name__ == "__main__":
    main()
