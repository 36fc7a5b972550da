"""Genotypes as the configurations that a Tune trainable gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from archfront.errors import InputError
from archfront.spaces.choices import Choices
from archfront.spaces.registry import SPACES
from archfront.spaces.space import Genotype, Space

if TYPE_CHECKING:
    from torch import nn


def to_config(space: Space, genotype: Genotype) -> dict[str, Any]:
    """The configuration of a genotype: of ``choices`` one entry for each column, of others ``{"genotype": JSON}``."""
    if isinstance(space, Choices):
        return {column.name: choice for column, choice in zip(space.columns, genotype, strict=True)}
    return {"genotype": genotype}


def to_genotype(space: Space, config: Mapping[str, Any]) -> Genotype:
    """The inverse of ``to_config``; entries of the user's own are left alone.

    Raises:
        InputError: an entry is missing.
    """
    names = [column.name for column in space.columns] if isinstance(space, Choices) else ["genotype"]
    missing = [name for name in names if name not in config]
    if missing:
        raise InputError("config", dict(config), f"has no {', '.join(missing)}", "Give the configuration of a trial.")
    return [config[name] for name in names] if isinstance(space, Choices) else config["genotype"]


def build(config: Mapping[str, Any], space: Mapping[str, Any]) -> nn.Module:
    """The torch module of a trial's configuration, with fresh weights: what a trainable calls.

    Args:
        config: as the trainable gets it.
        space: as the searcher got it, e.g. ``{"name": "fbnet-tiny"}``.

    Raises:
        InputError: the space has no modules, or the configuration is not of this space.
    """
    made = SPACES.build(space, "space")
    genotype = to_genotype(made, config)
    made.validate(genotype)
    return made.build(genotype)
