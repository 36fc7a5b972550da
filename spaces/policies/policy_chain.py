"""Several policies of one network together, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from archfront.errors import InputError
from archfront.spaces.joint import Joint
from archfront.spaces.policies.policy_space import (
    COSTS,
    Policies,
    PolicySpace,
    Variant,
    Vector,
    priced_one_by_one,
)
from archfront.spaces.policies.site import Choice, Policy, Site
from archfront.spaces.space import Genotype, Population, Space

if TYPE_CHECKING:
    from torch import Tensor, nn


class PolicyChain:
    """The policies of a joint space of policy spaces; see ``Policies``.

    They change the network in the order of the parts: prune first, say, then quantise what is left. A site's id has
    its part's name in front, ``bits.conv1:weights``.

    Args:
        space: whose parts are all spaces of policies, of one model.

    Raises:
        InputError: the parts are of different models, or one of them need not count.
    """

    def __init__(self, space: Joint) -> None:
        self.space = space
        self.parts: dict[str, PolicySpace] = {}
        for name, part in space.parts.items():
            if not isinstance(part, PolicySpace):
                remedy = "Join policies with policies, and train a network that is searched with them."
                raise InputError(f"space.parts.{name}.name", part.name, "is no space of policies", remedy)
            self.parts[name] = part
        if space.config.get("when"):
            problem = "lets policies wait for others"
            raise InputError("space.when", space.config["when"], problem, "Give each its identity as a choice.")
        [first, *others] = self.parts
        self.source = self.parts[first].source
        for name in others:
            if self.parts[name].source.identity != self.source.identity:
                problem = f"is not the model of {first}"
                raise InputError(f"space.parts.{name}.model", self.parts[name].config["model"], problem, "Give one.")
        self.sites: Sequence[Site] = tuple(
            replace(site, id=f"{name}.{site.id}", tied=None if site.tied is None else f"{name}.{site.tied}")
            for name, part in self.parts.items()
            for site in part.sites
        )
        self.digest = space.digest

    def from_json(self, genotypes: Sequence[Genotype]) -> Population:
        return self.space.from_json(genotypes)

    def to_json(self, population: Population) -> list[Genotype]:
        return self.space.to_json(population)

    def genotype(self, policy: Policy) -> Genotype:
        """See ``PolicySpace.genotype``."""
        own: dict[str, dict[str, Choice]] = {name: {} for name in self.parts}
        for site, choice in policy.items():
            name, _, inner = site.partition(".")
            if name not in own:
                raise InputError(f"policy.{site}", choice, "is for no part", f"Begin with one of: {', '.join(own)}.")
            own[name][inner] = choice
        return {name: part.genotype(own[name]) for name, part in self.parts.items()}

    def variant(self, genotype: Genotype) -> Variant:
        """The variants of the parts by name."""
        return {name: part.variant(genotype[name]) for name, part in self.parts.items()}

    def untouched(self) -> Variant:
        return {name: part.untouched() for name, part in self.parts.items()}

    def alone(self, site: Site, choice: Choice) -> Variant:
        name, _, inner = site.id.partition(".")
        own = next(one for one in self.parts[name].sites if one.id == inner)
        return {**self.untouched(), name: self.parts[name].alone(own, choice)}

    def transform(self, model: nn.Module, variant: Variant, inputs: Sequence[Tensor]) -> nn.Module:
        for name, part in self.parts.items():
            model = part.transform(model, variant[name], inputs)
        return model

    def cost_table(self, population: Population) -> dict[str, Vector]:
        rows = [self._measured(self.variant(genotype)) for genotype in self.to_json(population)]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in COSTS}

    def additive_costs(self, names: Sequence[str]) -> tuple[dict[str, list[Vector]], dict[str, float]]:
        return priced_one_by_one(self, self._measured, names)

    def _measured(self, variant: Variant) -> Mapping[str, Any]:
        from archfront.spaces.policies.measured_costs import measured_costs

        return measured_costs(self.transform(self.source.build(), variant, ()), self.source.example())


def has_policies(space: Space) -> bool:
    """Whether all that is searched is what is done to one trained network."""
    parts = list(space.parts.values()) if isinstance(space, Joint) else [space]
    return all(isinstance(part, PolicySpace) for part in parts)


def policies_of(space: Space, needs: str) -> Policies:
    """The policies that a job's space has.

    Args:
        needs: who asks, for the message.

    Raises:
        InputError: it has none, or they do not go together.
    """
    if isinstance(space, PolicySpace):
        return space
    if isinstance(space, Joint) and any(isinstance(part, PolicySpace) for part in space.parts.values()):
        return PolicyChain(space)
    raise InputError("space.name", space.name, f"has no policies, which {needs} needs", "Choose 'bits', for one.")
