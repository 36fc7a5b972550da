"""The least work an operator can do, from which a floor of its time follows."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Arithmetic and memory traffic of one call.

    Attributes:
        operations: multiplications, additions and comparisons, each counted as one.
        bytes: every operand read once and the result written once, as if caches were endless.
    """

    operations: int
    bytes: int
