"""einspace: one grammar of convolutional networks, transformers, mixers and all that lies between.

Source: Ericsson et al., "einspace: Searching for Neural Architectures from Fundamental Operations", NeurIPS 2024.
Shapes are inferred by rule: no module is made or run to find out whether it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from archfront.errors import InputError
from archfront.spaces.grammars.einspace_seeds import SEEDS
from archfront.spaces.grammars.grammar import Cost, Grammar, Join, Operation, Production, Split
from archfront.spaces.grammars.grammar_space import GrammarSpace, check_positive
from archfront.spaces.grammars.sampling import Budget

if TYPE_CHECKING:
    from torch import nn

LINEAR_WIDTHS = tuple(2**i for i in range(4, 12))
FACTORS = (2, 4, 8)
PATCHES = ((1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (4, 4, 0), (8, 8, 0), (16, 16, 0))
"""im2col's (kernel, stride, padding)."""

PERMUTATIONS = ("21", "132", "213", "231", "312", "321")
COMPUTE_PROBABILITY = 0.32
"""Of M -> C; at 0.3077 or less a derivation would not end with certainty."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a terminal needs to know of its input.

    Attributes:
        shape: without the batch: (channels, height, width), or (tokens, features) after im2col.
        fold: (height, width) of the tokens of the enclosing im2col, for col2im to restore.
    """

    shape: tuple[int, ...]
    fold: tuple[int, int] | None = None

    @property
    def is_image(self) -> bool:
        """Whether there are two spatial axes: the mode 'im'; else 'col'."""
        return len(self.shape) == 3

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def with_shape(self, *shape: int) -> Features:
        return Features(shape, self.fold)


