"""Several spaces as one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
import torch
from ledger_dump import differences, dump
from torch import nn

import archfront
from archfront.db.ledger import Ledger
from archfront.errors import InputError
from archfront.evaluators.costs import Costs
from archfront.evaluators.evaluator import EvaluationContext, Task
from archfront.evaluators.training import ImageSpace
from archfront.interchange.registry import export_job
from archfront.search.driver import DriveOptions, drive, submit
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategy import Problem
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.choices import Choices
from archfront.spaces.counting import Costed
from archfront.spaces.fbnet import FBNetTiny
from archfront.spaces.grammars.tabular import Tabular
from archfront.spaces.joint import Joint
from archfront.spaces.product import ColumnSpace
from archfront.spaces.registry import SPACES
from archfront.spaces.space import Genotype

TRAINING: dict[str, Any] = {"name": "choices", "columns": {"lr": [0.01, 0.1], "cutout": [False, True], "size": [4, 8]}}


class Pruned(Choices):
    """A policy: drops some layers off a sequence's end."""

    name: ClassVar[str] = "pruned"

    def apply(self, module: nn.Module, genotype: Genotype) -> nn.Module:
        assert isinstance(module, nn.Sequential)
        return module[: len(module) - genotype[0]]


def joint(**more: Any) -> Joint:
    made = SPACES.build(
        {"name": "joint", "parts": {"network": {"name": "tabular", "params": 20_000}, "training": TRAINING}, **more},
        "space",
    )
    assert isinstance(made, Joint)
    return made


def test_product_spaces_together_are_one_matrix() -> None:
    made = Joint.of(
        {"network": FBNetTiny(layers=3), "training": Choices(columns={"lr": [0.1, 0.2], "kind": ["a", "b"]})}
    )
    assert isinstance(made, ColumnSpace)
    assert [column.name for column in made.columns[-3:]] == ["network.layer2", "training.lr", "training.kind"]
    assert [column.ordered for column in made.columns[-2:]] == [True, False]
    population = made.sample(np.random.default_rng(0), 5)
    assert population.shape == (5, 5)
    assert population.dtype == np.int16
    assert made.size == 9**3 * 4
    assert made.to_json(population)[0] == {
        "network": made.parts["network"].to_json(population[:1, :3])[0],
        "training": made.parts["training"].to_json(population[:1, 3:])[0],
    }
    assert not isinstance(joint(), ColumnSpace)


def test_keys_and_features_are_functions_of_the_parts() -> None:
    runs = FBNetTiny(layers=9)
    first = ["k3_e1", "skip", "k5_e1", *["k3_e3"] * 6]
    second = ["k3_e1", "k5_e1", "skip", *["k3_e3"] * 6]
    assert runs.keys(runs.from_json([first]))[0] == runs.keys(runs.from_json([second]))[0]
    made = Joint.of({"network": runs, "training": Choices(columns={"lr": [0.1, 0.2]})})
    genotypes = [{"network": n, "training": [lr]} for n in (first, second) for lr in (0.1, 0.2)]
    population = made.from_json(genotypes)
    keys = made.keys(population)
    assert keys[0] == keys[2] != keys[1] == keys[3]
    features = made.encode(population)
    assert np.array_equal(features[0], features[2])
    assert not np.array_equal(features[0], features[1])


