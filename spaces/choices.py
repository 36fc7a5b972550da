"""A space written down in the job file: for look-up tables and a user's own evaluators."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

from archfront.errors import InputError
from archfront.spaces.conditions import ConditionalSpace
from archfront.spaces.product import Column
from archfront.spaces.space import KEY_BYTES, Genotype, Layer

Choice = bool | str | int | float


class Choices(ConditionalSpace):
    """The product of named decisions with their choices.

    Args:
        columns: the choices of each decision. Those that are numbers in rising order, or false and true, count as
            ordered; all others as kinds without an order. ``true`` and 1 are the same choice, as are 1 and 1.0.
        when: decision -> what it waits for, as other decision -> values of it: ``{width3: {depth: [3]}}``. It counts
            only while all that it waits for counts and has one of the values; else it is null in genotypes.

    Raises:
        InputError: no decision, a decision without choices or with a choice twice, an unknown name or value in
            ``when``, or decisions that wait for each other.
    """

    name: ClassVar[str] = "choices"
    has_models = False

    def __init__(
        self, *, columns: dict[str, list[Choice]], when: dict[str, dict[str, list[Choice]]] | None = None
    ) -> None:
        made = []
        for name, choices in columns.items():
            # JSON has one number type, so 1 and 1.0 are the same choice, as they are to Python.
            if len(set(choices)) != len(choices):
                raise InputError(f"space.columns.{name}", choices, "repeats a choice", "Give each choice once.")
            made.append(Column(name, tuple(choices), _rises(choices)))
        super().__init__(made, when)

    @property
    def config(self) -> Mapping[str, Any]:
        config: dict[str, Any] = {"columns": {column.name: list(column.choices) for column in self.columns}}
        return config | ({"when": self.conditions.when} if self.conditions else {})

    @property
    def digest(self) -> str:
        """As of every space, but with the order of the decisions, which a mapping's sorted JSON would lose."""
        # Earlier versions read true as 1, and what was found then still holds.
        columns = [[c.name, [int(x) if isinstance(x, bool) else x for x in c.choices]] for c in self.columns]
        text = json.dumps({"name": self.name, "version": self.version, "columns": columns})
        if self.conditions:
            text += json.dumps(self.conditions.when, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def build(self, genotype: Genotype) -> NoReturn:
        """Not possible.

        Raises:
            InputError: always: plain choices have no torch module.
        """
        problem = "has no torch module"
        raise InputError("space.name", self.name, problem, "Use an evaluator that reads the genotype itself.")

    def describe(self, genotype: Genotype) -> list[Layer]:
        [choices] = self.to_json(self.from_json([genotype]))
        return [
            Layer(
                name=column.name,
                kind=f"no {column.name}" if idle else f"{column.name} {choice}",
                shape=(),
                size=0.0 if idle else 1.0,
            )
            for column, choice in zip(self.columns, choices, strict=True)
            for idle in [choice is None]
        ]


def _rises(choices: list[Choice]) -> bool:
    numbers = [c for c in choices if isinstance(c, (int, float))]
    return len(numbers) == len(choices) and all(a < b for a, b in pairwise(numbers))
