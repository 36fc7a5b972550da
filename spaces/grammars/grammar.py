"""A grammar of models as data: symbols, weighted productions, and terminals with the rules of what they may follow.

A derivation is read from the outside in and from the left to the right, and carries a *state* along: whatever the
terminals need to know of the tensor that reaches them (its shape, its layout). A terminal says which state it leaves
behind, or that it does not fit. Everything else (sampling, mutation, crossover, costs, building) follows from the
data, for any grammar: see ``GrammarSpace``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from archfront.errors import InputError

if TYPE_CHECKING:
    from torch import nn

State = Any
"""What is known of the tensor at a place of the model: an immutable value of the grammar's own, compared by ``==``."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a model costs for one input.

    Attributes:
        params: weights.
        macs: multiply-adds of matrix products and convolutions.
        activations: elements of the tensors that it gives.
    """

    params: int = 0
    macs: int = 0
    activations: int = 0


def _free(*_states: State) -> Cost:
    return Cost()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A terminal that takes one tensor and gives one.

    Attributes:
        infer: the state behind it, or None where it does not fit the state before it.
        build: its module, from the state before it.
        cost: from the states before and behind it.
        neutral: it hands on what it is given, so that a model is the same without it.
        drawn: whether it may be drawn behind a state that it fits; what may not still stands in seeds.
    """

    name: str
    infer: Callable[[State], State | None]
    build: Callable[[State], nn.Module]
    cost: Callable[[State, State], Cost] = _free
    neutral: bool = False
    drawn: Callable[[State], bool] = lambda _: True


@dataclass(frozen=True, kw_only=True)
class Split:
    """A terminal that takes one tensor and gives several, one for each branch.

    Attributes:
        branches: how many.
        infer: the state of each branch, or None where it does not fit.
        build: a module that gives a list of tensors.
        shared: the branches hold copies (with weights of their own) of one body, instead of a body each.
        symmetric: all branches get the same.
    """

    name: str
    branches: int
    infer: Callable[[State], tuple[State, ...] | None]
    build: Callable[[State], nn.Module]
    shared: bool = False
    symmetric: bool = False

    def states(self, state: State) -> tuple[State, ...] | None:
        """What ``infer`` gives, checked.

        Raises:
            InputError: not one state for each branch, or unlike ones where the branches share a body.
        """
        found = self.infer(state)
        if found is None:
            return None
        alike = not self.shared or all(one == found[0] for one in found)
        if len(found) != self.branches or not alike:
            problem = f"gives {found} for its {self.branches} branches from {state}"
            remedy = "Give one state for each; equal ones where `shared` is true."
            raise InputError(f"grammar: infer of {self.name}", found, problem, remedy)
        return found


@dataclass(frozen=True, kw_only=True)
class Join:
    """A terminal that takes the branches' tensors and gives one.

    Attributes:
        infer: the state behind it, from the states of the branches, or None where they do not fit together.
        build: a module that takes a list of tensors.
        cost: from the states of the branches and the one behind it.
        symmetric: the order of the branches does not matter.
    """

    name: str
    infer: Callable[[tuple[State, ...]], State | None]
    build: Callable[[tuple[State, ...]], nn.Module]
    cost: Callable[[tuple[State, ...], State], Cost] = _free
    symmetric: bool = False


Terminal = Operation | Split | Join
Flow = Literal["chain", "branch", "bracket", "unit"]


