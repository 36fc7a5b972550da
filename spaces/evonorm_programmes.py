"""Normalisation-activation layers as tensor programmes: the programme as data, and its evaluation in torch.

Source: Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020 (EvoNorm).

A value is kept as small as broadcasting allows: ``(n|1, c|1, h|1, w|1)``. A moment of such a value is the moment of the
value spread over the input's whole shape, because spreading repeats every element equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archfront.errors import InputError, suggestion

INITIAL = ("x", "zeros", "v0", "v1")
BINARY = ("add", "mul", "div", "max")
COMMUTATIVE = ("add", "mul", "max")
UNARY = ("neg", "sigmoid", "tanh", "exp", "log", "abs", "square", "sqrt")
STATISTICS = ("mean", "rms", "std")
AXES = ("bhw", "hw", "hwc", "hwg")
MOMENTS = tuple(f"{statistic}_{axes}" for statistic in STATISTICS for axes in AXES)
OPERATIONS = (*BINARY, *UNARY, *MOMENTS)
TINY = 1e-6
"""Where a divisor, logarithm or square root would leave the finite numbers it is kept this far from 0, so that v0,
which begins at 0, has a gradient; values of ordinary size are exact to float32's rounding."""

_DIMENSIONS = {"bhw": (0, 2, 3), "hw": (2, 3), "hwc": (1, 2, 3)}
_SYMBOLS = {"add": "{} + {}", "mul": "{} * {}", "div": "{} / {}", "max": "max({}, {})", "neg": "-{}"}


@dataclass(frozen=True)
class Node:
    """One operation. Inputs count the initial values first (``INITIAL``), then the nodes; unary ones have no second."""

    operation: str
    first: int
    second: int | None = None


@dataclass(frozen=True)
class Programme:
    """Nodes in an order in which each needs earlier values only; the last one is the programme's value."""

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, *lines: tuple[str, str] | tuple[str, str, str]) -> Programme:
        """A programme from ``(operation, input[, input])`` in names; nodes are called ``n0``, ``n1``...

        Raises:
            InputError: an unknown operation, or an input that does not come earlier.
        """
        names = list(INITIAL)
        nodes = []
        for operation, *inputs in lines:
            if operation not in OPERATIONS:
                problem = "is not an operation of tensor programmes"
                raise InputError("programme.operation", operation, problem, suggestion(operation, OPERATIONS))
            wanted = 2 if operation in BINARY else 1
            if len(inputs) != wanted:
                raise InputError("programme.inputs", inputs, f"do not fit {operation}", f"Give {wanted}.")
            for name in inputs:
                if name not in names:
                    raise InputError("programme.input", name, "does not come earlier", suggestion(name, names))
            nodes.append(Node(operation, *(names.index(name) for name in inputs)))
            names.append(f"n{len(nodes) - 1}")
        return cls(tuple(nodes))

    def live(self) -> Programme:
        """The same without nodes that do not reach the last one."""
        reached = {len(INITIAL) + len(self.nodes) - 1}
        for index in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[index]
            if len(INITIAL) + index in reached:
                reached |= {node.first} if node.second is None else {node.first, node.second}
        places = {i: i for i in range(len(INITIAL))}
        kept: list[Node] = []
        for index, node in enumerate(self.nodes):
            if len(INITIAL) + index in reached:
                places[len(INITIAL) + index] = len(INITIAL) + len(kept)
                second = None if node.second is None else places[node.second]
                kept.append(Node(node.operation, places[node.first], second))
        return Programme(tuple(kept))

    def uses(self, initial: str) -> bool:
        """Whether a node takes one of the initial values."""
        place = INITIAL.index(initial)
        return any(place in (node.first, node.second) for node in self.nodes)

    def expression(self) -> str:
        """The value as a formula; values used twice are written out twice."""
        texts = list(INITIAL)
        atoms = set(texts)
        for node in self.nodes:
            pattern = _SYMBOLS.get(node.operation, node.operation + "({})")
            inputs = [texts[i] for i in (node.first, node.second) if i is not None]
            called = pattern.endswith(")")
            text = pattern.format(*(text if called or text in atoms else f"({text})" for text in inputs))
            # Formulas of shared values can double with every node.
            texts.append(text if len(text) <= 400 else f"{node.operation}(...)")
            if called or len(text) > 400:
                atoms.add(texts[-1])
        return texts[-1]


NAMED: dict[str, Programme] = {
    "bn-relu": Programme.of(
        ("mean_bhw", "x"),
        ("neg", "n0"),
        ("add", "x", "n1"),
        ("std_bhw", "x"),
        ("div", "n2", "n3"),
        ("mul", "n4", "v1"),
        ("add", "n5", "v0"),
        ("max", "n6", "zeros"),
    ),
    "evonorm-b0": Programme.of(
        ("mul", "v1", "x"),
        ("std_hw", "x"),
        ("add", "n0", "n1"),
        ("std_bhw", "x"),
        ("max", "n3", "n2"),
        ("div", "x", "n4"),
    ),
    "evonorm-b2": Programme.of(
        ("rms_hw", "x"),
        ("neg", "x"),
        ("add", "n0", "n1"),
        ("std_bhw", "x"),
        ("max", "n3", "n2"),
        ("div", "x", "n4"),
    ),
    "evonorm-s0": Programme.of(
        ("mul", "v1", "x"), ("sigmoid", "n0"), ("mul", "x", "n1"), ("std_hwg", "x"), ("div", "n2", "n3")
    ),
    "evonorm-s1": Programme.of(("sigmoid", "x"), ("mul", "x", "n0"), ("std_hwg", "x"), ("div", "n1", "n2")),
    "evonorm-s2": Programme.of(("sigmoid", "x"), ("mul", "x", "n0"), ("rms_hwg", "x"), ("div", "n1", "n2")),
}
"""Published layers. Batch normalisation's own scale and shift are v1 and v0: in this space the affine comes last."""


