"""Bases of one-dimensional functions for KAN layers, all with the same number of functions.

Source: Kolmogorov-Arnold networks with a choice of basis in each layer, in the style of S-KAN. Each basis is written
for standardised inputs, over the range that 99 % of them fall in: what lies in ``[-RANGE, RANGE]`` is spread over the
basis's own domain.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from archfront.errors import InputError, suggestion

RANGE = 2.5
LEAST_FUNCTIONS = 4
"""A cubic spline has no fewer."""


class Basis(nn.Module, ABC):
    """So many functions of each input: ``(...)`` to ``(..., functions)``; a subclass says which.

    A basis has no parameters, so that layers of different bases have equally many.
    """

    name: ClassVar[str]
    factor: float = 1.0
    """What the functions are multiplied by."""

    def __init__(self, functions: int) -> None:
        super().__init__()
        self.functions = functions

    @abstractmethod
    def values(self, inputs: Tensor) -> Tensor:
        """The functions as they are in books."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.values(inputs) * self.factor


class _Placed(Basis):
    """A basis of copies of one function at even distances."""

    def __init__(self, functions: int) -> None:
        super().__init__(functions)
        self.spacing = 2 * RANGE / (functions - 1)
        self.register_buffer("centres", torch.linspace(-RANGE, RANGE, functions), persistent=False)

    def offsets(self, inputs: Tensor) -> Tensor:
        """Distance to each centre, in spacings."""
        centres: Tensor = self.get_buffer("centres")
        return (inputs[..., None] - centres) / self.spacing


class Gaussian(_Placed):
    """Radial basis functions ``exp(-d^2)``, d in spacings."""

    name = "gaussian"

    def values(self, inputs: Tensor) -> Tensor:
        return self.offsets(inputs).square().neg().exp()


class MexicanHat(_Placed):
    """Wavelets: the negated second derivative of a Gaussian, of mean 0, as wide as a spacing."""

    name = "mexican-hat"

    def values(self, inputs: Tensor) -> Tensor:
        squares = self.offsets(inputs).square()
        return (1 - squares) * (-squares / 2).exp()


class Silu(_Placed):
    """Shifted ``z * sigmoid(z)``, z in spacings."""

    name = "silu"

    def values(self, inputs: Tensor) -> Tensor:
        return nn.functional.silu(self.offsets(inputs))


class Relu(_Placed):
    """Hinges ``max(0, z + 1)``, z in spacings: piecewise linear functions.

    They bend one spacing before the centres: a hinge at the range's end would be 0 all over it.
    """

    name = "relu"

    def values(self, inputs: Tensor) -> Tensor:
        return (self.offsets(inputs) + 1).relu()


class BSpline(Basis):
    """Cubic B-splines on even knots (Cox and de Boor); inputs beyond the range count as at its end."""

    name = "bspline"
    _degree = 3

    def __init__(self, functions: int) -> None:
        super().__init__(functions)
        step = 2 * RANGE / (functions - self._degree)
        places = torch.arange(functions + self._degree + 1, dtype=torch.float32) - self._degree
        self.register_buffer("knots", places * step - RANGE, persistent=False)
        self.step = step

    def values(self, inputs: Tensor) -> Tensor:
        knots: Tensor = self.get_buffer("knots")
        # The last interval is open, so the end itself must stay just inside.
        places = inputs.clamp(-RANGE, RANGE * (1 - 1e-6))[..., None]
        values = ((places >= knots[:-1]) & (places < knots[1:])).to(inputs.dtype)
        for degree in range(1, self._degree + 1):
            width = degree * self.step
            rising = (places - knots[: -degree - 1]) / width * values[..., :-1]
            falling = (knots[degree + 1 :] - places) / width * values[..., 1:]
            values = rising + falling
        return values


class Chebyshev(Basis):
    """Polynomials T_0, T_1... of the first kind; inputs beyond the range count as at its end."""

    name = "chebyshev"

    def values(self, inputs: Tensor) -> Tensor:
        places = (inputs / RANGE).clamp(-1, 1)
        values = [torch.ones_like(places), places]
        while len(values) < self.functions:
            values.append(2 * places * values[-1] - values[-2])
        return torch.stack(values[: self.functions], dim=-1)


class Fourier(Basis):
    """sin and cos of 1, 2... periods over the range."""

    name = "fourier"

    def __init__(self, functions: int) -> None:
        super().__init__(functions)
        rates = torch.arange(functions) // 2 + 1
        self.register_buffer("rates", rates * (math.pi / RANGE), persistent=False)
        self.register_buffer("phases", (torch.arange(functions) % 2) * (math.pi / 2), persistent=False)

    def values(self, inputs: Tensor) -> Tensor:
        return (inputs[..., None] * self.get_buffer("rates") + self.get_buffer("phases")).sin()


BASES: dict[str, type[Basis]] = {
    basis.name: basis for basis in (BSpline, Chebyshev, MexicanHat, Gaussian, Fourier, Silu, Relu)
}


def basis(name: str, functions: int) -> Basis:
    """A basis by name, its functions divided by their root mean square over the range: in a mixture none has a head
    start, and one learning rate suits all.

    Raises:
        InputError: an unknown name, or fewer than ``LEAST_FUNCTIONS``.
    """
    if name not in BASES:
        raise InputError("space.pool", name, "is not a known basis", suggestion(name, BASES))
    if functions < LEAST_FUNCTIONS:
        raise InputError("space.functions", functions, "are too few", f"Give {LEAST_FUNCTIONS} or more.")
    made = BASES[name](functions)
    made.factor = _factor(name, functions)
    return made


@lru_cache(maxsize=256)
def _factor(name: str, functions: int) -> float:
    with torch.device("cpu"), torch.no_grad():
        grid = torch.linspace(-RANGE, RANGE, 1001)
        return float(BASES[name](functions)(grid).square().mean().rsqrt())
