"""A space written down in the job file: for look-up tables and a user's own evaluators."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

from archfront.errors import InputError
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import KEY_BYTES, Genotype, Layer

Choice = str | int | float


class Choices(ProductSpace):
    """The product of named decisions with their choices.

    Args:
        columns: the choices of each decision. Those that are numbers in rising order count as ordered; all others as
            kinds without an order.

    Raises:
        InputError: no decision, a decision without choices or with a choice twice.
    """

    name: ClassVar[str] = "choices"

    def __init__(self, *, columns: dict[str, list[Choice]]) -> None:
        made = []
        for name, choices in columns.items():
            # JSON has one number type, so 1 and 1.0 are the same choice, as they are to Python.
            if len(set(choices)) != len(choices):
                raise InputError(f"space.columns.{name}", choices, "repeats a choice", "Give each choice once.")
            made.append(Column(name, tuple(choices), _rises(choices)))
        super().__init__(made)

    @property
    def config(self) -> Mapping[str, Any]:
        return {"columns": {column.name: list(column.choices) for column in self.columns}}

    @property
    def digest(self) -> str:
        """As of every space, but with the order of the decisions, which a mapping's sorted JSON would lose."""
        columns = [[column.name, list(column.choices)] for column in self.columns]
        text = json.dumps({"name": self.name, "version": self.version, "columns": columns})
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def build(self, genotype: Genotype) -> NoReturn:
        """Not possible.

        Raises:
            InputError: always: plain choices have no torch module.
        """
        problem = "has no torch module"
        raise InputError("space.name", self.name, problem, "Use an evaluator that reads the genotype itself.")

    def describe(self, genotype: Genotype) -> list[Layer]:
        self.validate(genotype)
        return [
            Layer(name=column.name, kind=str(choice), shape=())
            for column, choice in zip(self.columns, genotype, strict=True)
        ]


def _rises(choices: list[Choice]) -> bool:
    numbers = [c for c in choices if isinstance(c, (int, float)) and not isinstance(c, bool)]
    return len(numbers) == len(choices) and all(a < b for a, b in pairwise(numbers))
