"""Derivations as nested tuples: reading, checking, counting, and the form in which equal models are equal.

A node is ``(production, *children)`` and a terminal is its name. A chain of like symbols is one node with as many
children as the chain has parts; a branch is ``(production, split, *bodies, join)``, with one body where the split
shares it. A terminal may stand bare where a unit production would lead to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from archfront.spaces.grammars.grammar import Cost, Grammar, Join, Operation, Production, Split, State

Tree = Any
"""A terminal's name, or ``(production, *children)``."""

Path = tuple[int, ...]


class DerivationError(ValueError):
    """A tree is no derivation of the grammar; ``path`` leads to the place (indices into the nested lists)."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"at {list(path)}: {problem}")
        self.path = path
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Site:
    """A place of a derivation where something else could stand.

    Attributes:
        path: indices to the node; for a run, the part of the chain's children from ``start`` to ``stop``.
        symbol: what is derived here.
        before, after: states.
        depth: nodes around it.
        copies: how often the model holds what stands here.
        cost, terminals: of what stands here, in all its copies.
    """

    path: Path
    symbol: str
    node: Tree
    before: State
    after: State
    depth: int
    copies: int
    cost: Cost
    terminals: int
    start: int | None = None
    stop: int | None = None


@dataclass(slots=True)
class Totals:
    """Sums of a part of a derivation, copies counted as often as they occur."""

    params: int = 0
    macs: int = 0
    activations: int = 0
    terminals: int = 0

    def add(self, cost: Cost, copies: int) -> None:
        self.params += cost.params * copies
        self.macs += cost.macs * copies
        self.activations += cost.activations * copies
        self.terminals += copies

    def since(self, start: Totals) -> tuple[Cost, int]:
        cost = Cost(self.params - start.params, self.macs - start.macs, self.activations - start.activations)
        return cost, self.terminals - start.terminals

    def copy(self) -> Totals:
        return Totals(self.params, self.macs, self.activations, self.terminals)


@dataclass(frozen=True, slots=True)
class Analysis:
    """All places of a derivation, from the outside in; the first is the whole."""

    sites: list[Site]
    totals: Totals
    after: State
    depth: int


def analyse(grammar: Grammar, tree: Tree, state: State) -> Analysis:
    """Infer the state at every place.

    Raises:
        DerivationError: the tree is no derivation of the grammar, or a terminal does not fit its state.
    """
    walk = _Walk(grammar)
    after = walk.visit(grammar.start, tree, state, 0, 1, ())
    return Analysis(walk.sites, walk.totals, after, walk.deepest)


class _Walk:
    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.sites: list[Site] = []
        self.totals = Totals()
        self.deepest = 0

    def visit(self, symbol: str, node: Tree, state: State, depth: int, copies: int, path: Path) -> State:
        at, start = len(self.sites), self.totals.copy()
        self.sites.append(None)  # type: ignore[arg-type]  # takes its place before its children's
        self.deepest = max(self.deepest, depth)
        if isinstance(node, str):
            after = self._terminal(symbol, node, state, copies, path)
        else:
            after = self._node(symbol, node, state, depth, copies, path)
        cost, terminals = self.totals.since(start)
        self.sites[at] = Site(path, symbol, node, state, after, depth, copies, cost, terminals)
        return after

    def _terminal(self, symbol: str, name: str, state: State, copies: int, path: Path) -> State:
        family = self.grammar.family_of(symbol, name)
        if family is None:
            raise DerivationError(path, f"{name!r} is no {symbol}")
        terminal = self.grammar.families[family][name]
        if not isinstance(terminal, Operation):
            raise DerivationError(path, f"{name!r} takes or gives several tensors, and is no model of one")
        after = terminal.infer(state)
        if after is None:
            raise DerivationError(path, f"{name!r} does not fit {state}")
        cost = terminal.cost(state, after)
        self.totals.add(cost, copies)
        if family != symbol:  # a bare terminal: a place for a whole derivation and one for another terminal
            self.sites.append(Site(path, family, name, state, after, 0, copies, _times(cost, copies), copies))
        return after

    def _node(self, symbol: str, node: Tree, state: State, depth: int, copies: int, path: Path) -> State:
        production = self.grammar.production(symbol, node[0]) if node else None
        if production is None:
            names = [p.name for p in self.grammar.rules.get(symbol, ())]
            raise DerivationError(path, f"{node[0] if node else node!r} is no production of {symbol}, but {names} are")
        children = node[1:]
        if production.flow == "branch":
            return self._branch(production, children, state, depth, copies, path)
        symbols = symbols_of(production, len(children))
        if len(symbols) != len(children):
            problem = f"{production.name} has {len(children)} parts instead of {len(production.symbols)}"
            raise DerivationError(path, problem)
        # A run is one level, however a derivation bracketed it in pairs.
        level = depth + (production.flow != "unit")
        at: list[tuple[int, State, Totals]] = []

        def part(i: int, before: State) -> State:
            at.append((i, before, self.totals.copy()))
            return self.visit(symbols[i], children[i], before, level, copies, (*path, i + 1))

        state = along(self.grammar, production, len(children), state, part)
        if production.is_run and len(children) > 2:
            self._runs(production, at, state, node, depth, copies, path)
        return state

    def _runs(self, production: Production, at: list[tuple[int, State, Totals]], after: State, node: Tree, depth: int,
              copies: int, path: Path) -> None:  # fmt: skip
        """The parts of a chain that a bracketing of it in pairs may hold together: one length of each start."""
        count = len(at)
        ends = [*at[1:], (count, after, self.totals.copy())]
        for start in range(count - 1):
            # As many places as a derivation in pairs has, of lengths that differ from start to start.
            stop = min(start + 2 + (start * 7 + count) % max(count - 2, 1), count)
            if stop - start == count:
                stop -= 1
            cost, terminals = ends[stop - 1][2].since(at[start][2])
            part = (production.name, *node[1 + start : 1 + stop])
            symbol = production.symbols[0]
            before, end = at[start][1], ends[stop - 1][1]
            site = Site(path, symbol, part, before, end, depth + 1, copies, cost, terminals, start, stop)
            self.sites.append(site)

    def _branch(self, production: Production, children: Sequence[Tree], state: State, depth: int, copies: int,
                path: Path) -> State:  # fmt: skip
        symbol_split, symbol_body, symbol_join = production.symbols
        split = self.grammar.families[symbol_split].get(children[0] if children else "")
        join = self.grammar.families[symbol_join].get(children[-1] if children else "")
        if not isinstance(split, Split) or not isinstance(join, Join):
            raise DerivationError(path, f"{production.name} needs a {symbol_split} first and a {symbol_join} last")
        states = split.states(state)
        if states is None:
            raise DerivationError((*path, 1), f"{split.name!r} does not fit {state}")
        bodies = children[1:-1]
        if len(bodies) != (1 if split.shared else len(states)):
            wanted = 1 if split.shared else len(states)
            raise DerivationError(path, f"{split.name!r} wants {wanted} bodies instead of {len(bodies)}")
        self.sites.append(Site((*path, 1), symbol_split, split.name, state, None, depth, copies, Cost(), copies))
        self.totals.add(Cost(), copies)
        each = copies * split.branches if split.shared else copies
        ends = [
            self.visit(symbol_body, body, states[i], depth + 1, each, (*path, i + 2)) for i, body in enumerate(bodies)
        ]
        joined = tuple(ends * split.branches if split.shared else ends)
        after = join.infer(joined)
        if after is None:
            raise DerivationError((*path, len(children)), f"{join.name!r} does not fit {joined}")
        cost = join.cost(joined, after)
        self.totals.add(cost, copies)
        place, whole = (*path, len(children)), _times(cost, copies)
        self.sites.append(Site(place, symbol_join, join.name, joined, after, depth, copies, whole, copies))
        return after


def _times(cost: Cost, copies: int) -> Cost:
    return Cost(cost.params * copies, cost.macs * copies, cost.activations * copies)


def symbols_of(production: Production, children: int) -> Sequence[str]:
    """The symbols of a node's children: a run has as many as there are children, two at least."""
    if production.is_run and children > 1:
        return (production.symbols[0],) * children
    return production.symbols