@dataclass(frozen=True)
class Production:
    """One way to go on from a symbol.

    Attributes:
        name: unique among the productions of its symbol; the head of the node in a genotype.
        flow: how the state runs through ``symbols``:
            ``chain``: from each to the next;
            ``branch``: (a split, a body, a join): the body once for each branch;
            ``bracket``: (an opening, a body, a closing): a chain whose closing is told what the opening recorded
            (``Grammar.scoped``);
            ``unit``: one symbol for another, which leaves no node.
        symbols: what comes.
        weight: relative to the other productions of the symbol.
    """

    name: str
    flow: Flow
    symbols: tuple[str, ...]
    weight: float = 1.0

    @property
    def is_run(self) -> bool:
        """A chain of like symbols: written flat, because how it is bracketed does not change the model."""
        return self.flow == "chain" and len(self.symbols) > 1 and len(set(self.symbols)) == 1


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """All models that can be derived from ``start``.

    Attributes:
        start: the first symbol.
        rules: the productions of each symbol that is replaced.
        terminals: the members of each symbol that ends a derivation, drawn uniformly of those that fit.
        scoped: fields of the state (a dataclass) that belong to a bracket: its closing finds them as the opening left
            them, and behind the bracket they are as before it.
        fuse: makes modules of consecutive operations, each with the state before it, e.g. to run two as one; every
            operation on its own where it is None.

    Raises:
        InputError: a symbol is unknown, empty or endless, or stands where its kind cannot.
    """

    start: str
    rules: Mapping[str, Sequence[Production]]
    terminals: Mapping[str, Sequence[Terminal]]
    scoped: tuple[str, ...] = ()
    fuse: Callable[[Sequence[tuple[Operation, State]]], list[nn.Module]] | None = None
    families: dict[str, dict[str, Terminal]] = field(init=False, repr=False)
    heights: dict[str, int] = field(init=False, repr=False)
    fewest: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        families = {symbol: {t.name: t for t in members} for symbol, members in self.terminals.items()}
        object.__setattr__(self, "families", families)
        for symbol, members in self.terminals.items():
            if not members or len(families[symbol]) < len(members):
                problem = "is empty or repeats a name"
                raise InputError(f"grammar.terminals.{symbol}", [m.name for m in members], problem, "Name each once.")
        self._check_rules()
        # The least height of a derivation from each symbol, and its fewest terminals, by repeated relaxation.
        for name, worth in (("heights", _height), ("fewest", _terminals)):
            object.__setattr__(self, name, self._least(worth))

    def production(self, symbol: str, name: str) -> Production | None:
        """The production of a symbol by its name."""
        return next((p for p in self.rules.get(symbol, ()) if p.name == name), None)

    def family_of(self, symbol: str, terminal: str) -> str | None:
        """The symbol of terminals that a bare terminal in a symbol's place belongs to, through unit productions."""
        if symbol in self.families:
            return symbol if terminal in self.families[symbol] else None
        found = (self.family_of(p.symbols[0], terminal) for p in self.rules.get(symbol, ()) if p.flow == "unit")
        return next((family for family in found if family is not None), None)

    def production_height(self, production: Production) -> int:
        """Levels of the lowest derivation that begins with a production."""
        return _height(production, self.heights)

    def production_terminals(self, production: Production) -> int:
        """Terminals of the shortest derivation that begins with a production."""
        return _terminals(production, self.fewest)

    def outline(self) -> dict[str, Any]:
        """Symbols, productions and names, as JSON: part of a space's identity."""
        rules = {s: [[p.name, p.flow, list(p.symbols), p.weight] for p in ps] for s, ps in self.rules.items()}
        return {"start": self.start, "rules": rules, "terminals": {s: list(f) for s, f in self.families.items()}}

    def _check_rules(self) -> None:
        known = {*self.rules, *self.terminals}
        if self.start not in self.rules:
            raise InputError("grammar.start", self.start, "has no productions", f"Give one of {sorted(self.rules)}.")
        self._check_names()
        wanted: dict[str, tuple[type | None, ...]] = {
            "branch": (Split, None, Join), "bracket": (Operation, None, Operation),
        }  # fmt: skip
        for symbol, productions in self.rules.items():
            where = f"grammar.rules.{symbol}"
            if not productions or len({p.name for p in productions}) < len(productions) or symbol in self.terminals:
                problem = "is empty, repeats a name or is a symbol of terminals too"
                raise InputError(where, [p.name for p in productions], problem, "Name each production once.")
            for p in productions:
                unknown = [s for s in p.symbols if s not in known]
                if unknown or not p.symbols or not p.weight > 0:
                    problem = f"uses unknown symbols {unknown}, none, or a weight that is not positive"
                    raise InputError(f"{where}.{p.name}", list(p.symbols), problem, f"Known are {sorted(known)}.")
                if p.flow not in get_args(Flow):
                    raise InputError(f"{where}.{p.name}.flow", p.flow, "is unknown", f"Known: {get_args(Flow)}.")
                plain = tuple(Operation if s in self.terminals else None for s in p.symbols)
                kinds = wanted.get(p.flow, plain[:1] if p.flow == "unit" else plain)
                fits = len(kinds) == len(p.symbols) and all(
                    kind is None or (s in self.terminals and all(isinstance(t, kind) for t in self.terminals[s]))
                    for kind, s in zip(kinds, p.symbols, strict=True)
                )
                if not fits:
                    problem = f"does not fit a {p.flow}"
                    raise InputError(f"{where}.{p.name}", list(p.symbols), problem, "See Production.flow.")

    def _check_names(self) -> None:
        """Names that would be read as something else."""
        made: dict[str, tuple[Flow, tuple[str, ...]]] = {}
        for symbol, productions in self.rules.items():
            for p in productions:
                if made.setdefault(p.name, (p.flow, p.symbols)) != (p.flow, p.symbols):
                    problem = "is another production elsewhere"
                    raise InputError(f"grammar.rules.{symbol}", p.name, problem, "Give each a name of its own.")
            places: dict[str, str] = {}
            for family in self._through_units(symbol, ()):
                for terminal in self.families[family]:
                    if places.setdefault(terminal, family) != family:
                        problem = f"stands in {places[terminal]} and {family}, which both may stand for {symbol}"
                        raise InputError("grammar.terminals", terminal, problem, "Give each a name of its own.")

    def _through_units(self, symbol: str, above: tuple[str, ...]) -> list[str]:
        """The families whose terminals may stand bare in a symbol's place."""
        if symbol in above:
            problem = "leads back to itself by units alone"
            raise InputError(f"grammar.rules.{symbol}", [*above, symbol], problem, "Take one of them away.")
        if symbol in self.families:
            return [symbol]
        units = [p.symbols[0] for p in self.rules.get(symbol, ()) if p.flow == "unit" and p.symbols]
        return [family for inner in units for family in self._through_units(inner, (*above, symbol))]

    def _least(self, worth: Callable[[Production, Mapping[str, int]], int]) -> dict[str, int]:
        least = {symbol: int(worth is _terminals) for symbol in self.terminals}
        for _ in range(len(self.rules) + 1):
            for symbol, productions in self.rules.items():
                found = [worth(p, least) for p in productions if all(s in least for s in p.symbols)]
                if found:
                    least[symbol] = min(found)
        endless = sorted(set(self.rules) - set(least))
        if endless:
            raise InputError("grammar.rules", endless, "never end", "Give them a production that leads to terminals.")
        return least


def _height(production: Production, heights: Mapping[str, int]) -> int:
    # A unit production leaves no node.
    return max(heights[s] for s in production.symbols) + (production.flow != "unit")


def _terminals(production: Production, fewest: Mapping[str, int]) -> int:
    bodies = 2 if production.flow == "branch" else 1
    return sum(fewest[s] * (bodies if i == 1 else 1) for i, s in enumerate(production.symbols))
