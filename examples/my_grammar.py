"""A grammar of your own: networks of 1-D convolutions for signals, some of them side by side."""

import torch
from torch import nn

from archfront.spaces.grammars.grammar import Cost, Grammar, Join, Operation, Production, Split
from archfront.spaces.grammars.grammar_space import GrammarSpace
from archfront.spaces.grammars.sampling import Budget

# The state of a tensor is (channels, length). A terminal says which state it leaves behind, or None: it does not fit.


def conv(channels, kernel):
    def cost(before, after):
        weights = before[0] * channels * kernel
        return Cost(params=weights + channels, macs=weights * after[1])

    return Operation(
        name=f"conv{kernel}_{channels}",
        infer=lambda state: (channels, state[1]),
        build=lambda state: nn.Conv1d(state[0], channels, kernel, padding=kernel // 2),
        cost=cost,
    )


def layer(name, module, params=0):  # params: per channel
    return Operation(name=name, infer=lambda s: s, build=module, cost=lambda before, _: Cost(params=params * before[0]))


class Each(nn.Module):
    """Hands its input to every branch."""

    def forward(self, signal):
        return [signal, signal]


class Sum(nn.Module):
    """Adds the branches."""

    def forward(self, parts):
        return parts[0] + parts[1]


class Stack(nn.Module):
    """Puts the branches' channels one behind the other."""

    def forward(self, parts):
        return torch.cat(parts, dim=1)


def stacked(states):
    first, second = states
    return (first[0] + second[0], first[1]) if first[1] == second[1] else None


GRAMMAR = Grammar(
    start="Net",
    rules={
        "Net": [
            Production("then", "chain", ("Net", "Net"), 0.3),
            Production("beside", "branch", ("each", "Net", "together"), 0.1),
            Production("one", "unit", ("layer",), 0.6),
        ]
    },
    terminals={
        "layer": [
            *(conv(channels, kernel) for channels in (4, 8, 16, 32) for kernel in (1, 3, 9)),
            layer("norm", lambda state: nn.BatchNorm1d(state[0]), params=2),
            layer("relu", lambda _: nn.ReLU()),
            Operation(
                name="halve",
                infer=lambda state: (state[0], state[1] // 2) if state[1] > 1 else None,
                build=lambda _: nn.MaxPool1d(2),
            ),
        ],
        "each": [Split(name="each", branches=2, infer=lambda s: (s, s), build=lambda _: Each(), symmetric=True)],
        "together": [
            Join(name="sum", infer=lambda s: s[0] if s[0] == s[1] else None, build=lambda _: Sum(), symmetric=True),
            Join(name="stack", infer=stacked, build=lambda _: Stack()),
        ],
    },
)


class Signals(GrammarSpace):
    """Classifiers of signals: the rows of an image, one after the other, as one signal."""

    name = "signals"

    def __init__(self, *, resolution: int = 8, in_channels: int = 1, classes: int = 10, params: int = 20_000) -> None:
        self.resolution, self.in_channels = resolution, in_channels
        super().__init__(
            grammar=GRAMMAR, initial=(in_channels, resolution**2), classes=classes, budget=Budget(params=params)
        )

    @property
    def config(self):
        names = ("resolution", "in_channels", "classes")
        return {name: getattr(self, name) for name in names} | {"params": self.budget.params}

    def features(self, state):  # what the classifier reads, after a mean over the length
        return state[0]

    def stem(self):
        return nn.Flatten(2)


ARCHFRONT_PLUGINS = {"spaces": {"signals": Signals}}
