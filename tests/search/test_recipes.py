"""Recipes: every one meets its budgets, is better than chance there, and begins a job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.support.command_line import command
from tests.support.small_models import RESNET, bits, data_of, digits, trained

import archfront
from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.training_loop import torch_threads
from archfront.search.recipes.recipe import read_budget
from archfront.search.recipes.registry import RECIPES

BUDGETS = [{"model_mb": 0.022}, {"model_mb": 0.03}]
"""A network of 77 thousand parameters has 0.0184 MiB at 2 bits and 0.0737 at 8."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks: threads that wait for each other cost more than the work."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def networks() -> dict[str, Compressible]:
    """By the recipe: the space that it was published in, without its widths."""
    found = {}
    for name in RECIPES.names():
        options = dict(RECIPES.get(name, "recipe").space) | {"weights": [2, 4, 8]}
        found[name] = Compressible(bits("resnet", **options), digits(RESNET), 64)
    return found


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe(name: str, networks: dict[str, Compressible]) -> None:
    network = networks[name]
    space = network.space
    recipe = RECIPES.build({"name": name}, "recipe")
    recipe.images = min(recipe.images, 96)  # type: ignore[misc]
    found = recipe.policies(network, BUDGETS)
    again = recipe.policies(network, BUDGETS)
    assert [g for g, _ in found] == [g for g, _ in again]
    for (genotype, allocation), budget in zip(found, BUDGETS, strict=True):
        stored = space.bit_costs(space.from_json([genotype]))["model_mb"][0]
        assert stored <= budget["model_mb"] * (1 + 1e-9)
        assert allocation.costs["model_mb"] == pytest.approx(stored)
    if name == "rsq":
        # One width for all layers, which allocates nothing.
        assert [set(genotype) for genotype, _ in found] == [{2}, {2}]
        return
    # At equal cost: the recipe's larger policy against random ones that fit, and leave as little of the budget.
    rows = space.sample(np.random.default_rng(0), 3000)
    costs = space.bit_costs(rows)["model_mb"]
    fitting = rows[(costs <= BUDGETS[1]["model_mb"]) & (costs > 0.93 * BUDGETS[1]["model_mb"])][:8]
    assert len(fitting) == 8
    policies = [space.layer_bits(g) for g in [found[1][0], *space.to_json(fitting)]]
    own, *others = [judged.drop for judged in network.judged("validation", policies, None)]
    assert own <= np.median(others)


def test_budgets_are_read() -> None:
    assert read_budget("model_mb <= 6.7") == {"model_mb": 6.7}
    assert read_budget("model_mb<=6.7 and gbops <= 1e2") == {"model_mb": 6.7, "gbops": 100.0}
    assert read_budget("model_mb <= 3 and model_mb <= 5") == {"model_mb": 3.0}
    for text, words in {
        "model_mb < 6": "is no budget",
        "model_mb <= 6-": "is no budget",
        "weight_gb <= 6": "no cost of policies",
        "": "is no budget",
    }.items():
        with pytest.raises(InputError, match=words):
            read_budget(text)


def test_a_recipe_is_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    db = str(tmp_path / "l.db")
    model = json.dumps(trained("resnet"))
    parts = ["--recipe", "layer-wise-quantization", "--model", model, "--data", "digits", "--db", db]
    budgets = ["--budget", "model_mb <= 0.022", "--budget", "model_mb <= 0.03"]
    assert command(monkeypatch, "run", *parts, *budgets, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"]["done"] == 2
    rows = archfront.Job(db).front(objectives=["model_mb"], where="accuracy_drop <= 100").to_pandas()
    assert rows["model_mb"].max() <= 0.022
    assert command(monkeypatch, "run", *parts, "--budget", "model_mb <= 0.01") == 2
    assert "0.01783" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model", "budget", "share"),
    [
        # Two blocks of 12 thousand weights each, one at 2 bits, and 3 thousand in the head, which keeps 4.
        ("layer-wise-quantization", "decoder", 0.0103, 0.7),
        ("rsq", "decoder", 0.01, 0.7),
        ("lrp-qvit", "vit", 0.018, 0.9),
    ],
)
def test_recoveries_of_recipes_bring_logits_back(name: str, model: str, budget: float, share: float) -> None:
    """Squared error against the same policy without them."""
    recipe = RECIPES.build({"name": name}, "recipe")
    space, data = bits(model, **recipe.space), data_of(model)
    steps = [RECOVERIES.build(step, "recovery") for step in recipe.recovery]
    plain, recovered = Compressible(space, data, 256), Compressible(space, data, 256, recovery=steps)
    [(genotype, allocation)] = recipe.policies(plain, [{"model_mb": budget}])
    assert (len(set(genotype)) == 1) == (name == "rsq")
    variant = space.variant(genotype)
    assert recovered.costs(variant)["model_mb"] == pytest.approx(allocation.costs["model_mb"])
    [batch], _ = plain.inputs("validation", 200)
    with torch.no_grad():
        own = plain.model(batch)
        before, after = (float((each.prepared(variant)(batch) - own).square().mean()) for each in (plain, recovered))
    assert after < share * before