@pytest.mark.parametrize("matrix", [True, False])
def test_each_decision_changes_as_often_as_in_one_product(matrix: bool) -> None:
    parts: dict[str, Any] = {
        "a": Choices(columns={f"c{i}": [1, 2] for i in range(9)}),
        "b": Choices(columns={"x": [1, 2]}),
    }
    if not matrix:
        parts["c"] = Tabular(params=2000)
    made = Joint.of(parts)
    parents = made.sample(np.random.default_rng(0), 1500)
    before, after = made.to_json(parents), made.to_json(made.mutate(np.random.default_rng(1), parents, 0.0))
    changed = {name: np.mean([x[name] != y[name] for x, y in zip(before, after, strict=True)]) for name in parts}
    # Exactly one part each. Ten decisions share the changes; a grammar has no number, so parts share them.
    assert sum(changed.values()) == pytest.approx(1)
    assert changed["b"] == pytest.approx(0.1 if matrix else 1 / 3, abs=0.03)
    after = made.to_json(made.mutate(np.random.default_rng(1), parents, 0.5))
    moved = np.mean(
        [sum(p != q for p, q in zip(x["a"], y["a"], strict=True)) for x, y in zip(before, after, strict=True)]
    )
    assert moved == pytest.approx(4.5, abs=0.8)


def test_children_take_parts_and_mix_them() -> None:
    made = joint()
    rng = np.random.default_rng(0)
    first = made.from_json([{"network": ["stack", "linear8", "relu"], "training": [0.01, False, 4]}] * 300)
    second = made.from_json([{"network": ["stack", "linear64", "tanh"], "training": [0.1, True, 8]}] * 300)
    children = made.to_json(made.crossover(rng, first, second))
    trainings = {tuple(child["training"]) for child in children}
    assert trainings == set(itertools.product([0.01, 0.1], [False, True], [4, 8]))
    # A mixed network beside either training.
    assert {("linear8" in c["network"], c["training"][0]) for c in children} == set(
        itertools.product([False, True], [0.01, 0.1])
    )
    assert any(c["network"] not in (["stack", "linear8", "relu"], ["stack", "linear64", "tanh"]) for c in children)


def conditional() -> Joint:
    return Joint.of(
        {
            "network": Tabular(params=2000),
            "training": Choices(columns=TRAINING["columns"]),
            "more": Tabular(params=1000),
        },
        when={"more": {"training.cutout": [True], "training.size": [8]}},
    )


def test_a_part_that_does_not_count_is_null() -> None:
    made = conditional()
    rng = np.random.default_rng(0)
    population = made.sample(rng, 400)
    population = np.concatenate(
        [population, made.mutate(rng, population), made.crossover(rng, population, population[::-1])]
    )
    genotypes = made.to_json(population)
    for genotype in genotypes:
        assert (genotype["more"] is None) == (genotype["training"][1:] != [True, 8])
    assert np.mean([g["more"] is not None for g in genotypes[:400]]) == pytest.approx(0.25, abs=0.1)
    given = {"network": "relu", "training": [0.1, False, 8], "more": "tanh"}
    [row] = made.to_json(made.from_json([given]))
    assert row == given | {"more": None}
    assert made.keys(made.from_json([given, given | {"more": None}]))[0] == made.keys(made.from_json([row]))[0]
    assert [layer.name.split(".")[0] for layer in made.describe(given)] == ["network", *["training"] * 3]
    with pytest.raises(InputError, match=r"genotype\.more: None is null although training\.cutout has one of \[True\]"):
        made.from_json([{"network": "relu", "training": [0.1, True, 8], "more": None}])
    with pytest.raises(InputError, match=r"genotype\.training\[1\] \(cutout\): 3 is not one"):
        made.from_json([{"network": "relu", "training": [0.1, 3, 8], "more": None}])
    with pytest.raises(InputError, match="Give a mapping with the keys network, training, more"):
        made.from_json([{"network": "relu"}])
    grown = made.mutate(rng, made.from_json([given] * 60), 0.0)
    # What comes to count is drawn, not the same for all.
    assert len({str(g["more"]) for g in made.to_json(grown) if g["more"] is not None}) > 2


