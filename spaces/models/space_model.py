"""A member of any space of networks, with the weights that a job trained: what a search found can be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from archfront.errors import InputError
from archfront.spaces.counting import InputShaped
from archfront.spaces.models.source import ModelSource, Normalisation

if TYPE_CHECKING:
    from archfront.spaces.space import Genotype


class SpaceModel(ModelSource):
    """The network of a genotype.

    Args:
        space: a job file's ``space`` mapping.
        genotype: of that space, or a member's name.
        weights: a checkpoint, such as the one that a job keeps of a finalist; fresh ones by default.
        seed: of fresh weights.
        normalisation: of the images, as its weights were trained with: ``data``, ``imagenet`` or ``half``.

    Raises:
        InputError: an unknown space, one without image classifiers, a genotype that is not of it, or no such file.
    """

    name: ClassVar[str] = "network"

    def __init__(
        self,
        *,
        space: dict[str, Any],
        genotype: Any,
        weights: str | None = None,
        seed: int = 0,
        normalisation: Normalisation = "data",
    ) -> None:
        from archfront.spaces.registry import SPACES

        self._space = SPACES.build(space, "model.space")
        if not isinstance(self._space, InputShaped) or not hasattr(self._space, "classes"):
            problem = "has no image classifiers"
            raise InputError("model.space.name", self._space.name, problem, "Choose a space such as fbnet-tiny.")
        self.resolution, self.in_channels = self._space.resolution, self._space.in_channels
        self.classes = int(self._space.classes)
        self._given = dict(space)
        try:
            [self._genotype] = self._space.genotypes_of([genotype])
        except InputError as error:
            raise InputError("model.genotype", genotype, error.problem, error.remedy) from None
        super().__init__(weights, seed, normalisation)

    @property
    def config(self) -> Mapping[str, Genotype]:
        return {"space": self._given, "genotype": self._genotype}

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "space": self._space.digest}

    def architecture(self) -> nn.Module:
        return self._space.build(self._genotype)
