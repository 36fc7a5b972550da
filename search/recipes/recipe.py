"""A recipe: the score, the allocator and the choices of one published method, and the policies that they give."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.score import Score, Subject
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.policy_allocation import allocate
from archfront.spaces.policies.policy_space import check_costs
from archfront.spaces.space import Genotype

Budget = Mapping[str, float]
"""Cost -> the most that it may be."""


class Recipe(ABC):
    """One method. A subclass names its parts; what is to be compressed, and to what size, comes with the job.

    Attributes:
        space: options of the space of bits in which the method was published; a job's own come first.
        recovery: steps that its compressed networks go through, as the evaluator ``compression`` takes them.
        images: of the training part, that scores are measured on and allocators judge by.
    """

    name: ClassVar[str]
    space: ClassVar[Mapping[str, Any]] = {}
    recovery: ClassVar[Sequence[Mapping[str, Any]]] = ()
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
        damage = self.score().checked(self.subject(network, seed))
        evaluate = self.quality(network)
        return [allocate(network.space, damage, budget, self.allocator(), evaluate) for budget in budgets]

    def subject(self, network: Compressible, seed: int) -> Subject:
        """What scores are measured on."""
        return Subject.of(network, self.count(network), seed)

    def quality(self, network: Compressible) -> Evaluate:
        """Accuracy on the same part of the training data, of choices by their index: what some allocators look at."""
        space, count = network.space, self.count(network)

        def evaluate(choices: Sequence[int]) -> float:
            policy = {site.id: site.domain[choice] for site, choice in zip(space.sites, choices, strict=True)}
            [judged] = network.judged("train", [space.variant(space.genotype(policy))], count)
            return judged.accuracy

        return evaluate

    def count(self, network: Compressible) -> int:
        """Images that are looked at: ``images``, or as many as there are."""
        return min(self.images, len(network.data.split["train"]))


_BOUND = re.compile(r"\s*([A-Za-z_]\w*)\s*<=\s*([0-9.eE+-]+)\s*")


def read_budget(text: str) -> dict[str, float]:
    """A budget as it is written: ``model_mb <= 6.7``, several joined by ``and``.

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
            raise InputError("--budget", text, "is no budget", 'Write "model_mb <= 6.7", or several joined by "and".')
        check_costs([bound[1]])
        found[bound[1]] = min(limit, found.get(bound[1], limit))
    return found