def test_conditions_on_a_matrix_of_parts() -> None:
    training = Choices(columns={"a": [1, 2], "b": [1, 2]}, when={"b": {"a": [2]}})
    made = Joint.of(
        {"x": training, "y": Choices(columns={"c": [5, 6], "d": [7]}), "z": Choices(columns={"e": [1, 2]})},
        when={"y": {"x.b": [1]}, "z": {"y.c": [6]}},
    )
    rows = np.array(list(itertools.product([0, 1], [0, 1], [0, 1], [0], [0, 1])), dtype=np.int16)
    found = {str(genotype) for genotype in made.to_json(rows)}
    # b counts with its first choice inside the matrix where a is 1, but is null, so y is null as well.
    assert found == {
        "{'x': [1, None], 'y': None, 'z': None}",
        "{'x': [2, 2], 'y': None, 'z': None}",
        "{'x': [2, 1], 'y': [5, 7], 'z': None}",
        "{'x': [2, 1], 'y': [6, 7], 'z': [1]}",
        "{'x': [2, 1], 'y': [6, 7], 'z': [2]}",
    }
    assert len(set(made.keys(rows))) == len({row.tobytes() for row in made.encode(rows)}) == len(found)
    assert np.array_equal(made.folded(rows), made.from_json(made.to_json(rows)))
    assert made.active(rows).sum() == sum(
        str(v).isdecimal() for g in made.to_json(rows) for p in g.values() for v in p or []
    )


def test_the_network_is_built_and_transformed_in_order() -> None:
    network = Tabular(params=2000)
    torch.manual_seed(0)
    made = Joint.of(
        {"training": Choices(columns={"a": [1]}), "network": network, "policy": Pruned(columns={"cut": [0, 1]})}
    )
    assert made.network == "network"
    genotype = {"training": [1], "network": ["stack", "linear8", "relu"], "policy": [1]}
    whole = network.build(genotype["network"])
    assert isinstance(whole, nn.Sequential)
    built = made.build(genotype)
    assert isinstance(built, nn.Sequential)
    assert len(built) == len(whole) - 1
    # Costs without building would be those of the network before its transformation.
    assert not isinstance(made, Costed)
    assert isinstance(made, ImageSpace)
    assert (made.resolution, made.in_channels, made.classes) == (8, 1, 10)
    nothing = Joint.of({"a": Choices(columns={"a": [1]})})
    assert not isinstance(nothing, ImageSpace)
    assert not nothing.has_models
    with pytest.raises(InputError, match="no part with torch modules"):
        nothing.build({"a": [1]})


def test_costs_and_blocks_of_the_network_show_through() -> None:
    network, training = FBNetTiny(layers=3), Choices(columns={"lr": [0.1, 0.2]})
    made = Joint.of({"training": training, "network": network})
    assert isinstance(made, BlockSpace)
    population = made.sample(np.random.default_rng(0), 6)
    assert np.array_equal(made.block_indices(population), network.block_indices(population[:, 1:]))
    mixed = Joint.of({"grammar": Tabular(), "network": network}, network="network")
    population = mixed.sample(np.random.default_rng(0), 6)
    [first, *_] = mixed.to_json(population)
    task = Task(number=0, genotype=first, key="0", fidelity=0, repeat=0, seed=0)
    [cost] = Costs().evaluate([task], EvaluationContext(space=mixed))
    [alone] = Costs().evaluate(
        [Task(number=0, genotype=first["network"], key="0", fidelity=0, repeat=0, seed=0)],
        EvaluationContext(space=network),
    )
    assert cost == alone
    assert isinstance(joint(), Costed)
    assert joint().costs(joint().sample(np.random.default_rng(0), 3))[0].shape == (3,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"parts": {}}, r"space\.parts: {} is empty"),
        ({"parts": {"a.b": TRAINING}}, r"space\.parts\.a\.b: .*no name for a part"),
        ({"parts": {"a": {"name": "fbnet-tinny"}}}, r"space\.parts\.a\.name: .*Did you mean 'fbnet-tiny'"),
        ({"parts": {"a": {"name": "fbnet-tiny", "width": -1}}}, r"space\.parts\.a\.width: -1.* is out of range"),
        (
            {"parts": {"a": {"name": "fbnet-tiny", "depth": 1}}},
            r"space\.parts\.a\.depth: 1 is given for an unknown key",
        ),
        ({"parts": {"a": TRAINING}, "network": "a"}, r"space\.network: 'a' is no part with torch modules"),
        (
            {"parts": {"n": {"name": "tabular"}, "t": TRAINING}, "when": {"n": {"t.lr": [0.1]}}},
            r"space\.when\.n: .*network",
        ),
        (
            {"parts": {"n": {"name": "tabular"}, "t": TRAINING}, "when": {"t": {"n.lr": [0.1]}}},
            r"space\.when\.t\.n\.lr: .*no columns",
        ),
        (
            {"parts": {"n": {"name": "skan"}, "t": TRAINING}, "when": {"t": {"n.layer00": ["x"]}}},
            r"Did you mean 'n\.layer0'",
        ),
        (
            {"parts": {"n": {"name": "skan"}, "t": TRAINING}, "when": {"t": {"t.lr": [0.1]}}},
            r"space\.when\.t: 't -> t' wait for each other",
        ),
    ],
)
def test_what_cannot_be_joined_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPACES.build({"name": "joint", **config}, "space")


