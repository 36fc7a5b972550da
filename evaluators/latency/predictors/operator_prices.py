"""What an operator takes: its measured time, or what boosted trees say of one that was never measured.

The trees learn the ratio of the measured time to a roofline: the time to compute at the device's best rate, the time
to move the bytes, and a constant for the call, fitted to the profile (Williams et al., 2009, "Roofline"). So they
correct a model that is right about sizes that no profile has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from archfront.errors import InputError
from archfront.evaluators.latency.operators import Operator, tensors
from archfront.evaluators.latency.profile import Profile

LEAST_OPERATORS = 20
_KINDS = ("conv", "linear", "matmul", "attention", "norm", "activation", "softmax", "pool", "copy", "elementwise",
          "view", "other")  # fmt: skip

Vector = npt.NDArray[np.float64]


class OperatorPrices:
    """Prices operators on the device of a profile.

    Args:
        profile: what was measured, at least 20 operators.

    Raises:
        InputError: too few of them to learn from.
    """

    def __init__(self, profile: Profile) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        known = profile.operators
        if len(known) < LEAST_OPERATORS:
            problem = f"has {len(known)} operators"
            raise InputError("latency.profile", profile.digest, problem, f"Profile {LEAST_OPERATORS} or more.")
        self.profile = profile
        ms = np.array([profile.ms[operator.call] for operator in known])
        self._roofline = {kind: _fit_roofline(_sizes(ops), times) for kind, ops, times in _by_kind(known, ms)}
        self._general = _fit_roofline(_sizes(known), ms)
        # Deterministic: a profile of one digest gives the same prices everywhere.
        self._trees = HistGradientBoostingRegressor(
            max_iter=250, learning_rate=0.06, min_samples_leaf=4, l2_regularization=1.0, random_state=0
        )
        self._trees.fit(operator_features(known), np.log(ms / self._baseline(known)))
        self._guessed: dict[str, float] = {}

    def ms(self, operators: Sequence[Operator]) -> tuple[Vector, npt.NDArray[np.bool_]]:
        """``(n,)`` times in ms, and which of them were measured."""
        measured = np.array([operator.call in self.profile.ms for operator in operators], dtype=bool)
        new = list({o.call: o for o, known in zip(operators, measured, strict=True) if not known}.values())
        new = [operator for operator in new if operator.call not in self._guessed]
        if new:
            self._guessed |= zip((o.call for o in new), self.guess(new).tolist(), strict=True)
        prices = [self.profile.ms.get(o.call, self._guessed.get(o.call, 0.0)) for o in operators]
        return np.array(prices, dtype=np.float64), measured

    def guess(self, operators: Sequence[Operator]) -> Vector:
        """``(n,)`` times in ms by the trees alone, measured or not."""
        guessed: Vector = self._baseline(operators) * np.exp(self._trees.predict(operator_features(operators)))
        return guessed

    def _baseline(self, operators: Sequence[Operator]) -> Vector:
        weights = np.stack([self._roofline.get(operator.kind, self._general) for operator in operators])
        return np.asarray((weights * _sizes(operators)).sum(axis=1))


def operator_features(operators: Sequence[Operator]) -> npt.NDArray[np.float64]:
    """``(n, features)`` for trees: kind, sizes on a logarithmic scale, and what a convolution is made of."""
    return np.array([_features(operator) for operator in operators], dtype=np.float64)


def _features(operator: Operator) -> list[float]:
    target, args, _ = json.loads(operator.call)
    shapes = [shape for _, shape in tensors(args)]
    data = shapes[0] if shapes else []
    strided = sum(1 for arg in args if isinstance(arg, dict) and len(arg.get("t", ())) == 3)
    moved = operator.read_bytes + operator.written_bytes
    found = [
        float(_KINDS.index(operator.kind)),
        math.log1p(operator.macs),
        math.log1p(operator.read_bytes),
        math.log1p(operator.written_bytes),
        math.log1p(operator.weight_bytes),
        math.log1p(operator.macs / max(moved, 1) * 100),
        float(strided),
        float(len(data)),
        math.log1p(data[-1]) if data else 0.0,
        math.log1p(math.prod(data[1:-1])) if data else 0.0,
        float(target.split(".")[1].endswith("_")),
    ]
    conv = [0.0] * 6
    if operator.kind == "conv" and len(shapes) > 1 and len(shapes[1]) >= 3:
        out, per_group, *kernel = shapes[1]
        groups = next((a for a in reversed(args) if isinstance(a, int) and not isinstance(a, bool)), 1)
        stride = args[3] if len(args) > 3 and isinstance(args[3], list) else [1]
        conv = [
            float(math.prod(kernel)),
            float(stride[0] if stride else 1),
            float(1 + (groups > 1) + (per_group == 1)),
            math.log1p(per_group),
            math.log1p(out),
            math.log1p(groups),
        ]
    return found + conv


def _sizes(operators: Sequence[Operator]) -> npt.NDArray[np.float64]:
    """``(n, 3)``: giga multiply-adds, gigabytes moved, one call."""
    rows = [(o.macs / 1e9, (o.read_bytes + o.written_bytes) / 1e9, 1.0) for o in operators]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _by_kind(operators: Sequence[Operator], ms: Vector) -> list[tuple[str, list[Operator], Vector]]:
    kinds = np.array([operator.kind for operator in operators])
    found = []
    for kind in sorted(set(kinds)):
        at = np.flatnonzero(kinds == kind).tolist()
        if len(at) >= LEAST_OPERATORS // 2:
            found.append((str(kind), [operators[i] for i in at], ms[at]))
    return found


def _fit_roofline(sizes: npt.NDArray[np.float64], ms: Vector) -> Vector:
    """Non-negative ms per unit of each size, with the least squared relative errors; a call takes some time always."""
    weights = nnls(sizes / ms[:, None], np.ones(len(ms)))[0]
    weights[2] = max(weights[2], 0.2 * float(ms.min()))
    return np.asarray(weights)
