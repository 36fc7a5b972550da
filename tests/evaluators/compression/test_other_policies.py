"""Policies that are not of bits need no new machinery: spaces, scores, allocators, recovery, jobs and joint spaces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.small_models import DATA, RESNET, VIT, bits, digits, trained
from torch import nn

import archfront
from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.evaluator import Compression
from archfront.evaluators.compression.scores.distortion import Distortion
from archfront.evaluators.compression.scores.score import Subject
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.plugins import read_plugins
from archfront.search.allocators.linear_programme import Milp
from archfront.search.plugins import load_plugins
from archfront.search.policy_allocation import allocate
from archfront.spaces.joint import Joint
from archfront.spaces.policies.measured_costs import measured_costs
from archfront.spaces.policies.policy_chain import PolicyChain, policies_of
from archfront.spaces.policies.policy_space import PolicySpace
from archfront.spaces.registry import SPACES

PLUGIN = Path(__file__).parents[2] / "plugins" / "throw_away_policies.py"
RESNET20 = {"name": "cifar-resnet", "depth": 20}


@pytest.fixture(autouse=True)
def plugin() -> None:
    load_plugins(read_plugins([PLUGIN]))


def space_of(name: str, model: dict[str, Any], **options: Any) -> PolicySpace:
    made = SPACES.build({"name": name, "model": model, **options}, "space")
    assert isinstance(made, PolicySpace)
    return made


def metrics(space: Any, genotypes: list[Any], **options: Any) -> list[dict[str, float]]:
    tasks = [
        Task(number=i, genotype=g, key=str(i), fidelity=0, repeat=0, seed=0, final=False)
        for i, g in enumerate(genotypes)
    ]
    found = Compression(**options).evaluate(tasks, EvaluationContext(space=space, data=DATA))
    rows = []
    for one in found:
        assert isinstance(one, Evaluated), one
        rows.append({name: metric.value for name, metric in one.metrics.items()})
    return rows


def joint(model: str = "resnet") -> Joint:
    first = {"resnet": "pruned-channels", "vit": "merge-schedule"}[model]
    parts = {"first": {"name": first, "model": trained(model)}, "bits": {"name": "bits", "model": trained(model)}}
    return Joint(parts=parts)


@pytest.mark.parametrize(("name", "model"), [("pruned-channels", RESNET20), ("merge-schedule", dict(VIT))])
def test_the_identity_is_no_op_and_a_policy_works_on_a_copy(name: str, model: dict[str, Any]) -> None:
    space = space_of(name, model)
    network = space.source.build()
    example = torch.randn(2, *space.source.example().shape[1:])
    before = copy.deepcopy(network.state_dict())
    strongest = [column.choices[0] for column in space.columns]
    with torch.no_grad():
        own = network(example)
        assert torch.equal(space.apply(network, [column.choices[-1] for column in space.columns])(example), own)
        assert not torch.equal(space.apply(network, strongest)(example), own)
        assert torch.equal(network(example), own)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_pruned_channels_cost_what_is_left() -> None:
    space = space_of("pruned-channels", RESNET20)
    half, whole = (space.cost_table(space.from_json([[share] * 9])) for share in (0.5, 1.0))
    inner = sum(2 * 9 * width * width for width in (16, 32, 64) for _ in range(3))
    inner -= 9 * (16 * 32 + 32 * 64)  # the first block of a stage reads the narrower stage before
    norms = sum(2 * width for width in (16, 32, 64) for _ in range(3))
    assert whole["params"][0] - half["params"][0] == (inner + norms) / 2
    assert half["macs"][0] < 0.55 * whole["macs"][0]


def test_tokens_that_are_merged_cost_nothing_afterwards() -> None:
    space = space_of("merge-schedule", dict(VIT))
    none, some = (space.cost_table(space.from_json([[pairs]]))["macs"][0] for pairs in (0, 4))
    dim, tokens = VIT["dim"], 17
    per_token = 12 * dim * dim
    assert none - some == per_token * ((tokens - (tokens - 4)) + (tokens - (tokens - 8)))


def test_a_score_an_allocator_and_a_budget() -> None:
    """Costs do not add up: the channels of two sites never meet, so here they do, and the budget holds exactly."""
    space = space_of("pruned-channels", trained("resnet"))
    network = Compressible(space, digits(RESNET), 64)
    damage = Distortion(of="kl").checked(Subject.of(network, 64))
    assert all(row[-1] == 0 and (row[:-1] > 0).all() for row in damage)
    whole = space.cost_table(space.from_json([[1.0] * len(space.columns)]))["params"][0]
    genotype, found = allocate(space, damage, {"params": 0.7 * whole}, Milp())
    true = space.cost_table(space.from_json([genotype]))["params"][0]
    assert found.costs["params"] == true <= 0.7 * whole
    with pytest.raises(InputError, match=r"budget\.params.*is below.*Give"):
        allocate(space, damage, {"params": 0.01 * whole}, Milp())


def test_budgets_hold_where_costs_multiply() -> None:
    """Pruned and quantised weights: bits of fewer channels. The sum of both savings says too little is left."""
    chain = PolicyChain(joint())
    damage = [np.linspace(1, 0, len(site.domain)) for site in chain.sites]
    cheapest = {site.id: site.domain[0] for site in chain.sites}
    table = [chain.cost_table(chain.from_json([chain.genotype(p)])) for p in ({}, cheapest)]
    whole, least = (float(t["model_mb"][0]) for t in table)
    for limit in (least, 1.05 * least, 2 * least, least + 0.5 * (whole - least)):
        genotype, found = allocate(chain, damage, {"model_mb": limit}, Milp())
        true = float(chain.cost_table(chain.from_json([genotype]))["model_mb"][0])
        assert found.costs["model_mb"] == pytest.approx(true)
        assert 0.5 * limit < true <= limit * (1 + 1e-9)
    with pytest.raises(InputError, match=r"budget\.model_mb.*the smallest policy"):
        allocate(chain, damage, {"model_mb": 0.99 * least}, Milp())


def test_policies_join_in_the_order_of_the_parts() -> None:
    space = joint("vit")
    chain = policies_of(space, "the test")
    genotype = {"first": [4], "bits": [4] * len(bits("vit").columns)}
    network = chain.source.build()
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        found = chain.transform(copy.deepcopy(network), chain.variant(genotype), ())(images)
        merging, quantising = space.parts.values()
        assert isinstance(merging, PolicySpace)
        assert isinstance(quantising, PolicySpace)
        by_hand = quantising.apply(merging.apply(network, genotype["first"]), genotype["bits"])(images)
        assert torch.equal(found, by_hand)
        assert torch.equal(space.build(genotype).eval()(images), by_hand)
    [row] = metrics(space, [genotype])
    own = measured_costs(network, chain.source.example())
    assert row["macs"] < own["macs"]
    assert row["model_mb"] == pytest.approx(own["model_mb"] / 8)


def test_policies_of_different_models_do_not_go_together() -> None:
    parts = {
        "one": {"name": "pruned-channels", "model": trained("resnet")},
        "two": {"name": "bits", "model": dict(RESNET)},
    }
    with pytest.raises(InputError, match=r"space\.parts\.two\.model.*is not the model of one"):
        policies_of(Joint(parts=parts), "the test")
    parts["two"] = {"name": "fbnet-tiny"}
    with pytest.raises(InputError, match=r"space\.parts\.two\.name.*is no space of policies"):
        policies_of(Joint(parts=parts), "the test")


def test_layers_that_another_policy_took_out_are_left_out(tmp_path: Path) -> None:
    """The policy of the documentation, before bits; behind them it cannot be applied, which is said beforehand."""
    load_plugins(read_plugins([PLUGIN.parents[2] / "examples" / "my_policy.py"]))
    model = {"name": "cifar-resnet", "depth": 14}
    skip, low = {"name": "skipped-blocks", "model": model}, {"name": "bits", "model": model}
    space = Joint(parts={"skip": skip, "bits": low})
    chain = policies_of(space, "the test")
    cheapest = chain.genotype({site.id: site.domain[0] for site in chain.sites})
    [row] = metrics(space, [cheapest], calibration=16, images=64)
    assert row["macs"] < 0.5 * float(chain.cost_table(chain.from_json([chain.genotype({})]))["macs"][0])
    pruned = {"name": "pruned-channels", "model": model}
    backwards = Joint(parts={"bits": low, "prune": pruned})
    with pytest.raises(InputError, match=r"makes a network that fails.*order"):
        Compression(calibration=16).check(EvaluationContext(space=backwards, data=DATA))
    twice = Joint(parts={"one": low, "other": low})
    with pytest.raises(InputError, match="quantised already"):
        Compression(calibration=16).check(EvaluationContext(space=twice, data=DATA))


def test_layers_that_share_a_weight_are_counted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.third.weight = self.second.weight

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.third(self.second(self.first(features)))
            return found

    found = measured_costs(Tied(), torch.zeros(1, 6))
    assert found["macs"] == 6 * 4 + 2 * 16
    assert found["gbops"] == pytest.approx(56 * 1024 / 1e9)


def test_a_job_of_pruning_and_bits(tmp_path: Path) -> None:
    spec = {
        "name": "both",
        "space": joint().config | {"name": "joint"},
        "data": DATA,
        "evaluators": [{"name": "compression", "fidelities": [100], "recovery": [{"name": "batch-norm"}]}],
        "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": "size_bytes", "direction": "min"}],
        "strategy": {"name": "nsga2", "population": 6},
        "budget": {"evaluations": 12},
        "workers": {"executor": "process", "count": 1},
    }
    job = archfront.run(spec, db=tmp_path / "jobs.db", plugins=[PLUGIN])
    rows = list(job.front())
    assert job.status()["evaluations"]["done"] == 12
    assert len({row["size_bytes"] for row in rows}) > 1
    assert all({"params", "macs", "gbops"} <= set(row) for row in rows)