def job(strategy: dict[str, Any], space: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "joint",
        "space": space,
        "evaluators": [{"name": "costs"}],
        "objectives": [{"metric": "params", "direction": "min"}, {"metric": "activation_bytes", "direction": "max"}],
        "strategy": strategy,
        "budget": {"evaluations": 24},
        "workers": {"executor": "inline", "count": 1},
        "seed": 3,
    }


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "random"},
        {"name": "regularized-evolution", "population": 6, "sample": 3},
        {"name": "nsga2", "population": 6, "mutation": 0.2},
    ],
    ids=lambda strategy: str(strategy["name"]),
)
def test_a_search_in_a_grammar_and_choices(strategy: dict[str, Any], tmp_path: Path) -> None:
    """Through ledger and inline executor; stopped now and then it ends with the same ledger."""
    space = {
        "name": "joint",
        "parts": {"network": {"name": "tabular", "params": 5000}, "training": TRAINING, "more": {"name": "tabular"}},
        "when": {"more": {"training.cutout": [True]}},
    }
    whole = archfront.run(job(strategy, space), db=tmp_path / "whole.db")
    assert whole.status()["evaluations"]["done"] == 24
    ledger = Ledger.open(str(tmp_path / "stopped.db"))
    job_id = submit(ledger, job(strategy, space), [])
    steps = iter(range(1000))
    while drive(ledger, job_id, DriveOptions(stop=lambda: next(steps) % 4 == 3)) == "stopped":
        pass
    assert differences(dump(whole.ledger, whole.id), dump(ledger, job_id)) == []


def test_optuna_serves_a_joint_of_product_spaces(tmp_path: Path) -> None:
    """And a study that is exported has the parameters that count, as Optuna writes conditional searches."""
    training = TRAINING | {"when": {"size": {"cutout": [True]}}}
    space = {"name": "joint", "parts": {"network": {"name": "fbnet-tiny", "layers": 3}, "training": training}}
    done = archfront.run(job({"name": "optuna:tpe"}, space), db=tmp_path / "l.db")
    assert done.status()["evaluations"]["done"] == 24
    export_job(done, f"optuna:sqlite:///{tmp_path}/s.db")
    trials = optuna.load_study(study_name="joint", storage=f"sqlite:///{tmp_path}/s.db").trials
    assert {trial.params["training.cutout"] for trial in trials} == {False, True}
    assert all(("training.size" in trial.params) == trial.params["training.cutout"] for trial in trials)
    assert all(trial.params["network.layer0"] in FBNetTiny().blocks for trial in trials)
    with pytest.raises(InputError, match="finite product spaces only"):
        STRATEGIES.get("optuna:tpe", "strategy.name").check(Problem(space=joint(), objectives=1))