def along(
    grammar: Grammar, production: Production, count: int, state: State, step: Callable[[int, State], State]
) -> State:
    """The state behind the parts of a chain, bracket or unit, ``step`` giving it from part to part.

    The closing of a bracket finds the scoped fields as the opening left them; behind it they are as before it.
    """
    before = opened = state
    for i in range(count):
        if production.flow == "bracket" and i == 1:
            opened = state
        if production.flow == "bracket" and i == 2:
            state = rescoped(grammar, state, opened)
        state = step(i, state)
    return rescoped(grammar, state, before) if production.flow == "bracket" else state


def rescoped(grammar: Grammar, state: State, source: State) -> State:
    """A state with the scoped fields of another."""
    if not grammar.scoped or all(getattr(state, name) == getattr(source, name) for name in grammar.scoped):
        return state
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return type(state)(**fields | {name: getattr(source, name) for name in grammar.scoped})


def count_nodes(grammar: Grammar, tree: Tree) -> tuple[int, int]:
    """(terminals, non-terminals) of a derivation as it is written, copies counted as often as they occur.

    Non-terminals are runs (one for each joint of two parts), branches, brackets and units; a bare terminal has none.
    """

    def visit(symbol: str, node: Tree, copies: int) -> tuple[int, int]:
        if isinstance(node, str):
            return copies, 0
        production = grammar.production(symbol, node[0])
        assert production is not None
        children = list(node[1:])
        own = copies * (len(children) - 1 if production.is_run else 1)
        symbols: Sequence[str] = symbols_of(production, len(children))
        inner = [copies] * len(children)
        if production.flow == "branch":
            split = grammar.families[production.symbols[0]][children[0]]
            assert isinstance(split, Split)
            each = copies * (split.branches if split.shared else 1)
            inner = [copies, *[each] * (len(children) - 2), copies]
            symbols = [production.symbols[0], *[production.symbols[1]] * (len(children) - 2), production.symbols[2]]
        found = [visit(s, child, c) for s, child, c in zip(symbols, children, inner, strict=True)]
        return sum(f[0] for f in found), own + sum(f[1] for f in found)

    return visit(grammar.start, tree, 1)


