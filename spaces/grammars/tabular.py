"""A small grammar of perceptrons for tables: stacks, residuals, gates and concatenations of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from archfront.errors import InputError
from archfront.spaces.grammars.grammar import Cost, Grammar, Join, Operation, Production, Split
from archfront.spaces.grammars.grammar_space import GrammarSpace, check_positive
from archfront.spaces.grammars.sampling import Budget

if TYPE_CHECKING:
    from torch import nn

Width = int
"""The state: features of a row."""


class Tabular(GrammarSpace):
    """Derivations of N -> N N | (N, N) joined | a layer, on rows of ``in_channels * resolution**2`` features.

    Two branches that read the same are joined by sum, by product (a gate) or end to end. Layers are linear with some
    width, batch norm, dropout, and activations.

    Args:
        resolution, in_channels: of the images whose pixels make a row; a table of f features has the resolution 1
            and f channels.
        classes: of the head.
        widths: of the linear layers.
        params, depth, terminals: bounds; see ``Budget``.

    Raises:
        InputError: an argument cannot be used.
    """

    name: ClassVar[str] = "tabular"

    def __init__(
        self,
        *,
        resolution: int = 8,
        in_channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (8, 16, 32, 64, 128, 256),
        params: int | None = 1_000_000,
        depth: int = 20,
        terminals: int = 60,
    ) -> None:
        numbers = {"resolution": resolution, "in_channels": in_channels, "classes": classes, "params": params,
                   "depth": depth, "terminals": terminals}  # fmt: skip
        check_positive(numbers)
        if not widths or min(widths) < 1 or len(set(widths)) < len(widths):
            raise InputError("space.widths", widths, "are empty, repeated or not positive", "Give each width once.")
        self.resolution, self.in_channels, self.widths = resolution, in_channels, tuple(widths)
        super().__init__(
            grammar=grammar(self.widths),
            initial=in_channels * resolution**2,
            budget=Budget(params=params, depth=depth, terminals=terminals),
            classes=classes,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        names = ("resolution", "in_channels", "classes")
        bounds = {name: getattr(self.budget, name) for name in ("params", "depth", "terminals")}
        return {name: getattr(self, name) for name in names} | {"widths": list(self.widths)} | bounds

    def features(self, state: Width) -> int:
        return state

    def stem(self) -> nn.Module:
        from torch import nn

        return nn.Flatten()


def grammar(widths: tuple[int, ...]) -> Grammar:
    """Each N becomes 0.8 of an N on average, so that derivations end."""
    return Grammar(
        start="N",
        rules={
            "N": [
                Production("stack", "chain", ("N", "N"), 0.25),
                Production("join", "branch", ("split", "N", "with"), 0.15),
                Production("layer", "unit", ("L",), 0.6),
            ]
        },
        terminals={
            "split": [_BOTH],
            "with": [_join("add", _equal), _join("gate", _equal), _join("cat", sum)],
            "L": [
                _layer("identity", neutral=True), *map(_linear, widths), _NORM, _layer("dropout"),
                _layer("relu"), _layer("silu"), _layer("tanh"),
            ],
        },
    )  # fmt: skip


def _linear(width: Width) -> Operation:
    def build(state: Width) -> nn.Module:
        from torch import nn

        return nn.Linear(state, width)

    def cost(before: Width, after: Width) -> Cost:
        return Cost(params=before * after + after, macs=before * after, activations=after)

    return Operation(name=f"linear{width}", infer=lambda _: width, build=build, cost=cost)


def _layer(name: str, *, neutral: bool = False, params: Callable[[Width], int] = lambda _: 0) -> Operation:
    def build(state: Width) -> nn.Module:
        from torch import nn

        makers: dict[str, Callable[[], nn.Module]] = {
            "identity": nn.Identity, "norm": lambda: nn.BatchNorm1d(state), "dropout": lambda: nn.Dropout(0.2),
            "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh,
        }  # fmt: skip
        return makers[name]()

    def cost(before: Width, after: Width) -> Cost:
        return Cost(params=params(before), activations=after)

    return Operation(name=name, infer=lambda state: state, build=build, cost=cost, neutral=neutral)


_NORM = _layer("norm", params=lambda width: 2 * width)


def _both(_state: Width) -> nn.Module:
    from archfront.spaces.grammars.assembly import Function

    return Function("both", lambda features: [features, features])


_BOTH = Split(name="both", branches=2, infer=lambda state: (state, state), build=_both, symmetric=True)


def _equal(states: tuple[Width, ...]) -> Width | None:
    return states[0] if len(set(states)) == 1 else None


def _join(name: str, infer: Callable[[tuple[Width, ...]], Width | None]) -> Join:
    def build(_states: tuple[Width, ...]) -> nn.Module:
        import torch

        from archfront.spaces.grammars.assembly import Function

        functions: dict[str, Callable[[Any], Any]] = {
            "add": sum, "gate": lambda parts: parts[0] * parts[1], "cat": lambda parts: torch.cat(parts, dim=1),
        }  # fmt: skip
        return Function(name, functions[name])

    def cost(_states: tuple[Width, ...], after: Width) -> Cost:
        return Cost(activations=after)

    return Join(name=name, infer=infer, build=build, cost=cost, symmetric=name != "cat")