class Einspace(GrammarSpace):
    """Derivations of S -> M M | B M A | P M R; M -> M M | B M A | P M R | C.

    B are splits (clone, group), A joins (dot, scaled dot, add, cat), P and R permutations with im2col and col2im, C
    computations (linear, norm, leaky ReLU, softmax, positional encoding). Widths of ``linear`` act on channels of
    images and on features of tokens. The head averages over all axes behind the first and classifies linearly.

    Args:
        resolution, in_channels, classes: of the images.
        compute: probability of M -> C; the other three productions share the rest.
        params, macs: bounds on the model, head included, for one image.
        activations: bound on the elements of all tensors that operations give, for one image.
        depth: bound on the nesting; the paper's is 100.
        terminals: bound on the leaves, copies counted as often as they occur.

    Raises:
        InputError: an argument cannot be used.
    """

    name: ClassVar[str] = "einspace"

    def __init__(
        self,
        *,
        resolution: int = 32,
        in_channels: int = 3,
        classes: int = 10,
        compute: float = COMPUTE_PROBABILITY,
        params: int | None = 20_000_000,
        macs: int | None = 2_000_000_000,
        activations: int | None = 16_000_000,
        depth: int = 100,
        terminals: int = 1000,
    ) -> None:
        numbers = {"resolution": resolution, "in_channels": in_channels, "classes": classes, "depth": depth,
                   "params": params, "macs": macs, "activations": activations, "terminals": terminals}  # fmt: skip
        check_positive(numbers)
        if not 0 < compute < 1:
            raise InputError("space.compute", compute, "is no probability", "Give a number between 0 and 1.")
        self.resolution, self.in_channels, self.compute = resolution, in_channels, compute
        super().__init__(
            grammar=grammar(compute),
            initial=Features((in_channels, resolution, resolution)),
            budget=Budget(params=params, macs=macs, activations=activations, depth=depth, terminals=terminals),
            classes=classes,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        own = {name: getattr(self, name) for name in ("resolution", "in_channels", "classes", "compute")}
        return own | vars(self.budget)

    @property
    def known(self) -> Mapping[str, Any]:
        """The paper's seeds ``resnet18``, ``resnet18_no_maxpool``, ``wrn16_4``, ``transformer`` and ``mixer``, where
        the space has room for them."""
        return self.members({name: make() for name, make in SEEDS.items()})

    def features(self, state: Features) -> int:
        return state.shape[0]


def grammar(compute: float = COMPUTE_PROBABILITY) -> Grammar:
    """The paper's grammar, with two terminals more that are never drawn but that the mixer among its seeds holds."""
    from archfront.spaces.grammars.einspace_layers import fuse

    modules = ("M", "M")
    composed = [
        Production("sequential", "chain", modules),
        Production("branching", "branch", ("B", "M", "A")),
        Production("routing", "bracket", ("P", "M", "R")),
    ]
    shared = (1 - compute) / 3
    inner = [Production(p.name, p.flow, p.symbols, shared) for p in composed]
    return Grammar(
        start="S",
        rules={"S": composed, "M": [*inner, Production("computation", "unit", ("C",), compute)]},
        terminals={
            "B": [*map(_clone, FACTORS), *(_group(f, axis) for axis in (1, 2, 3) for f in FACTORS)],
            "A": [_dot("dot"), _dot("scaled_dot"), _ADD, *(_cat(f, axis) for axis in (1, 2, 3) for f in FACTORS)],
            "P": [_identity(), *map(_permute, PERMUTATIONS), *(_im2col(*patch) for patch in PATCHES)],
            "R": [_identity(), *map(_permute, PERMUTATIONS), _COL2IM],
            "C": [
                _identity(), *map(_linear, LINEAR_WIDTHS), _NORM, _LEAKY_RELU, _SOFTMAX, _POSITIONS,
                *map(_relative_linear, _RELATIVE),
            ],
        },
        scoped=("fold",),
        fuse=fuse,
    )  # fmt: skip


def _layer(kind: str, *arguments: Any) -> Callable[[Any], nn.Module]:
    """Makes a module of ``einspace_layers`` when one is built: spaces are listed without torch."""

    def build(state: Any) -> nn.Module:
        from archfront.spaces.grammars import einspace_layers

        module: nn.Module = getattr(einspace_layers, kind)(state, *arguments)
        return module

    return build


def _same(state: Features) -> Features:
    return state


def _elementwise(params: Callable[[Features], int] = lambda _: 0) -> Callable[[Features, Features], Cost]:
    return lambda before, after: Cost(params=params(before), activations=after.elements)


def _identity() -> Operation:
    return Operation(name="identity", infer=_same, build=_layer("identity"), neutral=True)


# C: computations.


def _channels(state: Features) -> int:
    """Of images, or features of tokens."""
    return state.shape[0 if state.is_image else 1]


def _linear_of(name: str, width: Callable[[Features], int | None], *, drawn: bool = True) -> Operation:
    def infer(state: Features) -> Features | None:
        wanted = width(state)
        if wanted is None:
            return None
        return (
            state.with_shape(wanted, *state.shape[1:]) if state.is_image else state.with_shape(state.shape[0], wanted)
        )

    def cost(before: Features, after: Features) -> Cost:
        incoming, outgoing = _channels(before), _channels(after)
        params = incoming * outgoing + outgoing
        return Cost(params=params, macs=after.elements * incoming, activations=after.elements)

    return Operation(name=name, infer=infer, build=_layer("linear", width), cost=cost, drawn=lambda _: drawn)


def _linear(width: int) -> Operation:
    return _linear_of(f"linear{width}", lambda _: width)


_RELATIVE = {"linear_x4": (4, 1), "linear_4th": (1, 4)}
"""Widths by the input's, which the mixer needs: terminals of the seeds, outside of the paper's sampled set."""


def _relative_linear(name: str) -> Operation:
    times, divided = _RELATIVE[name]

    def width(state: Features) -> int | None:
        wanted, rest = divmod(_channels(state) * times, divided)
        return wanted if wanted and not rest else None

    return _linear_of(name, width, drawn=False)


_NORM = Operation(name="norm", infer=_same, build=_layer("norm"), cost=_elementwise(lambda s: 2 * _channels(s)))
_LEAKY_RELU = Operation(name="leaky_relu", infer=_same, build=_layer("leaky_relu"), cost=_elementwise())
_SOFTMAX = Operation(name="softmax", infer=_same, build=_layer("softmax"), cost=_elementwise())
_POSITIONS = Operation(
    name="positional", infer=_same, build=_layer("positional"), cost=_elementwise(lambda s: s.elements)
)


# P and R: routing.


def _permute(order: str) -> Operation:
    axes = [int(digit) - 1 for digit in order]

    def infer(state: Features) -> Features | None:
        if len(axes) != len(state.shape):
            return None
        return state.with_shape(*(state.shape[axis] for axis in axes))

    return Operation(name=f"permute{order}", infer=infer, build=_layer("permute", axes), cost=_elementwise())


def _im2col(kernel: int, stride: int, padding: int) -> Operation:
    def infer(state: Features) -> Features | None:
        if not state.is_image or kernel > min(state.shape[1:]) + 2 * padding:
            return None
        channels, *size = state.shape
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in size)
        return Features((height * width, channels * kernel * kernel), (height, width))

    return Operation(
        name=f"im2col{kernel}x{kernel}s{stride}p{padding}",
        infer=infer,
        build=_layer("im2col", kernel, stride, padding),
        cost=_elementwise(),
        # A kernel larger than the image is never drawn, though padding makes it possible and the seeds have some.
        drawn=lambda state: kernel <= min(state.shape[1:]),
    )


