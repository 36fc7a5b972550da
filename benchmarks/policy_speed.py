"""How many compression policies a second: together, with shared prefixes, against each network built and run alone.

ResNet-20 (fresh weights, which cost the same) and the small vision transformer; random policies of 2, 4 and 8 bits and
those that a search proposes (mutants of one policy). Outputs are compared: they are equal bit for bit.

    python benchmarks/policy_speed.py [--quick] [--policies 200] [--images 256]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, show, write_json

from archfront.evaluators.compression.compressible import JUDGED_TOGETHER, Compressible
from archfront.evaluators.datasets.dataset import load
from archfront.spaces.policies.bits import Bits

MODELS = {"ResNet-20": {"name": "cifar-resnet", "depth": 20}, "small ViT": {"name": "vit"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few policies: a smoke test")
    parser.add_argument("--policies", type=int, default=200)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--alone", type=int, default=20, help="policies that are also run alone")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    policies, images, alone = options.policies, options.images, options.alone
    if options.quick:
        policies, images, alone = 8, 16, 3
    facts = machine()
    rows: list[list[Any]] = []
    for name, model in MODELS.items():
        space = Bits(model=model, weights=[2, 4, 8], activations="float")
        network = Compressible(space, load({"name": "digits"}, space.resolution, space.in_channels), 16)
        rng = np.random.default_rng(0)
        [parent] = space.sample(rng, 1)
        sets = {
            "random": space.sample(rng, policies),
            "mutants of one": space.mutate(rng, np.stack([parent] * policies)),
        }
        batches, _ = network.inputs("train", images, JUDGED_TOGETHER)
        for kind, population in sets.items():
            genotypes = space.to_json(population)
            bits = [space.layer_bits(genotype) for genotype in genotypes]
            network.outputs(batches[0][:2], bits)  # weights are quantised once
            begun = time.perf_counter()
            found = zip(*[network.outputs(batch, bits) for batch in batches], strict=True)
            together = policies / (time.perf_counter() - begun)
            begun = time.perf_counter()
            with torch.no_grad():
                models = [space.build(genotype).eval() for genotype in genotypes[:alone]]
                expected = [[model(batch) for batch in batches] for model in models]
            by_itself = alone / (time.perf_counter() - begun)
            # Equal to the bit but for what a processor with other work to do rounds otherwise.
            for one, other in zip(map(torch.cat, found), map(torch.cat, expected), strict=False):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
            sharing = network.sharing
            rows.append([name, kind, together, by_itself, together / by_itself, sharing.computed / sharing.layers])
    columns = ["model", "policies", "a second together", "alone", "ratio", "layers computed"]
    show(f"Policies on {images} images", columns, rows)
    write_json(options.json, facts, images=images, rows=[dict(zip(columns, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
