"""The contract of a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.spaces.policies.quantiser import FLOAT, Quantiser
from archfront.spaces.policies.site import Site

Vector = npt.NDArray[np.float64]


@runtime_checkable
class HasQuantiser(Protocol):
    """Policies of bits alone."""

    def quantiser(self, bits: int) -> Quantiser: ...


@dataclass(kw_only=True)
class Subject:
    """What a score looks at.

    Attributes:
        network: with its sites.
        batches: calibration inputs, of the training part.
        labels: of all of them.
        seed: of whatever a score draws.
    """

    network: Compressible
    batches: Sequence[Tensor]
    labels: Tensor
    seed: int = 0
    sites: Sequence[Site] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = self.network.space.sites

    @classmethod
    def of(cls, network: Compressible, images: int, seed: int = 0) -> Subject:
        """A network with so many images of its training part.

        Raises:
            InputError: no image.
        """
        if images < 1:
            raise InputError("score.images", images, "is not positive", "Give 1 or more.")
        batches, labels = network.inputs("train", images)
        return cls(network=network, batches=batches, labels=labels, seed=seed)

    def quantiser(self, bits: int) -> Quantiser:
        """Of weights.

        Raises:
            InputError: the policies are not of bits alone.
        """
        space = self.network.space
        if not isinstance(space, HasQuantiser):
            remedy = "Choose 'distortion', which serves policies of any kind."
            raise InputError("score", [site.id for site in self.sites[:1]], "is no choice of bits alone", remedy)
        return space.quantiser(bits)


class Score(ABC):
    """Damage of every choice of every site, additive over sites as far as the score knows; less is better.

    The keyword arguments of ``__init__`` are what a recipe may set.
    """

    name: ClassVar[str]

    @abstractmethod
    def measure(self, subject: Subject) -> list[Vector]:
        """For each site ``(choices,)``, finite; 0 for a choice that changes nothing."""

    def checked(self, subject: Subject) -> list[Vector]:
        """``measure``, with what is not finite refused.

        Raises:
            InputError: names the site and the choice.
        """
        found = [np.asarray(row, dtype=np.float64) for row in self.measure(subject)]
        shapes, wanted = [row.shape for row in found], [(len(site.domain),) for site in subject.sites]
        if shapes != wanted:
            problem = f"gives arrays of shapes {shapes}"
            raise InputError(f"score.{self.name}", len(found), problem, f"Give one for each site: {wanted}.")
        for site, row in zip(subject.sites, found, strict=True):
            for choice, value in zip(site.domain, row.tolist(), strict=True):
                if not np.isfinite(value):
                    remedy = "Look at the network's outputs, or give other calibration images."
                    raise InputError(f"score.{self.name}.{site.id}", value, f"is the damage of {choice}", remedy)
        return found


def is_identity(choice: object) -> bool:
    """Whether a choice of bits changes nothing."""
    return choice == FLOAT