def _col2im(state: Features) -> Features | None:
    if state.is_image or state.fold is None or math.prod(state.fold) != state.shape[0]:
        return None
    return state.with_shape(state.shape[1], *state.fold)


_COL2IM = Operation(name="col2im", infer=_col2im, build=_layer("col2im"), cost=_elementwise())


# B and A: branching.


def _clone(factor: int) -> Split:
    return Split(
        name=f"clone{factor}", branches=factor, shared=factor > 2, symmetric=True,
        infer=lambda state: (state,) * factor, build=_layer("clone", factor),
    )  # fmt: skip


def _group(factor: int, axis: int) -> Split:
    def infer(state: Features) -> tuple[Features, ...] | None:
        if axis > len(state.shape) or state.shape[axis - 1] % factor:
            return None
        shape = list(state.shape)
        shape[axis - 1] //= factor
        return (state.with_shape(*shape),) * factor

    return Split(
        name=f"group{factor}d{axis}", branches=factor, shared=factor > 2, infer=infer,
        build=_layer("group", factor, axis),
    )  # fmt: skip


def _dot(name: str) -> Join:
    def infer(states: tuple[Features, ...]) -> Features | None:
        if len(states) != 2:
            return None
        left, right = (state.shape for state in states)
        if len(left) != len(right) or left[:-2] != right[:-2] or left[-1] != right[-2]:
            return None
        return states[0].with_shape(*left[:-1], right[-1])

    def cost(states: tuple[Features, ...], after: Features) -> Cost:
        return Cost(macs=after.elements * states[0].shape[-1], activations=after.elements)

    return Join(name=name, infer=infer, build=_layer(name), cost=cost)


def _joined(_states: tuple[Features, ...], after: Features) -> Cost:
    return Cost(activations=after.elements)


def _add(states: tuple[Features, ...]) -> Features | None:
    return states[0] if all(state.shape == states[0].shape for state in states) else None


_ADD = Join(name="add", infer=_add, build=_layer("add"), cost=_joined, symmetric=True)


def _cat(factor: int, axis: int) -> Join:
    def infer(states: tuple[Features, ...]) -> Features | None:
        first = states[0].shape
        if len(states) != factor or axis > len(first):
            return None
        rest = {(*s.shape[: axis - 1], *s.shape[axis:]) for s in states}
        if len(rest) > 1 or any(len(s.shape) != len(first) for s in states):
            return None
        shape = list(first)
        shape[axis - 1] = sum(s.shape[axis - 1] for s in states)
        return states[0].with_shape(*shape)

    return Join(name=f"cat{factor}d{axis}", infer=infer, build=_layer("cat", axis), cost=_joined)