def canonical(grammar: Grammar, tree: Tree) -> Tree:
    """The form in which derivations of the same model are equal.

    Chains are flat and without what is neutral, brackets of neutral ends are their bodies, units leave no node, and
    the bodies between a symmetric split and a symmetric join stand in order.
    """
    return _canonical(grammar, grammar.start, tree)


def _canonical(grammar: Grammar, symbol: str, node: Tree) -> Tree:
    if isinstance(node, str):
        return node
    production = grammar.production(symbol, node[0])
    assert production is not None
    children = node[1:]
    if production.flow == "unit":
        return _canonical(grammar, production.symbols[0], children[0])
    if production.flow == "branch":
        split, *bodies, join = children
        first, body, last = production.symbols
        bodies = [_canonical(grammar, body, b) for b in bodies]
        ends = (grammar.families[first][split], grammar.families[last][join])
        if all(getattr(end, "symmetric", False) for end in ends):
            bodies.sort(key=json.dumps)
        return (production.name, split, *bodies, join)
    symbols = symbols_of(production, len(children))
    found = [_canonical(grammar, s, child) for s, child in zip(symbols, children, strict=True)]
    if production.flow == "bracket" and all(_neutral(grammar, symbols[i], found[i]) for i in (0, 2)):
        placed = _in_place(grammar, symbol, symbols[1], found[1])
        return (production.name, *found) if placed is None else placed
    if not production.is_run:
        return (production.name, *found)
    inner = symbols[0]
    flat = [part for child in found for part in _parts(production, child)]
    kept = [part for part in flat if not (isinstance(part, str) and _neutral(grammar, inner, part))]
    if len(kept) > 1:
        return (production.name, *kept)
    placed = _in_place(grammar, symbol, inner, kept[0] if kept else next(neutral_names(grammar, inner)))
    return (production.name, *flat) if placed is None else placed


def _parts(production: Production, child: Tree) -> Sequence[Tree]:
    return child[1:] if isinstance(child, tuple) and child[0] == production.name else (child,)


def _neutral(grammar: Grammar, symbol: str, name: Tree) -> bool:
    if not isinstance(name, str):
        return False
    family = grammar.family_of(symbol, name)
    terminal = grammar.families[family][name] if family is not None else None
    return isinstance(terminal, Operation) and terminal.neutral


def _in_place(grammar: Grammar, symbol: str, inner: str, node: Tree) -> Tree | None:
    """What ``inner`` derives, in the place of ``symbol``: padded with a neutral part where it cannot stand alone, and
    None where that is no derivation either."""
    stands = (
        grammar.family_of(symbol, node) is not None
        if isinstance(node, str)
        else grammar.production(symbol, node[0]) is not None
    )
    if stands:
        return node
    run = next((p for p in grammar.rules[symbol] if p.is_run and p.symbols[0] == inner), None)
    neutral = next(neutral_names(grammar, inner), None)
    return None if run is None or neutral is None else (run.name, neutral, node)


def neutral_names(grammar: Grammar, symbol: str) -> Iterator[str]:
    """The terminals that may stand bare in a symbol's place and change nothing."""
    for family, members in grammar.families.items():
        for name in members:
            if grammar.family_of(symbol, name) == family and _neutral(grammar, symbol, name):
                yield name


def replace(tree: Tree, site: Site, node: Tree) -> Tree:
    """The tree with something else at a place; a run in the place of a run's part becomes part of it."""

    def at(current: Tree, path: Path) -> Tree:
        if path:
            children = list(current)
            child = at(children[path[0]], path[1:])
            children[path[0]] = child
            return tuple(children)
        if site.start is None or site.stop is None:
            return node
        parts = current[1:]
        return (current[0], *parts[: site.start], node, *parts[site.stop :])

    return at(tree, site.path)
