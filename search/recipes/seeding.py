"""Jobs whose first candidates are a recipe's policies: alone, or as the warm start of a search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.evaluator import Compression
from archfront.evaluators.training import load_for
from archfront.search.job import JobSpec
from archfront.search.recipes.recipe import Recipe, read_budget
from archfront.search.recipes.registry import RECIPES
from archfront.search.resolve import build_evaluators, resolve
from archfront.spaces.policies.policy_chain import policies_of
from archfront.spaces.registry import SPACES


def recipe_job(name: str, model: str, data: str, budgets: Sequence[str]) -> JobSpec:
    """A job that evaluates a recipe's policy for each budget, and nothing else.

    Args:
        name: of the recipe.
        model: a mapping as in a job file, in YAML; or a file of weights that ``archfront export`` wrote.
        data: a data set's name, or a mapping.
        budgets: as ``read_budget`` takes them.

    Raises:
        InputError: one of these cannot be used.
    """
    recipe = RECIPES.get(name, "--recipe")
    first = next(iter(read_budget(budgets[0]))) if budgets else "model_mb"
    draft = JobSpec.model_validate(
        {
            "name": name,
            "space": {"name": "bits", "model": read_mapping("--model", model, "network"), **recipe.space},
            "data": read_mapping("--data", data, None),
            "evaluators": [{"name": "compression", "recovery": [dict(step) for step in recipe.recovery]}],
            "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": first, "direction": "min"}],
            "strategy": {"name": "random"},
            "budget": {"evaluations": 1},
            "workers": {"count": 1},
        }
    )
    spec = seeded(draft, name, budgets)
    return spec.model_copy(update={"budget": spec.budget.model_copy(update={"evaluations": len(spec.seeds)})})


def seeded(spec: JobSpec, name: str, budgets: Sequence[str]) -> JobSpec:
    """A job with a recipe's policies, one for each budget, before its own seeds.

    Raises:
        InputError: no budget, an unknown recipe, a job whose space is not one of bits or that names no data, or what
            ``Recipe.policies`` refuses.
    """
    recipe = RECIPES.build({"name": name}, "--recipe")
    if not isinstance(recipe, Recipe):
        remedy = "Make it a subclass of archfront.search.recipes.recipe.Recipe."
        raise InputError("--recipe", name, f"is a {type(recipe).__name__}, which is no recipe", remedy)
    if not budgets:
        raise InputError("--budget", None, "is missing, which a recipe needs", 'Give --budget "model_mb <= 6.7".')
    limits = [read_budget(text) for text in budgets]
    resolve(spec)
    space = SPACES.build(spec.space, "space")
    # On what the job itself calibrates with, where it says so.
    judges = [one for _, one in build_evaluators(spec) if isinstance(one, Compression)]
    judge = judges[0] if judges else Compression()
    data = load_for(space, spec.data)
    network = Compressible(policies_of(space, "a recipe"), data, judge.calibration, judge.images)
    found = [genotype for genotype, _ in recipe.policies(network, limits, spec.seed)]
    unique = [json.loads(text) for text in dict.fromkeys(json.dumps(g) for g in [*found, *spec.seeds])]
    return spec.model_copy(update={"seeds": unique})


def read_mapping(field: str, text: str, of_file: str | None) -> Mapping[str, Any]:
    """A component as the command line takes it: a name, a mapping in YAML, or a file for the component ``of_file``.

    Raises:
        InputError: it is none of these.
    """
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if isinstance(given, dict) and "name" in given:
        return given
    if isinstance(given, str) and of_file is not None and Path(given).suffix == ".safetensors":
        return {"name": of_file, "weights": given}
    if isinstance(given, str) and given.replace("-", "").isalnum():
        return {"name": given}
    remedy = 'Give a name, or a mapping: "{name: cifar-resnet, depth: 20, weights: FILE}".'
    raise InputError(field, text, "is neither a name nor a mapping with one", remedy)
