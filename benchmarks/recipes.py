"""Every recipe at equal cost: against uniform and random policies, against itself with a random score, and against a
search with and without the recipes as its first candidates.

Weights of 2 to 8 bits, a scale for each channel, activations in float. The network itself is the checkpoint after an
epoch on the training part (ResNets), or trained here (the vision transformer, the decoder). Scores see training
images, the search sees validation images, the table is of test images: points of accuracy lost, paired, and the mean
Kullback-Leibler divergence from the network's own outputs. Rows are written as they come.

    python benchmarks/recipes.py MODEL [--quick] [--work FOLDER]          # resnet20, resnet56, vit, decoder

Needs ``ARCHFRONT_DATA`` for all but the decoder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, show
from recipes_report import plot
from safetensors.torch import save_file

import archfront
from archfront.db.queries import evaluation_rows
from archfront.evaluators.compression.compressible import Compressible, Judged
from archfront.evaluators.compression.fine_tuning import FineTuning
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.compression.scores.score import Score, Subject, Vector
from archfront.evaluators.datasets.dataset import load
from archfront.evaluators.training_loop import Run
from archfront.evaluators.training_recipe import Recipe as Training
from archfront.search.recipes.registry import RECIPES
from archfront.spaces.models.registry import MODELS
from archfront.spaces.policies.bits import Bits

WIDTHS = [2, 3, 4, 6, 8]
MEBI = 2**20


@dataclass(frozen=True)
class Study:
    """One model, and how much is spent on it.

    Attributes:
        source: job file's ``model``.
        keep: layers at 8 bits that are not chosen for.
        epochs: of training, or of the checkpoint's adaptation, which sees ``tuned_on`` images.
        test, validation: samples that policies are judged by.
        evaluations: of each search.
        recipes: that serve it.
        averages: bits that the budgets are, on average over the chosen layers.
    """

    source: Mapping[str, Any]
    data: Mapping[str, Any]
    keep: Sequence[str]
    epochs: int
    test: int
    validation: int
    evaluations: int
    recipes: Sequence[str]
    averages: Sequence[float] = (3, 3.5, 4, 5)
    training: Training | None = None
    steps: int = 300
    images: int = 256
    tuned_on: int | None = None


_CNN = ("hawq-v3", "augmented-hessians", "mixdq", "brecq", "zeroquant-v2", "leave-one-in", "layer-wise-quantization-zd")
_ALL = (*_CNN, "layer-wise-quantization")
_RESNET = {"name": "cifar-resnet", "normalisation": "imagenet"}
STUDIES = {
    "resnet20": Study(
        {**_RESNET, "depth": 20, "weights": "checkpoints/resnet20-12fca82f.th"},
        {"name": "cifar10"}, ("conv1", "linear"), 1, 2500, 500, 2000, _ALL,
    ),
    "resnet56": Study(
        {**_RESNET, "depth": 56, "weights": "checkpoints/resnet56-4bfd9763.th"},
        {"name": "cifar10"}, ("conv1", "linear"), 1, 2500, 500, 1000, _ALL, images=128, tuned_on=15_000,
    ),
    "vit": Study(
        {"name": "vit", "patch": 7, "depth": 4}, {"name": "mnist"}, ("patch_embed.proj", "head"), 4, 10_000, 1000, 1500,
        (*_ALL, "lrp-qvit"),
        training=Training(optimizer="adamw", learning_rate=0.002, batch=128, augmentation="shift"),
    ),
    "decoder": Study(
        {"name": "decoder", "dim": 64}, {"name": "text"}, ("head",), 15, 720, 300, 1500, (*_ALL, "rsq"),
        training=Training(optimizer="adamw", learning_rate=0.003, batch=32, augmentation="none", label_smoothing=0.0),
    ),
}  # fmt: skip


class RandomScore(Score):
    """What a recipe's own score is held against: sites are sensitive at random, fewer bits do more damage."""

    name = "random"

    def measure(self, subject: Subject) -> list[Vector]:
        rng = np.random.default_rng(subject.seed)
        return [rng.random() * 4.0 ** -np.array(site.domain, dtype=float) for site in subject.sites]


