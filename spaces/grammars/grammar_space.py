"""A search space whose members are the derivations of a grammar: every operator of ``Space`` for any grammar."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.spaces.grammars.derivation import (
    Analysis,
    DerivationError,
    Site,
    Totals,
    Tree,
    analyse,
    canonical,
    replace,
)
from archfront.spaces.grammars.grammar import Cost, Grammar, State
from archfront.spaces.grammars.sampling import Budget, Sampler, other_terminals
from archfront.spaces.space import KEY_BYTES, Genotype, Layer, Population, Space

if TYPE_CHECKING:
    from torch import nn

_TRIES = 40
_SPREAD_TRIES = 12
_SPREAD_UP_TO = 60
_MOST_MUTATIONS = 8
_CACHE = 4096


class GrammarSpace(Space):
    """Image classifiers (or whatever ``head`` makes of them) derived from a grammar.

    A genotype is a derivation as nested JSON lists: ``["production", child, ...]``, terminals by name. A subclass
    gives ``name``, ``config`` and ``features``, and may give another stem or head. What it builds takes
    ``(n, in_channels, resolution, resolution)`` unless it says otherwise.

    Args:
        grammar: of the part between stem and head.
        initial: state of what the stem gives.
        budget: bounds; parameters and multiply-adds with the head.
        classes: of the head.
    """

    def __init__(self, *, grammar: Grammar, initial: State, budget: Budget, classes: int) -> None:
        self.grammar = grammar
        self.initial = initial
        self.budget = budget
        self.classes = classes
        self._analyses: OrderedDict[Tree, Analysis] = OrderedDict()

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """See ``Space``."""

    @abstractmethod
    def features(self, state: State) -> int:
        """Length of the first axis (behind the batch) of a tensor in a state: what the head classifies."""

    def stem(self) -> nn.Module | None:
        """What comes before the derivation; it should have no parameters, for none are counted."""
        return None

    def head(self, state: State) -> nn.Module:
        """What follows the derivation: a mean over all axes but the first, and a linear classifier."""
        from archfront.spaces.grammars.assembly import Head

        return Head(self.features(state), self.classes)

    def head_cost(self, state: State) -> Cost:
        """Of the head."""
        weights = self.features(state) * self.classes
        return Cost(params=weights + self.classes, macs=weights)

    @property
    def digest(self) -> str:
        outline = self.grammar.outline()
        text = json.dumps([self.name, self.version, dict(self.config), outline], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def analysis(self, tree: Tree) -> Analysis:
        """All places of a derivation; the last few thousand are kept.

        Raises:
            DerivationError: it is none.
        """
        found = self._analyses.get(tree)
        if found is None:
            found = analyse(self.grammar, tree, self.initial)
            self._analyses[tree] = found
            if len(self._analyses) > _CACHE:
                self._analyses.popitem(last=False)
        return found

    def sample(self, rng: np.random.Generator, count: int) -> Population:
        return _population([self._draw(rng) for _ in range(count)])

    def sample_spread(self, rng: np.random.Generator, count: int) -> Population:
        """Most derivations are short: here each may be drawn a few times, until it has a number of terminals that is
        itself drawn, evenly on a logarithmic scale."""
        trees = []
        for _ in range(count):
            wanted = math.exp(rng.random() * math.log(min(_SPREAD_UP_TO, self.budget.terminals)))
            best, most = self._draw(rng), 0
            for _ in range(_SPREAD_TRIES):
                tree = self._draw(rng)
                terminals = self.analysis(tree).totals.terminals
                if terminals > most:
                    best, most = tree, terminals
                if most >= wanted:
                    break
            trees.append(best)
        return _population(trees)

    def mutate(self, rng: np.random.Generator, parents: Population, rate: float | None = None) -> Population:
        """A place of the derivation, drawn uniformly, gets something else that fits all that follows."""
        children = []
        for parent in parents:
            child = self._mutant(rng, parent)
            more = 0 if not rate else int(rng.binomial(len(self.analysis(parent).sites), rate))
            for _ in range(min(more, _MOST_MUTATIONS)):
                child = self._mutant(rng, child)
            children.append(child if child != parent else self._mutant(rng, parent))
        return _population(children)

    def crossover(self, rng: np.random.Generator, first: Population, second: Population) -> Population:
        """A subtree of the first gives way to one of the second that derives the same symbol from the same state, and
        leaves a state with which all that follows is possible; the first itself where the two have nothing to give."""
        return _population([self._child(rng, a, b) for a, b in zip(first, second, strict=True)])

    def canonical(self, population: Population) -> Population:
        return _population([canonical(self.grammar, tree) for tree in population])

    def keys(self, population: Population) -> list[bytes]:
        return [
            hashlib.blake2b(
                json.dumps(canonical(self.grammar, tree), separators=(",", ":")).encode(), digest_size=KEY_BYTES
            ).digest()
            for tree in population
        ]

    def to_json(self, population: Population) -> list[Genotype]:
        return [_lists(tree) for tree in population]

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        trees = []
        for genotype in genotypes:
            try:
                tree = _tuples(genotype)
                analysis = self.analysis(tree)
            except DerivationError as error:
                shown = json.dumps(genotype)
                shown = shown if len(shown) < 200 else shown[:200] + "…"
                remedy = "Write it as [production, parts...], terminals by name; see `archfront spaces`."
                raise InputError("genotype", shown, str(error), remedy) from None
            self._check_budget(analysis, genotype)
            trees.append(tree)
        return _population(trees)

    def encode(self, population: Population) -> npt.NDArray[np.float32]:
        """How often each terminal and production occurs (copies included, log(1+n)), depth, and logarithms of size."""
        names = {(s, n): i for i, (s, n) in enumerate((s, n) for s, f in self.grammar.families.items() for n in f)}
        for symbol, productions in self.grammar.rules.items():
            for production in productions:
                names.setdefault((symbol, production.name), len(names))
        features = np.zeros((len(population), len(names) + 5), dtype=np.float64)
        for row, tree in zip(features, population, strict=True):
            analysis = self.analysis(canonical(self.grammar, tree))
            for site in analysis.sites:
                if site.start is None:
                    name = site.node if isinstance(site.node, str) else site.node[0]
                    at = names.get((site.symbol, name))
                    if at is not None:
                        row[at] += site.copies
            totals = analysis.totals
            row[-5:] = (analysis.depth, totals.terminals, totals.params, totals.macs, totals.activations)
        return np.log1p(features).astype(np.float32)

    def build(self, genotype: Genotype) -> nn.Module:
        """The network of a derivation, head included."""
        # Torch is imported where a model is built; spaces are listed without it.
        from torch import nn

        from archfront.spaces.grammars.assembly import assemble

        [tree] = self.canonical(self.from_json([genotype]))
        stem = self.stem()
        modules, after = assemble(self.grammar, tree, self.initial)
        return nn.Sequential(*([] if stem is None else [stem]), *modules, self.head(after))

    def describe(self, genotype: Genotype) -> list[Layer]:
        from archfront.spaces.grammars.assembly import draw_layers

        [tree] = self.canonical(self.from_json([genotype]))
        return draw_layers(self.grammar, tree, self.initial)

    def costs(self, population: Population) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Parameters and multiply-adds of one input, head included, of what ``build`` makes: ``(n,)`` each."""
        found = np.zeros((2, len(population)), dtype=np.int64)
        for i, tree in enumerate(population):
            analysis = self.analysis(tree)
            head = self.head_cost(analysis.after)
            found[:, i] = analysis.totals.params + head.params, analysis.totals.macs + head.macs
        return found[0], found[1]

    def _draw(self, rng: np.random.Generator) -> Tree:
        sampler = Sampler(self.grammar, self.budget, rng)
        for _ in range(_TRIES):
            tree = sampler.draw(self.initial)
            if self._affords(self.analysis(tree)):
                return tree
        problem = "leaves hardly a model with its head"
        raise InputError("space", vars(self.budget), problem, "Raise the bounds.")

    def _mutant(self, rng: np.random.Generator, tree: Tree) -> Tree:
        analysis = self.analysis(tree)
        was = canonical(self.grammar, tree)
        for _ in range(_TRIES):
            site = analysis.sites[int(rng.integers(len(analysis.sites)))]
            node = self._other(rng, analysis, site)
            if node is None:
                continue
            child = self._accepted(replace(tree, site, node))
            if child is not None and child != was:
                return child
        return self._draw(rng)

    def _other(self, rng: np.random.Generator, analysis: Analysis, site: Site) -> Tree | None:
        """Something else for a place, by the grammar's probabilities without what stands there."""
        if site.symbol in self.grammar.families:
            others = other_terminals(self.grammar, site.symbol, site.node, site.before)
            return others[int(rng.integers(len(others)))].name if others else None
        whole, own = analysis.totals, site.cost
        rest = Totals(
            whole.params - own.params, whole.macs - own.macs, whole.activations - own.activations,
            whole.terminals - site.terminals,
        )  # fmt: skip
        without = site.node[0] if isinstance(site.node, tuple) else self._unit(site.symbol)
        sampler = Sampler(self.grammar, self.budget, rng)
        found = sampler.expand(site.symbol, site.before, site.depth, site.copies, rest, without)
        return None if found is None else found[0]

    def _unit(self, symbol: str) -> str | None:
        return next((p.name for p in self.grammar.rules[symbol] if p.flow == "unit"), None)

    def _child(self, rng: np.random.Generator, first: Tree, second: Tree) -> Tree:
        donors: dict[tuple[str, State], list[Tree]] = {}
        for site in self.analysis(second).sites[1:]:
            if site.symbol in self.grammar.rules:
                donors.setdefault((site.symbol, site.before), []).append(site.node)
        takers = [s for s in self.analysis(first).sites[1:] if (s.symbol, s.before) in donors]
        was = canonical(self.grammar, first)
        for _ in range(_TRIES if takers else 0):
            site = takers[int(rng.integers(len(takers)))]
            given = donors[site.symbol, site.before]
            child = self._accepted(replace(first, site, given[int(rng.integers(len(given)))]))
            if child is not None and child != was:
                return child
        return first

    def _accepted(self, tree: Tree) -> Tree | None:
        """A changed tree in its canonical form, if it is a derivation within the budget."""
        try:
            analyse(self.grammar, tree, self.initial)
        except DerivationError:
            return None
        child = canonical(self.grammar, tree)
        analysis = self.analysis(child)
        within = analysis.depth <= self.budget.depth and analysis.totals.terminals <= self.budget.terminals
        return child if within and self._affords(analysis) else None

    def _affords(self, analysis: Analysis) -> bool:
        totals, head = analysis.totals, self.head_cost(analysis.after)
        return self.budget.admits(totals.params + head.params, totals.macs + head.macs, totals.activations)

    def _check_budget(self, analysis: Analysis, genotype: Genotype) -> None:
        totals, budget, head = analysis.totals, self.budget, self.head_cost(analysis.after)
        sizes = {
            "depth": analysis.depth, "terminals": totals.terminals, "params": totals.params + head.params,
            "macs": totals.macs + head.macs, "activations": totals.activations,
        }  # fmt: skip
        for name, size in sizes.items():
            most = getattr(budget, name)
            if most is not None and size > most:
                problem = f"has {size} {name}, above the space's bound of {most}"
                raise InputError("genotype", json.dumps(genotype)[:200], problem, f"Raise space.{name}.")


def check_positive(numbers: Mapping[str, int | None]) -> None:
    """Refuse arguments of a space below 1; None is no bound.

    Raises:
        InputError: names the argument.
    """
    for field, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"space.{field}", number, "is not positive", "Give 1 or more.")


def _population(trees: Sequence[Tree]) -> Population:
    population = np.empty(len(trees), dtype=object)
    for i, tree in enumerate(trees):  # at once, numpy would take tuples of one length for rows
        population[i] = tree
    return population


def _lists(tree: Tree) -> Genotype:
    return tree if isinstance(tree, str) else [_lists(child) for child in tree]


def _tuples(genotype: Genotype) -> Tree:
    if isinstance(genotype, str):
        return genotype
    if not isinstance(genotype, (list, tuple)):
        raise DerivationError((), f"{genotype!r} is neither a name nor a list")
    return tuple(_tuples(child) for child in genotype)
