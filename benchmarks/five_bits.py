"""ResNet-20 of CIFAR-10 with weights of 4 and 8 bits, 5 on average: what is lost, by how it is recovered.

HAWQ-V3 chooses the widths; first convolution and classifier have 8 bits. Inputs of layers are left in float, or have
the bits of the weights. Points of accuracy lost on the test part, paired: against the checkpoint as it comes, and for
the rows with fine-tuning against the checkpoint after the same.

    python benchmarks/five_bits.py [--quick]                # needs ARCHFRONT_DATA
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from machine import machine, show, write_json

from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.fine_tuning import FineTuning
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.datasets.dataset import load
from archfront.search.recipes.hawq_v3 import HawqV3
from archfront.spaces.policies.bits import Bits

MODEL = {
    "name": "cifar-resnet", "depth": 20, "normalisation": "imagenet", "weights": "checkpoints/resnet20-12fca82f.th"
}  # fmt: skip
AVERAGE = 5
COLUMNS = ["inputs", "recovery", "MiB", "accuracy %", "points lost", "std", "seconds"]
STEPS: dict[str, list[dict[str, Any]]] = {
    "nearest rounding": [],
    "batch-norm": [{"name": "batch-norm"}],
    "gptq": [{"name": "gptq"}],
    "adaround, blocks": [{"name": "adaround", "steps": 1000}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and steps: a smoke test")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    facts = machine()
    data = load({"name": "cifar10"}, 32, 3)
    count = 100 if options.quick else None
    tuning = FineTuning(epochs=1, images=512 if options.quick else 20_000)
    rows: list[list[Any]] = []
    for inputs in ("float", "follow"):
        space = Bits(
            model=MODEL, weights=[4, 8], activations=inputs, keep={"conv1": 8, "linear": 8}, ranges="mse"  # type: ignore[arg-type]
        )  # fmt: skip
        network = Compressible(space, data, 256)
        low, high = (space.bit_costs(space.from_json([[b] * len(space.columns)]))["model_mb"][0] for b in (4, 8))
        budget = low + (AVERAGE - 4) / 4 * (high - low)
        recipe = HawqV3()
        if options.quick:
            HawqV3.images = 32
        [(genotype, found)] = recipe.policies(network, [{"model_mb": budget}])
        policy = space.variant(genotype)
        settings: list[tuple[str, dict[str, Any]]] = []
        for name, steps in STEPS.items():
            small = [{**step, "steps": 5} if options.quick and "steps" in step else step for step in steps]
            settings.append((name, {"recovery": [RECOVERIES.build(step, "recovery") for step in small]}))
        settings.append(("fine-tuning, 20,000 images once", {"fine_tuning": tuning}))
        for name, arguments in settings:
            begun = time.perf_counter()
            one = Compressible(space, data, 256, **arguments)
            [judged] = one.judged("test", [policy], count)
            rows.append(
                [
                    inputs,
                    name,
                    found.costs["model_mb"],
                    judged.accuracy,
                    judged.drop,
                    judged.drop_std,
                    time.perf_counter() - begun,
                ]
            )
            # Each row takes minutes: none is lost when the run is stopped.
            write_json(options.json, facts, rows=[dict(zip(COLUMNS, row, strict=True)) for row in rows])
    show(f"ResNet-20, W4/W8 at {AVERAGE} bits on average", COLUMNS, rows)


if __name__ == "__main__":
    main()