def test_rsq_is_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    db = str(tmp_path / "l.db")
    words = ["run", "--recipe", "rsq", "--model", json.dumps(trained("decoder")), "--data", "text", "--db", db]
    assert command(monkeypatch, *words, "--budget", "model_mb <= 0.01", "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"]["done"] == 1
    assert archfront.Job(db).spec["seeds"] == [[3] * 13]
    assert archfront.Job(db).front(objectives=["accuracy"]).to_pandas()["accuracy"][0] > 35


def test_rsq_gives_all_layers_the_largest_width_that_fits() -> None:
    space = bits("decoder", **RECIPES.get("rsq", "recipe").space)
    network = Compressible(space, data_of("decoder"), 16)
    recipe = RECIPES.build({"name": "rsq"}, "recipe")
    sizes = {width: float(space.bit_costs(space.from_json([[width] * 13]))["model_mb"][0]) for width in (2, 3, 4)}
    budgets = [{"model_mb": sizes[2]}, {"model_mb": sizes[3] * 0.999}, {"model_mb": sizes[3]}, {"model_mb": 1.0}]
    found = recipe.policies(network, budgets)
    assert [genotype for genotype, _ in found] == [[width] * 13 for width in (2, 2, 3, 4)]
    assert [allocation.costs["model_mb"] for _, allocation in found] == pytest.approx(
        [sizes[2], sizes[2], sizes[3], sizes[4]]
    )
    assert all(allocation.gap == 0 for _, allocation in found)
    with pytest.raises(InputError, match=r"budget\.model_mb.*least that all sites"):
        recipe.policies(network, [{"model_mb": sizes[2] * 0.99}])


def test_a_recipe_begins_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    db, file = str(tmp_path / "l.db"), tmp_path / "job.yaml"
    job: dict[str, Any] = {
        "name": "warm",
        "space": {"name": "bits", "model": trained("resnet"), "weights": [2, 4, 8], "activations": "float"},
        "data": {"name": "digits"},
        "evaluators": [{"name": "compression"}],
        "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": "model_mb", "direction": "min"}],
        "strategy": {"name": "nsga2", "population": 8},
        "budget": {"evaluations": 16},
        "workers": {"executor": "inline"},
    }
    file.write_text(yaml.safe_dump(job))
    words = ["run", str(file), "--recipe", "brecq", "--budget", "model_mb <= 0.03", "--db", db]
    assert command(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"]["done"] == 16
    found = archfront.Job(db)
    [seed] = found.spec["seeds"]
    space = bits("resnet", weights=[2, 4, 8], activations="float")
    assert space.bit_costs(space.from_json([seed]))["model_mb"][0] <= 0.03
    assert archfront.Job(db).front(objectives=["accuracy", "model_mb"], where="model_mb <= 0.03").to_pandas().size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "JOB.yaml.*missing"),
        (["--budget", "model_mb <= 1"], "--budget.*without a recipe"),
        (["--recipe", "hawq-v3", "--data", "digits"], "--model.*missing"),
        (["--recipe", "hawq-v3", "--model", "cifar-resnet", "--data", "digits"], "--budget.*missing"),
        (["--recipe", "hawq-4", "--model", "cifar-resnet", "--data", "digits"], "--recipe.*hawq-v3"),
        (["--recipe", "hawq-v3", "--model", "[1]", "--data", "digits", "--budget", "gbops <= 1"], "--model.*mapping"),
    ],
)
def test_what_cannot_be_run_is_named(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    assert command(monkeypatch, "run", *words, "--db", str(tmp_path / "l.db")) == 2
    assert re.search(message, capsys.readouterr().err, flags=re.DOTALL)
    assert not (tmp_path / "l.db").exists()
