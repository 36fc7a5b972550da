"""From a derivation to a torch module and to a drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from archfront.spaces.grammars.derivation import Tree, along, symbols_of
from archfront.spaces.grammars.grammar import Grammar, Join, Operation, Split, State
from archfront.spaces.space import Layer


class Branching(nn.Module):
    """Splits a tensor, runs each part through a body of its own, and joins what comes out."""

    def __init__(self, split: nn.Module, bodies: Sequence[nn.Module], join: nn.Module) -> None:
        super().__init__()
        self.split = split
        self.bodies = nn.ModuleList(bodies)
        self.join = join

    def forward(self, features: Tensor) -> Tensor:
        parts: list[Tensor] = self.split(features)
        joined: Tensor = self.join([body(part) for body, part in zip(self.bodies, parts, strict=True)])
        return joined


def assemble(grammar: Grammar, tree: Tree, state: State) -> tuple[list[nn.Module], State]:
    """The modules of a derivation in the order in which they run, and the state behind them.

    Weights are drawn from torch's global generator; bodies that a split shares are built once for each branch.
    """
    steps, after = _Assembly(grammar).visit(grammar.start, tree, state)
    return _modules(grammar, steps), after


Step = tuple[Operation, State] | nn.Module


class _Assembly:
    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar

    def visit(self, symbol: str, node: Tree, state: State) -> tuple[list[Step], State]:
        grammar = self.grammar
        if isinstance(node, str):
            terminal = grammar.families[grammar.family_of(symbol, node) or symbol][node]
            assert isinstance(terminal, Operation)
            return [(terminal, state)], terminal.infer(state)
        production = grammar.production(symbol, node[0])
        assert production is not None
        if production.flow == "branch":
            return self._branch(production.symbols, node[1:], state)
        symbols = symbols_of(production, len(node) - 1)
        steps: list[Step] = []

        def part(i: int, before: State) -> State:
            more, after = self.visit(symbols[i], node[i + 1], before)
            steps.extend(more)
            return after

        return steps, along(grammar, production, len(symbols), state, part)

    def _branch(self, symbols: tuple[str, ...], children: Sequence[Tree], state: State) -> tuple[list[Step], State]:
        first, body, last = symbols
        split, join = self.grammar.families[first][children[0]], self.grammar.families[last][children[-1]]
        assert isinstance(split, Split)
        assert isinstance(join, Join)
        states = split.infer(state)
        assert states is not None
        written = children[1:-1]
        bodies, ends = [], []
        for i, inner in enumerate(states):
            steps, end = self.visit(body, written[0 if split.shared else i], inner)
            modules = _modules(self.grammar, steps)
            bodies.append(modules[0] if len(modules) == 1 else nn.Sequential(*modules))
            ends.append(end)
        joined = tuple(ends)
        return [Branching(split.build(state), bodies, join.build(joined))], join.infer(joined)


def _modules(grammar: Grammar, steps: Sequence[Step]) -> list[nn.Module]:
    """Modules of steps; stretches of operations are offered to the grammar's own fusion."""
    modules: list[nn.Module] = []
    stretch: list[tuple[Operation, State]] = []

    def close() -> None:
        if grammar.fuse is not None:
            modules.extend(grammar.fuse(stretch))
        else:
            modules.extend(operation.build(state) for operation, state in stretch if not operation.neutral)
        stretch.clear()

    for step in steps:
        if isinstance(step, nn.Module):
            close()
            modules.append(step)
        else:
            stretch.append(step)
    close()
    return modules or [nn.Identity()]


def draw_layers(grammar: Grammar, tree: Tree, state: State) -> list[Layer]:
    """A derivation as layers: one for each terminal, branches side by side in ``Layer.branches``."""
    layers, _ = _draw(grammar, grammar.start, tree, state, "")
    return layers


def _draw(grammar: Grammar, symbol: str, node: Tree, state: State, prefix: str) -> tuple[list[Layer], State]:
    if isinstance(node, str):
        terminal = grammar.families[grammar.family_of(symbol, node) or symbol][node]
        assert isinstance(terminal, Operation)
        after = terminal.infer(state)
        cost = terminal.cost(state, after)
        facts = {"params": cost.params, "macs": cost.macs}
        shape = tuple(getattr(after, "shape", ()))
        size = 0.0 if terminal.neutral else 1.0 + cost.macs
        return [Layer(name=prefix or "1", kind=node, shape=shape, size=size, details=facts)], after
    production = grammar.production(symbol, node[0])
    assert production is not None
    if production.flow == "branch":
        first, body, last = production.symbols
        split, join = grammar.families[first][node[1]], grammar.families[last][node[-1]]
        assert isinstance(split, Split)
        assert isinstance(join, Join)
        states = split.infer(state)
        assert states is not None
        lanes, ends = [], []
        for i, inner in enumerate(node[2:-1]):
            lane, end = _draw(grammar, body, inner, states[i], f"{prefix}{chr(97 + i % 26)}")
            lanes.append(tuple(lane))
            ends.append(end)
        after = join.infer(tuple(ends * split.branches if split.shared else ends))
        details: dict[str, Any] = {"copies": split.branches} if split.shared else {}
        kind = f"{split.name} … {join.name}"
        shape = tuple(getattr(after, "shape", ()))
        row = Layer(name=prefix or "1", kind=kind, shape=shape, details=details, branches=tuple(lanes))
        return [row], after
    symbols = symbols_of(production, len(node) - 1)
    layers: list[Layer] = []

    def part(i: int, before: State) -> State:
        own = f"{prefix}{'.' if prefix else ''}{i + 1}" if production.flow == "chain" else prefix
        more, after = _draw(grammar, symbols[i], node[i + 1], before, own)
        layers.extend(more)
        return after

    return layers, along(grammar, production, len(symbols), state, part)


class Head(nn.Module):
    """Mean over all axes behind the first, then a linear classifier of that first axis."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim > 2:
            features = features.flatten(2).mean(dim=2)
        logits: Tensor = self.linear(features)
        return logits


class Function(nn.Module):
    """A function without weights, named for printing."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def forward(self, features: Any) -> Any:
        return self.function(features)

    def extra_repr(self) -> str:
        return self.name
