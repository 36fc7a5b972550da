"""Grammars in general: probabilities, staying within the language, equal functions of equal keys, clear refusals."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.support.einspace_references import copy_weights

from archfront.errors import InputError
from archfront.spaces.grammars.assembly import assemble
from archfront.spaces.grammars.derivation import Tree, analyse, canonical
from archfront.spaces.grammars.einspace import COMPUTE_PROBABILITY, Einspace
from archfront.spaces.grammars.einspace_seeds import SEEDS
from archfront.spaces.grammars.grammar import Grammar, Operation, Production
from archfront.spaces.grammars.sampling import Sampler
from archfront.spaces.grammars.tabular import Tabular

SMALL = Einspace(resolution=8, in_channels=2, params=300_000, macs=10_000_000, activations=200_000, terminals=150)
SPACES = {"einspace": SMALL, "tabular": Tabular(terminals=40)}


def test_productions_are_drawn_with_their_probabilities() -> None:
    drawn: Counter[tuple[str, str]] = Counter()

    def observe(symbol: str, production: str, whole: bool) -> None:
        if whole:
            drawn[symbol, production] += 1

    space = Einspace()
    sampler = Sampler(space.grammar, space.budget, np.random.default_rng(3), observe)
    for _ in range(2_000):
        sampler.draw(space.initial)
    for symbol, productions in space.grammar.rules.items():
        weights = np.array([p.weight for p in productions])
        counts = np.array([drawn[symbol, p.name] for p in productions])
        assert counts.sum() > 1_900
        assert stats.chisquare(counts, weights / weights.sum() * counts.sum()).pvalue > 1e-3
    assert space.grammar.production("M", "computation").weight == COMPUTE_PROBABILITY  # type: ignore[union-attr]


def test_terminals_that_fit_are_drawn_evenly() -> None:
    """The first computation of chains on the input: all that the grammar may draw there fit."""
    space = Einspace(terminals=8)
    sampler = Sampler(space.grammar, space.budget, np.random.default_rng(0))
    drawn: Counter[str] = Counter()
    while drawn.total() < 3_000:
        [name, _] = sampler.expand("C", space.initial) or ("", None)
        drawn[name] += 1
    drawable = [t.name for t in space.grammar.terminals["C"] if isinstance(t, Operation) and t.drawn(space.initial)]
    assert set(drawn) == set(drawable)
    assert len(drawable) == 13
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(SPACES)), seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([None, 0.3]))
def test_changed_derivations_stay_in_the_language(name: str, seed: int, rate: float | None) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(seed)
    population = space.sample_spread(rng, 4)
    for _ in range(3):
        children = np.concatenate(
            [space.mutate(rng, population, rate), space.crossover(rng, population, population[::-1])]
        )
        # Checks every place of each tree, and the bounds.
        space.from_json(space.to_json(children))
        population = children[:4]


def test_seeds_mutate_within_the_language() -> None:
    space = Einspace()
    parents = space.from_json([make() for make in SEEDS.values()])
    mutants = space.mutate(np.random.default_rng(0), np.concatenate([parents] * 4))
    space.from_json(space.to_json(mutants))
    assert len(set(space.keys(mutants)) - set(space.keys(parents))) >= 19


def test_copies_of_a_shared_body_change_together() -> None:
    tree = ("sequential", ("branching", "clone4", ("sequential", "norm", "leaky_relu"), "add"), "norm")
    children = SMALL.mutate(np.random.default_rng(0), SMALL.from_json([tree] * 60))
    kept = [c for c in children if c[0] == "sequential" and isinstance(c[1], tuple) and "clone4" in c[1]]
    assert kept
    assert all(len(child[1]) == 4 for child in kept)
    changed = next(c for c in kept if c[1] != tree[1])
    names = [
        name for name, _ in SMALL.build(SMALL.to_json(np.array([None, changed], dtype=object)[1:])[0]).named_modules()
    ]
    assert sum(name.endswith("bodies.3") for name in names) == 1


@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_canonical_form_is_the_same_function(name: str) -> None:
    """Networks of a derivation as drawn and of its canonical form, with the same weights."""
    space = SPACES[name]
    rng = np.random.default_rng(5)
    changed = 0
    for tree in space.sample_spread(rng, 60):
        held = canonical(space.grammar, tree)
        if held == tree:
            continue
        shape = (2, 64) if name == "tabular" else (2, 2, 8, 8)
        torch.manual_seed(0)
        models = [torch.nn.Sequential(*assemble(space.grammar, t, space.initial)[0]).eval() for t in (tree, held)]
        if [p.shape for p in models[0].parameters()] != [p.shape for p in models[1].parameters()]:
            continue  # branches changed places: their weights do not correspond in order
        changed += 1
        copy_weights(*models)
        inputs = torch.randn(shape)
        with torch.no_grad():
            expected, found = (model(inputs) for model in models)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True), tree
    assert changed >= 5


def test_derivations_of_one_model_have_one_key() -> None:
    same = [
        ("sequential", "norm", ("sequential", "leaky_relu", "linear16")),
        ("sequential", ("sequential", "norm", "leaky_relu"), "linear16"),
        ("sequential", "norm", "leaky_relu", ("computation", "linear16")),
        ("sequential", "norm", "identity", ("routing", "identity", "leaky_relu", "identity"), "linear16"),
    ]
    assert len(set(SMALL.keys(SMALL.from_json(same)))) == 1
    bodies = [("sequential", "norm", "linear16"), ("sequential", "leaky_relu", "linear16")]
    added = [("branching", "clone2", *pair, "add") for pair in (bodies, bodies[::-1])]
    joined = [("branching", "clone2", *pair, "cat2d1") for pair in (bodies, bodies[::-1])]
    keys = SMALL.keys(SMALL.from_json([*same[:1], *added, *joined]))
    assert keys[1] == keys[2]
    assert len(set(keys)) == 4


def test_crossover_takes_from_both() -> None:
    space = SPACES["tabular"]
    first = ("stack", "linear8", "relu", "linear16", "relu")
    second = ("stack", "linear8", "silu", "linear32", "silu")
    children = space.crossover(np.random.default_rng(0), space.from_json([first] * 30), space.from_json([second] * 30))
    names = [{name for name in child if isinstance(name, str)} for child in children]
    assert any({"relu", "silu"} <= found for found in names)
    assert all(len(child) < 9 for child in children)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": "T"}, "has no productions"),
        ({"rules": {"S": []}}, "is empty"),
        ({"rules": {"S": [Production("a", "chain", ("S", "X"))]}}, r"unknown symbols \['X'\]"),
        ({"rules": {"S": [Production("a", "chain", ("S", "S"))]}}, "never end"),
        (
            {"rules": {"S": [Production("a", "branch", ("t", "S", "t")), Production("b", "unit", ("t",))]}},
            "does not fit",
        ),
        ({"rules": {"S": [Production("a", "unit", ("t",), -1)]}}, "not positive"),
        ({"terminals": {"t": []}}, "repeats a name"),
        ({"rules": {"S": [Production("a", "chian", ("t",))]}}, "is unknown"),  # type: ignore[arg-type]
        ({"rules": {"S": [Production("a", "unit", ("t",)), Production("b", "unit", ("S",))]}}, "by units alone"),
        (
            {
                "rules": {
                    "S": [Production("a", "unit", ("t",)), Production("b", "chain", ("M", "M"))],
                    "M": [Production("b", "chain", ("t", "t"))],
                }
            },
            "another production elsewhere",
        ),
        (
            {
                "rules": {"S": [Production("a", "unit", ("t",)), Production("b", "unit", ("u",))]},
                "terminals": {
                    name: [Operation(name="x", infer=lambda s: s, build=lambda _: torch.nn.Identity())] for name in "tu"
                },
            },
            "stands in t and u",
        ),
    ],
)
def test_a_grammar_that_cannot_work_is_refused(changes: dict[str, object], words: str) -> None:
    terminal = Operation(name="one", infer=lambda s: s, build=lambda _: torch.nn.Identity())
    good: dict[str, object] = {
        "start": "S", "rules": {"S": [Production("a", "unit", ("t",))]}, "terminals": {"t": [terminal]},
    }  # fmt: skip
    Grammar(**good)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        Grammar(**good | changes)  # type: ignore[arg-type]


def test_bounds_that_leave_nothing_are_refused() -> None:
    space = Einspace(params=9, classes=10)
    with pytest.raises(InputError, match="Raise the bounds"):
        space.sample(np.random.default_rng(0), 1)


def test_analysis_counts_shared_bodies_as_often_as_they_are_held() -> None:
    def params(tree: Tree) -> int:
        return analyse(SMALL.grammar, tree, SMALL.initial).totals.params

    once = params(("sequential", "linear16", "norm"))
    assert params(("branching", "clone4", ("sequential", "linear16", "norm"), "add")) == 4 * once