def trained(name: str, study: Study, work: Path, quick: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """The model with the weights that everything is measured from, made once; and its accuracies on test data."""
    file, facts = work / f"{name}.safetensors", work / f"{name}.json"
    model = {**study.source, "weights": str(file)}
    if not file.exists():
        source = MODELS.build(study.source, "model")
        data = load(study.data, source.resolution, source.in_channels)
        begun = time.perf_counter()
        found = {}
        if study.training is None:
            network = Compressible(Bits(model=dict(study.source)), data, 16)
            found["as it comes"] = accuracy(network.model, network)
            tuning = FineTuning(epochs=study.epochs, images=1000 if quick else study.tuned_on)
            tuned = tuning.tune(source.build(), network.model, data, network.normalised, 0)
        else:
            some = replace(data, split={**data.split, "train": data.split["train"][:640]}) if quick else data
            run = Run(source.architecture, some, study.training, seed=0)
            epochs = 1 if quick else study.epochs
            for epoch in range(1, epochs + 1):
                run.train(epoch, epochs)
                print(
                    f"  epoch {epoch} of {epochs}: loss {run.loss:.3f}, {time.perf_counter() - begun:,.0f} s",
                    flush=True,
                )
            network = Compressible(Bits(model=dict(study.source)), data, 16)
            tuned = run.model.eval()
        found["after training here"] = accuracy(tuned, network)
        save_file({key: value.detach().contiguous() for key, value in tuned.state_dict().items()}, file)
        facts.write_text(json.dumps(found))
    return model, json.loads(facts.read_text())


def accuracy(model: torch.nn.Module, network: Compressible) -> float:
    """Percent of the whole test part."""
    batches, labels = network.inputs("test")
    with torch.no_grad():
        right = torch.cat([model(batch).argmax(-1) for batch in batches]) == labels
    return 100 * float(right.double().mean())


class Trial:
    """One model's study."""

    def __init__(self, name: str, study: Study, work: Path, file: Path, quick: bool) -> None:
        self.name, self.study, self.work, self.file = name, study, work, file
        self.facts, self.begun = machine(), time.perf_counter()
        self.model, self.accuracies = trained(name, study, work, quick)
        self.space = self.bits()
        self.data = load(study.data, self.space.resolution, self.space.in_channels)
        self.network = self.compressible(self.space)
        self.budgets = {average: self.cost([self.nearest(average)])[0] for average in study.averages}
        self.workers = 2
        self.rows: list[dict[str, Any]] = []
        self.found: list[Any] = []

    def bits(self, **options: Any) -> Bits:
        return Bits(
            model=self.model, keep=dict.fromkeys(self.study.keep, 8), ranges="mse",
            **{"weights": WIDTHS, "activations": "float", **options},
        )  # fmt: skip

    def compressible(self, space: Bits, recovery: Sequence[Mapping[str, Any]] = ()) -> Compressible:
        steps = [{**step, "steps": self.study.steps} if step["name"] == "adaround" else step for step in recovery]
        made = [RECOVERIES.build(step, "recovery") for step in steps]
        return Compressible(space, self.data, 256, recovery=made)

    def cost(self, genotypes: Sequence[Any]) -> list[float]:
        found: list[float] = self.space.bit_costs(self.space.from_json(genotypes))["model_mb"].tolist()
        return found

    def nearest(self, average: float) -> list[int]:
        """The uniform policy just above, for whole averages; else bits in turn that come nearest to the average."""
        low = max(width for width in WIDTHS if width <= average)
        high = min(width for width in WIDTHS if width >= average)
        share = 0.0 if high == low else (average - low) / (high - low)
        chosen, due = [], 0.0
        sizes = self._sizes()
        done = 0.0
        for size in sizes:
            due += share * size
            chosen.append(high if done + size / 2 < due else low)
            done += size * (chosen[-1] == high and high != low)
        return chosen

    def _sizes(self) -> list[float]:
        at = np.array(
            self.cost(
                [[8 if i == j else 2 for j in range(len(self.space.columns))] for i in range(len(self.space.columns))]
            )
        )
        sizes: list[float] = (at - self.cost([[2] * len(self.space.columns)])[0]).tolist()
        return sizes

    def judge(self, genotypes: Sequence[Any], recovery: Sequence[Mapping[str, Any]] = ()) -> list[Judged]:
        network = self.network if not recovery else self.compressible(self.space, recovery)
        return network.judged("test", [self.space.variant(g) for g in genotypes], self.study.test)

    def add(self, kind: str, average: float, genotypes: Sequence[Any], **more: Any) -> None:
        judged = self.judge(genotypes)
        drops = [one.drop for one in judged]
        row = {
            "policy": kind, "average": average, "model_mb": float(np.mean(self.cost(genotypes))),
            "drop": float(np.mean(drops)), "least": min(drops), "most": max(drops), "std": judged[0].drop_std,
            "divergence": float(np.mean([one.divergence for one in judged])), **more,
        }  # fmt: skip
        self.rows.append(row)
        self.write()
        extent = f" ({row['least']:.2f} to {row['most']:.2f})" if len(drops) > 1 else ""
        after = f", {row['recovered']:.2f} after its recovery" if "recovered" in row else ""
        print(f"  {average:g} bits, {kind}: {row['drop']:.2f}{extent}{after}, {row['divergence']:.4f} nat", flush=True)

    def write(self) -> None:
        content = {"machine": self.facts, "accuracy": self.accuracies, "test": self.study.test, "rows": self.rows}
        seconds = time.perf_counter() - self.begun
        self.file.write_text(json.dumps({**content, "seconds": seconds}, indent=2) + "\n")

    def keep(self, rows: Sequence[dict[str, Any]], anew: Sequence[str]) -> None:
        """Go on from the rows of an earlier run, but for the searches and these recipes."""
        gone = {*anew, *(f"{name}, random score" for name in anew), "search", "search from the recipes"}
        self.rows = [row for row in rows if row["policy"] not in gone]
        self.found += [row["genotype"] for row in self.rows if "genotype" in row]

    def baselines(self, count: int) -> None:
        rng = np.random.default_rng(0)
        for average, budget in self.budgets.items():
            if average in WIDTHS:
                self.add("uniform", average, [[int(average)] * len(self.space.columns)])
            rows = self.space.sample_spread(rng, 20_000)
            costs = self.space.bit_costs(rows)["model_mb"]
            least = float(self.cost([[2] * len(self.space.columns)])[0])
            near = rows[(costs <= budget) & (costs > budget - 0.03 * (budget - 0.8 * least))][:count]
            if len(near):
                self.add("random", average, self.space.to_json(near))

    def recipe(self, name: str, draws: int) -> None:
        """One recipe at every budget: its own score, its recovery, and its allocator with random scores."""
        kind = RECIPES.get(name, "recipe")
        tie = {key: value for key, value in kind.space.items() if key == "tie"}
        network = self.compressible(self.bits(**tie)) if tie else self.network
        recipe = RECIPES.build({"name": name}, "recipe")
        kind.images = min(kind.images, self.study.images)
        begun = time.perf_counter()
        budgets = [{"model_mb": budget} for budget in self.budgets.values()]

        def chosen(seed: int) -> list[Any]:
            policies = recipe.policies(network, budgets, seed)
            return [self.space.genotype(network.space.policy(genotype)) for genotype, _ in policies]  # type: ignore[attr-defined]

        own = chosen(0)
        self.found += own
        recovered = [one.drop for one in self.judge(own, kind.recovery)] if kind.recovery else None
        recipe.score = RandomScore  # type: ignore[method-assign]
        drawn = [chosen(seed) for seed in range(draws)]
        for i, average in enumerate(self.budgets):
            more = {} if recovered is None else {"recovered": recovered[i]}
            self.add(name, average, [own[i]], **more, genotype=own[i])
            self.add(f"{name}, random score", average, [one[i] for one in drawn])
        print(f"  {name}: {time.perf_counter() - begun:,.0f} s", flush=True)

    def search(self, kind: str, seeds: Sequence[Any], evaluations: int) -> None:
        """A search over all policies by divergence on some validation data; of the sixteen best for a budget, the one
        that diverges least on all of it."""
        unique = [json.loads(text) for text in dict.fromkeys(map(json.dumps, seeds))]
        db = self.work / f"{self.name}-{kind.replace(' ', '-')}.db"
        for old in self.work.glob(f"{db.name}*"):
            old.unlink()
        spec = {
            "name": kind, "space": {"name": "bits", **self.space.config}, "data": self.study.data,
            "evaluators": [{"name": "compression", "fidelities": [self.study.validation]}],
            "objectives": [{"metric": "divergence", "direction": "min"}, {"metric": "model_mb", "direction": "min"}],
            "constraints": [
                f"model_mb <= {1.05 * max(self.budgets.values())}", f"model_mb >= {0.8 * min(self.budgets.values())}"
            ],
            "strategy": {"name": "surrogate-nsga2", "population": 40}, "seeds": unique,
            "budget": {"evaluations": evaluations}, "workers": {"executor": "process", "count": self.workers},
        }  # fmt: skip
        job = archfront.run(spec, db=db)
        with job.ledger.engine.connect() as connection:
            done = [row for row in evaluation_rows(connection, job.id, range(evaluations)) if row["metrics"]]
        done.sort(key=lambda row: row["metrics"]["divergence"])
        for average, budget in self.budgets.items():
            best = [row["genotype"] for row in done if row["metrics"]["model_mb"] <= budget * (1 + 1e-9)][:16]
            if not best:
                continue
            judged = self.network.judged("validation", [self.space.variant(genotype) for genotype in best], None)
            chosen = best[int(np.argmin([one.divergence for one in judged]))]
            self.add(kind, average, [chosen], genotype=chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=STUDIES)
    parser.add_argument("--quick", action="store_true", help="little of everything: a smoke test")
    parser.add_argument("--draws", type=int, default=4, help="random scores for each recipe and budget")
    parser.add_argument("--work", type=Path, default=Path("recipes"), help="folder for weights and searches")
    parser.add_argument("--recipes", nargs="*", help="these alone, and the searches: other rows stay as they were")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--workers", type=int, default=2, help="of the searches")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = STUDIES[options.model]
    if options.quick:
        few = {"test": 60, "validation": 30, "evaluations": 60, "averages": (4,), "steps": 5, "images": 16}
        study = replace(study, **few, recipes=("leave-one-in", study.recipes[-1]))
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.json or Path(__file__).with_name(f"recipes_{options.model}.json")
    trial = Trial(options.model, study, options.work, path, options.quick)
    trial.workers = options.workers
    print(f"{options.model}: {trial.accuracies}", flush=True)
    if options.recipes is not None and path.exists():
        trial.keep(json.loads(path.read_text())["rows"], options.recipes)
    else:
        trial.baselines(6)
    for name in study.recipes if options.recipes is None else options.recipes:
        trial.recipe(name, options.draws)
    trial.search("search", [], study.evaluations)
    trial.search("search from the recipes", trial.found, study.evaluations)
    table = [
        [
            row["policy"],
            row["average"],
            row["model_mb"],
            row["drop"],
            row["least"],
            row["most"],
            row["std"],
            row["divergence"],
            row.get("recovered"),
        ]
        for row in trial.rows
    ]
    columns = ["policy", "bits", "MiB", "points lost", "least", "most", "std", "divergence", "recovered"]
    show(f"{options.model}, {study.test:,} test samples", columns, table)
    plot(json.loads(path.read_text()), options.model, options.plot or options.work / f"recipes_{options.model}.png")


if __name__ == "__main__":
    main()
