"""Drawing derivations: by the grammar's probabilities among what fits the state and is within the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from archfront.errors import InputError
from archfront.spaces.grammars.derivation import Totals, Tree, along
from archfront.spaces.grammars.grammar import Cost, Grammar, Join, Operation, Production, Split, State, Terminal

Observer = Callable[[str, str, bool], None]
"""Told of every draw of a production: (symbol, production, whether no option had been taken away)."""

_BODIES = 4
# Expansions before a draw begins anew, with dead ends: some per draw, some per terminal that a budget admits.
_STEPS, _STEPS_EACH = 1000, 4
_RESTARTS = 200


@dataclass(frozen=True)
class Budget:
    """The most that a model may have; None: no bound.

    Attributes:
        params, macs, activations: of the derivation, copies included (see ``Cost``).
        depth: nodes around a terminal.
        terminals: copies included.
    """

    params: int | None = None
    macs: int | None = None
    activations: int | None = None
    depth: int = 100
    terminals: int = 1000

    def admits(self, params: int, macs: int, activations: int) -> bool:
        return (
            (self.params is None or params <= self.params)
            and (self.macs is None or macs <= self.macs)
            and (self.activations is None or activations <= self.activations)
        )


class _DeadEndError(Exception):
    """Nothing fits here: whoever chose the way tries another."""


class _TooLongError(Exception):
    """So many dead ends that beginning anew is quicker."""


class Sampler:
    """Draws derivations of a grammar.

    An expansion draws a production by weight among those that the budget leaves, and a terminal uniformly among those
    that fit. Where nothing fits, the production that led there is taken away and another one drawn; a branch first
    tries its last body a few times more. Costs are counted on the way, so that the budget acts as one more condition
    on what fits, and terminals are reserved for what is still to be closed: no finished draw is thrown away for its
    size.

    Args:
        grammar: what to derive.
        budget: bounds.
        rng: the only source of randomness.
        observe: is told of every draw of a production.
    """

    def __init__(
        self, grammar: Grammar, budget: Budget, rng: np.random.Generator, observe: Observer | None = None
    ) -> None:
        self.grammar = grammar
        self.budget = budget
        self._rng = rng
        self._observe = observe
        self._used = Totals()
        self._reserved = 0
        self._steps = 0
        # The least height and the fewest terminals of what begins with a production.
        self._options = {
            symbol: [(p, grammar.production_height(p), grammar.production_terminals(p)) for p in productions]
            for symbol, productions in grammar.rules.items()
        }

    def draw(self, state: State) -> Tree:
        """A whole derivation.

        Raises:
            InputError: the budget leaves no derivation, or hardly any.
        """
        tree = self.expand(self.grammar.start, state)
        if tree is None:
            problem = "leaves nothing that can be derived"
            raise InputError("space", vars(self.budget), problem, "Raise the bounds.")
        return tree[0]

    def expand(
        self,
        symbol: str,
        state: State,
        depth: int = 0,
        copies: int = 1,
        used: Totals | None = None,
        without: str | None = None,
    ) -> tuple[Tree, State] | None:
        """A derivation of a symbol at a place, with the state behind it; None where none was found.

        Args:
            depth, copies: of the place.
            used: what the rest of the model has already.
            without: a production or terminal that must not come first.
        """
        for _ in range(_RESTARTS):
            self._used = Totals() if used is None else used.copy()
            self._reserved = self.grammar.fewest[symbol] * copies
            self._steps = 0
            try:
                return self._expand(symbol, state, depth, copies, without)
            except _TooLongError:
                continue
            except _DeadEndError:
                if without is not None or used is not None:
                    return None
        return None

    def _expand(
        self, symbol: str, state: State, depth: int, copies: int, without: str | None = None
    ) -> tuple[Tree, State]:
        self._steps += 1
        if self._steps > _STEPS + _STEPS_EACH * self._used.terminals:
            raise _TooLongError
        if symbol in self.grammar.families:
            return self._terminal(symbol, state, copies, without)
        self._reserved -= self.grammar.fewest[symbol] * copies
        every = self._options[symbol]
        room = self.budget.terminals - self._used.terminals - self._reserved
        options = [
            (production, fewest)
            for production, height, fewest in every
            if depth + height <= self.budget.depth and fewest * copies <= room and production.name != without
        ]
        whole = len(options) == len(every)
        while options:
            option = self._pick(options)
            chosen, fewest = option
            if self._observe is not None:
                self._observe(symbol, chosen.name, whole)
            mark = (self._used.copy(), self._reserved)
            try:
                self._reserved += fewest * copies
                return self._apply(chosen, state, depth, copies)
            except _DeadEndError:
                self._used, self._reserved = mark
                options.remove(option)
                whole = False
        self._reserved += self.grammar.fewest[symbol] * copies
        raise _DeadEndError

    def _pick(self, options: list[tuple[Production, int]]) -> tuple[Production, int]:
        total = sum(production.weight for production, _ in options)
        point = self._rng.random() * total
        for option in options:
            point -= option[0].weight
            if point < 0:
                return option
        return options[-1]

    def _apply(self, production: Production, state: State, depth: int, copies: int) -> tuple[Tree, State]:
        if production.flow == "unit":
            return self._expand(production.symbols[0], state, depth, copies)
        if production.flow == "branch":
            return self._branch(production, state, depth, copies)
        parts: list[Tree] = []

        def part(i: int, before: State) -> State:
            node, after = self._expand(production.symbols[i], before, depth + 1, copies)
            flat = production.is_run and isinstance(node, tuple) and node[0] == production.name
            parts.extend(node[1:] if flat else [node])
            return after

        state = along(self.grammar, production, len(production.symbols), state, part)
        return (production.name, *parts), state

    def _branch(self, production: Production, state: State, depth: int, copies: int) -> tuple[Tree, State]:
        first, body, last = production.symbols
        split, states = self._split(first, body, state, copies)
        each = copies * split.branches if split.shared else copies
        # Two bodies of the shortest kind were reserved; now it is known how many there will be.
        self._reserved += self.grammar.fewest[body] * copies * (split.branches - 2)
        bodies = states[:1] if split.shared else states
        nodes: list[Tree] = []
        ends: list[State] = []
        for inner in bodies[:-1]:
            node, end = self._expand(body, inner, depth + 1, each)
            nodes.append(node)
            ends.append(end)
        mark = (self._used.copy(), self._reserved)
        for _ in range(_BODIES):
            self._used, self._reserved = mark[0].copy(), mark[1]
            node, end = self._expand(body, bodies[-1], depth + 1, each)
            joined = (end,) * split.branches if split.shared else (*ends, end)
            try:
                join, after = self._join(last, joined, copies)
            except _DeadEndError:
                continue
            return (production.name, split.name, *nodes, node, join), after
        raise _DeadEndError

    def _split(self, family: str, body: str, state: State, copies: int) -> tuple[Split, tuple[State, ...]]:
        for terminal in self._shuffled(family):
            assert isinstance(terminal, Split)
            more = self.grammar.fewest[body] * copies * (terminal.branches - 2)
            if self._used.terminals + self._reserved + more > self.budget.terminals:
                continue
            states = terminal.states(state)
            if states is not None:
                self._commit(Cost(), copies)
                return terminal, states
        raise _DeadEndError

    def _join(self, family: str, states: tuple[State, ...], copies: int) -> tuple[str, State]:
        for terminal in self._shuffled(family):
            assert isinstance(terminal, Join)
            after = terminal.infer(states)
            if after is not None and self._taken(terminal.cost(states, after), copies):
                return terminal.name, after
        raise _DeadEndError

    def _terminal(self, family: str, state: State, copies: int, without: str | None) -> tuple[Tree, State]:
        for terminal in self._shuffled(family):
            assert isinstance(terminal, Operation)
            if terminal.name == without or not terminal.drawn(state):
                continue
            after = terminal.infer(state)
            if after is not None and self._taken(terminal.cost(state, after), copies):
                return terminal.name, after
        raise _DeadEndError

    def _shuffled(self, family: str) -> Iterator[Terminal]:
        """The members in random order, as far as they are looked at: the first that fits is uniform among these."""
        left = list(self.grammar.terminals[family])
        while left:
            yield left.pop(int(self._rng.random() * len(left)))

    def _taken(self, cost: Cost, copies: int) -> bool:
        """Whether the budget has room for a cost, which then is counted."""
        used = self._used
        fits = self.budget.admits(
            used.params + cost.params * copies,
            used.macs + cost.macs * copies,
            used.activations + cost.activations * copies,
        )
        if fits:
            self._commit(cost, copies)
        return fits

    def _commit(self, cost: Cost, copies: int) -> None:
        self._used.add(cost, copies)
        self._reserved -= copies


def other_terminals(grammar: Grammar, family: str, name: str, before: Any) -> list[Terminal]:
    """The members of a family that could stand in the place of one, by the state (of a join: states) before it."""
    present = grammar.families[family][name]
    return [
        terminal
        for terminal in grammar.terminals[family]
        if terminal.name != name
        and type(terminal) is type(present)
        and (not isinstance(terminal, Operation) or terminal.drawn(before))
        and terminal.infer(before) is not None
        and not (
            isinstance(terminal, Split)
            and isinstance(present, Split)
            and (terminal.branches, terminal.shared) != (present.branches, present.shared)
        )
    ]
