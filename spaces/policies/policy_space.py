"""The contract of a space of compression policies: sites of one trained network, and what a policy makes of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.spaces.models.registry import MODELS
from archfront.spaces.models.source import ModelSource
from archfront.spaces.policies.site import Choice, Policy, Site, complete, tied_groups
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer, Population, digest_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Vector = npt.NDArray[np.float64]

Variant = Mapping[str, Any]
"""What ``transform`` reads: of most spaces a policy that names every site; equal ones make equal networks."""

COSTS = ("params", "macs", "size_bytes", "model_mb", "gbops")
"""What a network under a policy costs, see ``measured_costs``."""


@runtime_checkable
class Policies(Protocol):
    """What evaluators, scores and allocators need to know of policies: those of one space, or of several together."""

    source: ModelSource
    sites: Sequence[Site]

    @property
    def digest(self) -> str: ...

    def from_json(self, genotypes: Sequence[Genotype]) -> Population: ...

    def to_json(self, population: Population) -> list[Genotype]: ...

    def genotype(self, policy: Policy) -> Genotype: ...

    def variant(self, genotype: Genotype) -> Variant: ...

    def untouched(self) -> Variant: ...

    def alone(self, site: Site, choice: Choice) -> Variant: ...

    def transform(self, model: nn.Module, variant: Variant, inputs: Sequence[Tensor]) -> nn.Module: ...

    def cost_table(self, population: Population) -> dict[str, Vector]: ...

    def additive_costs(self, names: Sequence[str]) -> tuple[dict[str, list[Vector]], dict[str, float]]: ...


class PolicySpace(ProductSpace, ABC):
    """Policies of one trained network. A subclass says where there is a choice (``find_sites``) and what a policy does
    (``transform``); the rest follows, and may be overridden by what is faster.

    A genotype lists the choices of the groups of tied sites, in the order of their first ones. A subclass sets its own
    options before it calls ``__init__``, which asks for the sites.

    Args:
        model: the trained network, as ``{name: cifar-resnet, weights: FILE}``.

    Raises:
        InputError: a model or weights that cannot be read, or what ``find_sites`` refuses.
    """

    def __init__(self, *, model: Mapping[str, Any]) -> None:
        self.source = MODELS.build(model, "space.model")
        fixed = self.source.mean_and_deviation
        if fixed is not None and self.source.in_channels > len(fixed[0]):
            problem = f"is of {len(fixed[0])} channels, and the model takes {self.source.in_channels}"
            raise InputError("space.model.normalisation", self.source.normalisation, problem, "Give 'data'.")
        self._model = dict(model)
        self.resolution, self.in_channels = self.source.resolution, self.source.in_channels
        self.classes = self.source.classes
        self.sites: Sequence[Site] = tuple(self.find_sites())
        if not self.sites:
            raise InputError("space.model", self._model, "has no site for such policies", "Give another model.")
        self._groups = tied_groups(self.sites)
        names = ["+".join(self.sites[i].id for i in members) for members in self._groups]
        domains = [self.sites[members[0]].domain for members in self._groups]
        super().__init__([Column(name, domain, ordered=True) for name, domain in zip(names, domains, strict=True)])

    @abstractmethod
    def find_sites(self) -> Sequence[Site]:
        """Where the network, ``self.source``, has a choice."""

    @abstractmethod
    def transform(self, model: nn.Module, variant: Variant, inputs: Sequence[Tensor]) -> nn.Module:
        """A network under a policy. Whatever the policy leaves alone is left to the bit.

        Args:
            model: the network, or what other policies made of it; a copy, which may be changed.
            variant: by site id; sites that are tied may differ in it.
            inputs: calibration batches of the training part, normalised; there may be none.
        """

    @property
    def options(self) -> Mapping[str, Any]:
        """The arguments that make this space again, without ``model``."""
        return {}

    @property
    def config(self) -> Mapping[str, Any]:
        return {"model": self._model, **self.options}

    @cached_property
    def digest(self) -> str:
        """With the content of the model's weights, not the place where they lie."""
        return digest_of(self.name, self.version, {**self.config, "model": self.source.identity})

    def policy(self, genotype: Genotype) -> dict[str, Choice]:
        """Site id -> choice.

        Raises:
            InputError: the genotype is not of this space.
        """
        [row] = self.from_json([genotype]).tolist()
        found: dict[str, Choice] = {}
        for members, column, choice in zip(self._groups, self.columns, row, strict=True):
            found |= {self.sites[i].id: column.choices[choice] for i in members}
        return found

    def genotype(self, policy: Policy) -> Genotype:
        """The inverse of ``policy``; a site that is not named gets the last choice of its domain.

        Raises:
            InputError: an unknown site, a choice that it cannot have, or tied sites with different ones.
        """
        full = complete(self.sites, policy)
        return [full[self.sites[members[0]].id] for members in self._groups]

    def variant(self, genotype: Genotype) -> Variant:
        """What ``transform`` takes for a genotype.

        Raises:
            InputError: the genotype is not of this space.
        """
        return self.policy(genotype)

    def untouched(self) -> Variant:
        """What leaves the network as it is, to the bit."""
        return {site.id: site.identity for site in self.sites}

    def alone(self, site: Site, choice: Choice) -> Variant:
        """What compresses one site and leaves all else as it is."""
        return {**self.untouched(), site.id: choice}

    def build(self, genotype: Genotype) -> nn.Module:
        """The network under a policy, without calibration."""
        from archfront.spaces.policies.quantised import bake

        return bake(self.transform(self.source.build(), self.variant(genotype), ()))

    def apply(self, module: nn.Module, genotype: Genotype) -> nn.Module:
        """A copy of a network under a policy: what makes this space a ``Transform`` of a joint one."""
        return self.transform(copy.deepcopy(module), self.variant(genotype), ())

    def describe(self, genotype: Genotype) -> list[Layer]:
        policy = self.policy(genotype)
        return [
            Layer(name=site.module or site.id, kind=str(policy[site.id]), shape=(), size=1.0, details=dict(site.facts))
            for site in self.sites
        ]

    def cost_table(self, population: Population) -> dict[str, Vector]:
        """``COSTS`` -> ``(n,)``. Here each network is built and measured."""
        rows = [self._measured(self.variant(genotype)) for genotype in self.to_json(population)]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in COSTS}

    def additive_costs(self, names: Sequence[str]) -> tuple[dict[str, list[Vector]], dict[str, float]]:
        """Costs as sums over sites: name -> of each site ``(choices,)``, and name -> what no site changes.

        Here what a choice alone takes off the whole network, which is exact as far as sites do not meet in one layer;
        ``policy_allocation.allocate`` checks what comes of it against ``cost_table``.

        Raises:
            InputError: an unknown cost, or one that is no sum.
        """
        return priced_one_by_one(self, self._measured, names)

    def costs(self, population: Population) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Parameters and multiply-adds for one input: ``(n,)`` each."""
        table = self.cost_table(population)
        return table["params"].astype(np.int64), table["macs"].astype(np.int64)

    def _measured(self, variant: Variant) -> dict[str, float]:
        from archfront.spaces.policies.measured_costs import measured_costs

        return measured_costs(self.transform(self.source.build(), variant, ()), self.source.example())


def check_costs(names: Sequence[str]) -> None:
    """Refuse what is no cost.

    Raises:
        InputError: names the first.
    """
    for name in names:
        if name not in COSTS:
            raise InputError(f"budget.{name}", name, "is no cost of policies", suggestion(name, COSTS))


def priced_one_by_one(
    space: Policies, measure: Any, names: Sequence[str]
) -> tuple[dict[str, list[Vector]], dict[str, float]]:
    """See ``PolicySpace.additive_costs``.

    Args:
        measure: costs of a variant.
    """
    check_costs(names)
    whole = measure(space.untouched())
    rows: dict[str, list[Vector]] = {name: [] for name in names}
    for site in space.sites:
        found = [measure(space.alone(site, choice)) for choice in site.domain]
        for name in names:
            rows[name].append(np.array([one[name] - whole[name] for one in found], dtype=np.float64))
    return rows, {name: whole[name] for name in names}
