"""A recipe: the score, the allocator and the choices of one published method, and the policies that they give."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.errors import InputError, suggestion
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.score import Score, Subject
from archfront.search.allocators.allocator import Allocation, Allocator
from archfront.search.bit_allocation import allocate
from archfront.spaces.policies.bit_costs import NAMES
from archfront.spaces.space import Genotype

Budget = Mapping[str, float]
"""Cost -> the most that it may be."""


class Recipe(ABC):
    """One method. A subclass names its parts; what is to be compressed, and to what size, comes with the job.

    Attributes:
        space: options of the space of bits in which the method was published; a job's own come first.
        images: of the training part, that scores are measured on.
    """

    name: ClassVar[str]
    space: ClassVar[Mapping[str, Any]] = {}
    images: ClassVar[int] = 256

    @abstractmethod
    def score(self) -> Score:
        """What each choice of each site damages."""

    @abstractmethod
    def allocator(self) -> Allocator:
        """How a budget is shared out."""

    def policies(
        self, network: Compressible, budgets: Sequence[Budget], seed: int = 0
    ) -> list[tuple[Genotype, Allocation]]:
        """A policy for each budget.

        Args:
            network: with the space that policies are of.
            budgets: each met by its own policy; scores are measured once for all.
            seed: of whatever the score draws.

        Raises:
            InputError: a budget below what the lowest bits cost, or a score that is not finite or does not serve the
                space.
        """
        images = min(self.images, len(network.data.split["train"]))
        damage = self.score().checked(Subject.of(network, images, seed))
        return [allocate(network.space, damage, budget, self.allocator()) for budget in budgets]


_BOUND = re.compile(r"\s*([A-Za-z_]\w*)\s*<=\s*([0-9.eE+-]+)\s*")


def read_budget(text: str) -> dict[str, float]:
    """A budget as it is written: ``weight_mb <= 6.7``, several joined by ``and``.

    Raises:
        InputError: it cannot be read, or bounds what is no cost of bits.
    """
    found: dict[str, float] = {}
    for part in re.split(r"\band\b", text):
        bound = _BOUND.fullmatch(part)
        try:
            limit = float(bound[2]) if bound else None
        except ValueError:
            limit = None
        if bound is None or limit is None:
            raise InputError("--budget", text, "is no budget", 'Write "weight_mb <= 6.7", or several joined by "and".')
        if bound[1] not in NAMES:
            raise InputError("--budget", bound[1], "is no cost of bits", suggestion(bound[1], NAMES))
        found[bound[1]] = min(limit, found.get(bound[1], limit))
    return found
