"""The space of one network's resolutions, depths and widths."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from archfront.errors import InputError
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.scaled_families import family as find_family
from archfront.spaces.scaling_rules import RULES, Plan
from archfront.spaces.space import Genotype, Layer, Population

SMALLEST = 16
"""Pixels; most families halve five times."""


class Scaled(ProductSpace):
    """A network at a free resolution, depth and width; a genotype is ``[pixels, depth multiplier, width multiplier]``.

    All networks take images of the data's resolution and resize them (bilinear, without antialiasing) to their own, so
    that nothing around them need know; latency includes it, and multiply-adds do not. Equal keys: multipliers that give
    the same numbers of blocks and channels.

    Args:
        family: ``timm:<model>`` whose class takes its depths and widths, or ``archfront:nasnet_a``, ``:darts_v2``.
        resolutions: of the networks, in pixels, rising.
        depths, widths: multipliers, rising.
        rule: how they become blocks and channels: ``efficientnet`` (depths rounded up), ``tinynet`` (depths rounded,
            stem fixed, head never narrower) or ``dwr`` (all rounded, group widths scaled too).
        classes: of the output.
        in_channels, resolution: of the data.

    Raises:
        InputError: a list that does not rise or has a number out of range, a family that cannot be scaled, or a width
            that its class cannot take.
    """

    name: ClassVar[str] = "scaled"

    def __init__(
        self,
        *,
        family: str = "timm:efficientnet_b0",
        resolutions: list[int] | None = None,
        depths: list[float] | None = None,
        widths: list[float] | None = None,
        rule: Literal["efficientnet", "tinynet", "dwr"] = "efficientnet",
        classes: int = 1000,
        in_channels: int = 3,
        resolution: int = 224,
    ) -> None:
        for field, number in {"classes": classes, "in_channels": in_channels, "resolution": resolution}.items():
            if number < 1:
                raise InputError(f"space.{field}", number, "is not positive", "Give 1 or more.")
        if rule not in RULES:
            raise InputError("space.rule", rule, "is unknown", f"Give one of: {', '.join(RULES)}.")
        self.family, self.rule = family, rule
        self.classes, self.in_channels, self.resolution = classes, in_channels, resolution
        pixels = [128, 160, 192, 224] if resolutions is None else resolutions
        multipliers = {"depths": [0.6, 0.8, 1.0, 1.2] if depths is None else depths}
        multipliers["widths"] = [0.5, 0.75, 1.0, 1.25] if widths is None else widths
        columns = [Column("resolution", _rising("resolutions", pixels, SMALLEST, 4096), ordered=True)]
        for field, given in multipliers.items():
            choices = tuple(float(choice) for choice in _rising(field, given, 0.01, 16))
            columns.append(Column(field.removesuffix("s"), choices, ordered=True))
        super().__init__(columns)
        self._family = find_family(family)
        self._plans, self._representatives = self._find_plans()

    @property
    def config(self) -> Mapping[str, Any]:
        resolutions, depths, widths = (list(column.choices) for column in self.columns)
        fields = ("family", "rule", "classes", "in_channels", "resolution")
        given = {field: getattr(self, field) for field in fields}
        return {**given, "resolutions": resolutions, "depths": depths, "widths": widths}

    def canonical(self, population: Population) -> Population:
        """The least multipliers with the same numbers of blocks and channels."""
        result: Population = np.array(population, dtype=np.int16)
        result[:, 1:] = self._representatives[result[:, 1], result[:, 2]]
        return result

    def plan(self, genotype: Genotype) -> Plan:
        """The numbers of blocks and channels of a genotype.

        Raises:
            InputError: the genotype is not of this space.
        """
        _, depth, width = self.from_json([genotype])[0].tolist()
        return self._plans[depth, width]

    def build(self, genotype: Genotype) -> nn.Module:
        """The network: ``(n, in_channels, resolution, resolution)`` images to ``(n, classes)`` logits."""
        network = self._family.build(self.plan(genotype), self.classes, self.in_channels)
        pixels = int(genotype[0])
        if pixels == self.resolution:
            return network
        return nn.Sequential(nn.Upsample(size=(pixels, pixels), mode="bilinear", align_corners=False), network)

    def describe(self, genotype: Genotype) -> list[Layer]:
        plan = self.plan(genotype)
        size = int(genotype[0])
        rows = [Layer(name="resize", kind="bilinear", shape=(self.in_channels, size, size), size=0.0)]
        size = -(-size // plan.stem_stride)
        stem = plan.stem or plan.stages[0].channels
        rows.append(Layer(name="stem", kind=f"stride {plan.stem_stride}", shape=(stem, size, size), size=0.2))
        most = max(stage.blocks * stage.channels for stage in plan.stages)
        for i, stage in enumerate(plan.stages):
            size = -(-size // stage.stride)
            kind = f"{stage.blocks} block{'s' if stage.blocks > 1 else ''}"
            extent = max(0.05, stage.blocks * stage.channels / most)
            details = {"blocks": stage.blocks, "stride": stage.stride, "group_width": stage.group, "stage": stage.part}
            shape = (stage.channels, size, size)
            rows.append(Layer(name=f"row{i}", kind=kind, shape=shape, size=extent, details=details))
        if plan.head:
            rows.append(Layer(name="head", kind="conv1x1", shape=(plan.head, size, size), size=0.3))
        return [*rows, Layer(name="classifier", kind="pool+linear", shape=(self.classes,), size=0.1)]

    def _find_plans(self) -> tuple[dict[tuple[int, int], Plan], Population]:
        """The plan of each pair of multipliers, and ``(depths, widths, 2)``: the first pair of the same plan."""
        _, depths, widths = (column.choices for column in self.columns)
        plans: dict[tuple[int, int], Plan] = {}
        first: dict[Plan, tuple[int, int]] = {}
        representatives = np.empty((len(depths), len(widths), 2), dtype=np.int16)
        for pair in product(range(len(depths)), range(len(widths))):
            plan = RULES[self.rule].scale(self._family.plan, depths[pair[0]], widths[pair[1]])
            # Widths decide whether a network can be built, so the shallowest one of each tells.
            problem = None if pair[0] else self._family.problem(plan)
            if problem:
                remedy = f"Leave it out, or choose another family or rule. The class says: {problem}."
                raise InputError("space.widths", widths[pair[1]], f"cannot be built with {self.family}", remedy)
            plans[pair] = plan
            representatives[pair] = first.setdefault(plan, pair)
        return plans, representatives


def _rising(field: str, given: list[Any], low: float, high: float) -> tuple[Any, ...]:
    if not given or any(a >= b for a, b in pairwise(given)):
        raise InputError(f"space.{field}", given, "is empty or does not rise", "Give rising numbers.")
    if not all(low <= number <= high for number in given):  # so put that NaN fails it
        raise InputError(f"space.{field}", given, "is out of range", f"Give numbers from {low} to {high}.")
    return tuple(given)