class ProgrammeLayer(nn.Module):
    """A programme in the place of normalisation and activation: ``(n, channels, h, w)`` to the same shape.

    Moments over the batch are of the batch in training and moving averages afterwards (variance with Bessel's
    correction, as torch's and timm's layers keep it); all other moments are always of the input.

    Args:
        programme: its dead nodes are left out.
        channels: of the input.
        activation: False keeps the affine alone, as EvoNorm does where a network has no activation.
        zero_init: begin with a scale of 0, for the last layer of a residual branch.
        groups: of channels for ``hwg``, lowered until they divide the channels.
        epsilon: added below the square root of ``std`` and ``rms``.
        momentum: weight of a batch in the moving averages.
    """

    def __init__(
        self,
        programme: Programme,
        channels: int,
        *,
        activation: bool = True,
        zero_init: bool = False,
        groups: int = 32,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.programme = programme.live() if activation else None
        self.groups = next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0)
        self.epsilon, self.momentum = epsilon, momentum
        self.weight = nn.Parameter(torch.zeros(channels) if zero_init else torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if self.programme is None:
            return
        for name, start in (("v0", 0.0), ("v1", 1.0)):
            if self.programme.uses(name):
                self.register_parameter(name, nn.Parameter(torch.full((channels,), start)))
        for i, node in enumerate(self.programme.nodes):
            if node.operation.endswith("_bhw"):
                start = 0.0 if node.operation == "mean_bhw" else 1.0
                self.register_buffer(f"running{i}", torch.full((channels,), start))

    def forward(self, features: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        value = features if self.programme is None else self._value(self.programme.nodes, features)
        result = value * self.weight.to(features.dtype).view(shape) + self.bias.to(features.dtype).view(shape)
        return result.expand_as(features)

    def _value(self, nodes: Sequence[Node], features: Tensor) -> Tensor:
        values: list[Tensor] = [features, features.new_zeros(1, 1, 1, 1)]
        for name in ("v0", "v1"):
            parameter = getattr(self, name, None)
            values.append(values[1] if parameter is None else parameter.to(features.dtype).view(1, -1, 1, 1))
        for i, node in enumerate(nodes):
            first = values[node.first]
            if node.second is not None:
                values.append(_binary(node.operation, first, values[node.second]))
            elif node.operation in UNARY:
                values.append(_unary(node.operation, first))
            else:
                # Squares of half-precision values overflow.
                wide = first.float() if first.element_size() < 4 else first
                values.append(self._moment(node.operation, wide, i, features).to(features.dtype))
        return values[-1]

    def _moment(self, operation: str, value: Tensor, index: int, features: Tensor) -> Tensor:
        statistic, axes = operation.split("_")
        if axes == "bhw":
            return self._rooted(statistic, self._over_batch(statistic, value, index, features))
        if axes != "hwg":
            return self._rooted(statistic, _statistic(statistic, value, _DIMENSIONS[axes]))
        count, channels, height, width = value.shape
        if channels == 1:
            return self._rooted(statistic, _statistic(statistic, value, _DIMENSIONS["hw"]))
        grouped = value.reshape(count, self.groups, channels // self.groups, height, width)
        found = self._rooted(statistic, _statistic(statistic, grouped, (2, 3, 4)))
        return found.expand(-1, -1, channels // self.groups, 1, 1).reshape(count, channels, 1, 1)

    def _over_batch(self, statistic: str, value: Tensor, index: int, features: Tensor) -> Tensor:
        running: Tensor = getattr(self, f"running{index}")
        if not self.training:
            return running.view(1, -1, 1, 1)
        found = _statistic(statistic, value, _DIMENSIONS["bhw"])
        with torch.no_grad():
            elements = features.numel() // features.shape[1]
            correction = elements / max(elements - 1, 1) if statistic == "std" else 1.0
            running.mul_(1 - self.momentum).add_(found.detach().flatten() * (self.momentum * correction))
        return found

    def _rooted(self, statistic: str, found: Tensor) -> Tensor:
        return found if statistic == "mean" else (found + self.epsilon).sqrt()

    def extra_repr(self) -> str:
        return "affine" if self.programme is None else self.programme.expression()


def _statistic(statistic: str, value: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    """Mean, mean square (``rms``) or biased variance (``std``), dimensions kept."""
    if statistic == "std":
        return value.var(dim=dimensions, correction=0, keepdim=True)
    return (value.square() if statistic == "rms" else value).mean(dim=dimensions, keepdim=True)


def _binary(operation: str, first: Tensor, second: Tensor) -> Tensor:
    if operation == "add":
        return first + second
    if operation == "mul":
        return first * second
    if operation == "max":
        return torch.maximum(first, second)
    nearest = torch.where(second < 0, -TINY, TINY)
    return first / torch.where(second.abs() < TINY, nearest.to(second.dtype), second)


def _unary(operation: str, value: Tensor) -> Tensor:
    match operation:
        case "neg":
            return -value
        case "sigmoid":
            return value.sigmoid()
        case "tanh":
            return value.tanh()
        case "exp":
            return value.exp()
        case "log":
            return (value.abs() + TINY).log()
        case "abs":
            return value.abs()
        case "square":
            return value.square()
        case _:
            # The root with the value's sign, by a form whose slope at 0 is finite.
            return value * (value.abs() + TINY).rsqrt()
