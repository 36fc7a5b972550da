"""A member of any space of networks, with the weights that a job trained: what a search found can be compressed."""

from __future__ import annotations

import json
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
        weights: a checkpoint; fresh ones by default. What ``archfront export`` writes says of which space and genotype
            it is, so that nothing else need be given.
        space: a job file's ``space`` mapping.
        genotype: of that space, or a member's name.
        seed: of fresh weights.
        normalisation: of the images, as its weights were trained with: ``data``, ``imagenet`` or ``half``.

    Raises:
        InputError: an unknown space, one without image classifiers, a genotype that is not of it, or no such file.
    """

    name: ClassVar[str] = "network"

    def __init__(
        self,
        *,
        weights: str | None = None,
        space: dict[str, Any] | None = None,
        genotype: Any = None,
        seed: int = 0,
        normalisation: Normalisation = "data",
    ) -> None:
        from archfront.spaces.registry import SPACES

        super().__init__(weights, seed, normalisation)
        written = {} if self.weights is None else self.weights.metadata()
        if space is None and "space" in written:
            space = json.loads(written["space"])
        if genotype is None and "genotype" in written:
            genotype = json.loads(written["genotype"])
        for field, given in (("space", space), ("genotype", genotype)):
            if given is None:
                remedy = "Give it, or weights that archfront exported."
                raise InputError(f"model.{field}", None, "is missing", remedy)
        assert space is not None
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

    @property
    def config(self) -> Mapping[str, Genotype]:
        return {"space": self._given, "genotype": self._genotype}

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "space": self._space.digest}

    def architecture(self) -> nn.Module:
        return self._space.build(self._genotype)
