"""Conditions on metrics, such as ``latency_ms <= 2 and params < 1e5``: parsed, never evaluated as code."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion

Column = npt.NDArray[np.float64]
_COMPARISONS: dict[type[ast.cmpop], Callable[[Column, float], npt.NDArray[np.bool_]]] = {
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_SYNTAX = "Write METRIC <= NUMBER (or <, >=, >, ==, !=), joined by and, or, not and brackets."
_CONSTRAINT = re.compile(
    r"^\s*(?P<metric>[A-Za-z_]\w*)\s*(?P<sign><=|>=)\s*(?P<bound>[-+0-9.eE_]+)\s*(@\s*(?P<confidence>[0-9.]+)\s*%)?\s*$"
)


@dataclass(frozen=True)
class Constraint:
    """A bound on one metric.

    Attributes:
        upper: True for ``<=``, False for ``>=``.
        confidence: probability with which the true value must hold the bound, e.g. 0.95; None to take the value as
            it is.
    """

    metric: str
    upper: bool
    bound: float
    confidence: float | None = None

    def __str__(self) -> str:
        tail = f" @ {self.confidence:.4%}".rstrip("%").rstrip("0").rstrip(".") + "%" if self.confidence else ""
        return f"{self.metric} {'<=' if self.upper else '>='} {self.bound:g}{tail}"


def parse_constraint(text: str, field: str) -> Constraint:
    """Read ``METRIC <= NUMBER`` or ``METRIC >= NUMBER``, with ``@ PERCENT%`` for a confidence.

    Raises:
        InputError: it is not of that form.
    """
    match = _CONSTRAINT.match(text)
    remedy = "Write METRIC <= NUMBER or METRIC >= NUMBER, e.g. 'latency_ms <= 4' or 'latency_ms <= 4 @ 95%'."
    if match is None:
        raise InputError(field, text, "cannot be parsed as a constraint", remedy)
    try:
        bound = float(match["bound"])
        confidence = None if match["confidence"] is None else float(match["confidence"]) / 100
    except ValueError:
        raise InputError(field, text, "holds something that is no number", remedy) from None
    if confidence is not None and not 0.5 <= confidence < 1:
        raise InputError(field, text, "asks for an impossible confidence", "Give 50% or more, and less than 100%.")
    return Constraint(match["metric"], match["sign"] == "<=", bound, confidence)


class Condition:
    """A parsed condition.

    Raises:
        InputError: the text cannot be parsed, or names an unknown metric.
    """

    def __init__(self, text: str, known: Iterable[str], field: str = "--where") -> None:
        self._text, self._field, self._known = text, field, set(known)
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError:
            raise InputError(field, text, "cannot be parsed", _SYNTAX) from None
        self.names: set[str] = set()
        self._check(self._tree)

    def mask(self, columns: Mapping[str, Column]) -> npt.NDArray[np.bool_]:
        """Which rows hold it; a missing value (NaN) holds no comparison."""
        return self._mask(self._tree, columns)

    def _check(self, node: ast.expr) -> None:
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._check(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(type(op) not in _COMPARISONS for op in node.ops) or not all(self._is_term(side) for side in sides):
                raise InputError(self._field, self._text, "cannot be parsed", _SYNTAX)
        else:
            raise InputError(self._field, self._text, "cannot be parsed", _SYNTAX)

    def _is_term(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            if node.id not in self._known:
                raise InputError(self._field, node.id, "is no metric of this job", suggestion(node.id, self._known))
            self.names.add(node.id)
            return True
        return _number(node) is not None

    def _mask(self, node: ast.expr, columns: Mapping[str, Column]) -> npt.NDArray[np.bool_]:
        if isinstance(node, ast.BoolOp):
            parts = [self._mask(value, columns) for value in node.values]
            joined = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(joined.reduce(parts))
        if isinstance(node, ast.UnaryOp):
            return ~self._mask(node.operand, columns)
        assert isinstance(node, ast.Compare)
        terms = [columns[s.id] if isinstance(s, ast.Name) else _number(s) for s in (node.left, *node.comparators)]
        rows = len(next(iter(columns.values())))
        holds = np.ones(rows, dtype=bool)
        for op, left, right in zip(node.ops, terms, terms[1:], strict=False):
            compared = _COMPARISONS[type(op)](np.asarray(left, dtype=float), right)  # type: ignore[arg-type]
            present = ~(np.isnan(np.asarray(left, dtype=float)) | np.isnan(np.asarray(right, dtype=float)))
            holds &= compared & present
        return holds


def _number(node: ast.expr) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    return None
