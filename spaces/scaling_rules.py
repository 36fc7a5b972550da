"""Rules that scale a network in resolution, depth and width: EfficientNet's, TinyNet's and dWr's, and TinyNet's fit.

Sources: Tan and Le, "EfficientNet", ICML 2019; Han et al., "Model Rubik's Cube: Twisting Resolution, Depth and Width
for TinyNets", NeurIPS 2020; Dollar et al., "Fast and Accurate Model Scaling" (dWr), CVPR 2021. Ratios are to the
network that is scaled: 1 leaves it as it is, in every rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from archfront.errors import InputError

DIVISOR = 8


@dataclass(frozen=True)
class Stage:
    """Blocks of one definition.

    Attributes:
        part: the stage it belongs to: the depth of a stage is scaled as one, then shared among its definitions.
        blocks: how many.
        channels: of their output.
        stride: of the first.
        group: channels of a group in the spatial convolution; 0 where groups do not limit the width.
        ratio: channels of that convolution to those of the block's output, or input.
    """

    part: int
    blocks: int
    channels: int
    stride: int = 1
    group: int = 0
    ratio: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What a rule changes of a network.

    Attributes:
        stem: channels of the stem; 0 where the stem has no width of its own.
        stages: in order.
        head: channels of the last 1x1 convolution; 0 without one.
        stem_stride: of the stem.
        expands_input: ``Stage.ratio`` is to the input of a block, not to its output.
        multiple: the class itself rounds the widths of stages to multiples of it.
    """

    stem: int
    stages: tuple[Stage, ...]
    head: int = 0
    stem_stride: int = 2
    expands_input: bool = False
    multiple: int = 1


@dataclass(frozen=True)
class Rule:
    """How multipliers become layers.

    Attributes:
        depth: of a stage, after multiplication: rounded up, or to the nearest number.
        width: to a multiple of 8: the nearest that keeps nine tenths, or the nearest.
        stem: scaled with the width, or as it is.
        head: scaled with the width, or never narrower than it was (``floor``).
        groups: group widths are scaled with the width.
    """

    depth: Literal["ceil", "round"]
    width: Literal["keep", "nearest"]
    stem: Literal["scaled", "fixed"]
    head: Literal["scaled", "floor"]
    groups: bool = False

    def scaled_depth(self, blocks: int, multiplier: float) -> int:
        """At least one block."""
        product = blocks * multiplier
        # 10 * 1.1 is a little more than 11, and means 11.
        return max(1, math.ceil(product - 1e-9) if self.depth == "ceil" else round(product))

    def scaled_width(self, channels: int, multiplier: float) -> int:
        """A multiple of 8, at least 8; what the multiplier leaves alone stays as it is."""
        if multiplier == 1:
            return channels
        product = channels * multiplier
        if self.width == "nearest":
            return max(1, round(product / DIVISOR)) * DIVISOR
        width = max(DIVISOR, int(product + DIVISOR / 2) // DIVISOR * DIVISOR)
        return width + DIVISOR if width < 0.9 * product else width

    def scaled_group(self, group: int, multiplier: float) -> int:
        """Group widths of 1 and 2 are kept, 3 to 5 become 4, greater ones the nearest multiple of 8."""
        if not self.groups or multiplier == 1 or not group:
            return group
        rounded = max(1, round(group * multiplier))
        if rounded <= 2:
            return rounded
        return 4 if rounded <= 5 else round(rounded / DIVISOR) * DIVISOR

    def scale(self, plan: Plan, depth: float, width: float) -> Plan:
        """The plan with its depth and width multiplied.

        Widths are rounded first and then moved to the nearest ones that the group widths divide.
        """
        repeats: dict[int, int] = {}
        for stage in plan.stages:
            repeats[stage.part] = repeats.get(stage.part, 0) + stage.blocks
        blocks = []
        for part, total in repeats.items():
            own = [stage.blocks for stage in plan.stages if stage.part == part]
            blocks += shares(own, self.scaled_depth(total, depth))
        stages = [
            replace(
                stage,
                blocks=count,
                channels=self.scaled_width(stage.channels, width),
                group=self.scaled_group(stage.group, width),
            )
            for stage, count in zip(plan.stages, blocks, strict=True)
        ]
        head = self.scaled_width(plan.head, width) if plan.head else 0
        if self.head == "floor":
            head = max(plan.head, head)
        stem = self.scaled_width(plan.stem, width) if plan.stem and self.stem == "scaled" else plan.stem
        scaled = replace(plan, stem=stem, stages=tuple(stages), head=head)
        return scaled if width == 1 else divisible(scaled)


RULES = {
    "efficientnet": Rule(depth="ceil", width="keep", stem="scaled", head="scaled"),
    "tinynet": Rule(depth="round", width="keep", stem="fixed", head="floor"),
    "dwr": Rule(depth="round", width="nearest", stem="scaled", head="scaled", groups=True),
}


def shares(repeats: Sequence[int], total: int) -> list[int]:
    """``total`` blocks among definitions in the proportion of their repeats; one each where ``total`` is too few.

    The last is served first, so that the first, which is often the strided one, is repeated last.
    """
    served: list[int] = []
    for i in reversed(range(len(repeats))):
        left = total - sum(served)
        served.insert(0, max(1, min(left - i, round(left * repeats[i] / sum(repeats[: i + 1])))))
    return served


def divisible(plan: Plan) -> Plan:
    """The plan with each width moved to the nearest one that the groups of the blocks around it divide."""
    units = [1, *([plan.multiple] * len(plan.stages))]
    stages = list(plan.stages)
    for i, stage in enumerate(stages):
        if not stage.group:
            continue
        group = min(stage.group, max(1, int(stage.channels * stage.ratio)))
        stages[i] = replace(stage, group=group)
        # The least width whose multiple by the ratio is a multiple of the group.
        ratio = Fraction(stage.ratio).limit_denominator(64)
        unit = group * ratio.denominator // math.gcd(group * ratio.denominator, ratio.numerator)
        for place in (i, i + 1) if plan.expands_input else (i + 1,):
            units[place] = math.lcm(units[place], unit)
    stages = [
        replace(stage, channels=_nearest(stage.channels, unit)) for stage, unit in zip(stages, units[1:], strict=True)
    ]
    return replace(plan, stem=_nearest(plan.stem, units[0]) if plan.stem else 0, stages=tuple(stages))


def _nearest(channels: int, unit: int) -> int:
    return channels if channels % unit == 0 else max(1, round(channels / unit)) * unit


@dataclass(frozen=True)
class Factors:
    """Ratios of a scaled network to the original."""

    resolution: float
    depth: float
    width: float


def fast_scaling(scale: float, alpha: float = 0.8) -> Factors:
    """dWr's factors for ``scale`` times the multiply-adds: depth * width^2 * resolution^2 is ``scale``.

    The share ``alpha`` of the exponent goes to the width, the rest in halves to depth and resolution, so that the
    activations grow by little more than the root of ``scale``. Group widths grow as widths do.

    Raises:
        InputError: a scale that is not positive, or an alpha outside 0 to 1.
    """
    if not scale > 0:
        raise InputError("scale", scale, "is not positive", "Give a number above 0.")
    if not 0 <= alpha <= 1:
        raise InputError("alpha", alpha, "is out of range", "Give a number from 0 to 1.")
    rest = 1 - alpha
    return Factors(resolution=scale ** (rest / 4), depth=scale ** (rest / 2), width=scale ** (alpha / 2))


def fast_resolution(pixels: int, factor: float) -> int:
    """dWr's resolution: the nearest multiple of 4."""
    return max(1, round(pixels * factor / 4)) * 4


def tinynet_resolution(pixels: int, factor: float) -> int:
    """TinyNet's resolution: rounded down."""
    return int(pixels * factor + 1e-9)


def tinynet_width(ratio: float, resolution: float, depth: float) -> float:
    """The width of TinyNet's formula, as if all multiply-adds scaled with depth * width^2 * resolution^2.

    Stem and head do not, so the network differs from the ``ratio``, and by far for small ones; see ``solve_width``.
    """
    return math.sqrt(ratio / (resolution**2 * depth))


def solve_width(
    target: float, macs: Callable[[float], float], *, low: float = 0.05, high: float = 4.0, tolerance: float = 1e-3
) -> float:
    """The width multiplier whose counted multiply-adds are nearest to ``target``.

    Args:
        target: multiply-adds.
        macs: the count for a width multiplier; it never falls, and steps where widths are rounded.
        low, high: of the multipliers to look at.
        tolerance: how near to a step the answer may lie, in width.

    Raises:
        InputError: no width between ``low`` and ``high`` reaches the target.
    """
    least, most = macs(low), macs(high)
    if not least <= target <= most:
        remedy = f"Give a target from {least:.0f} to {most:.0f}, or another resolution and depth."
        raise InputError("target", target, "is not reached by any width", remedy)
    while high - low > tolerance:
        middle = (low + high) / 2
        count = macs(middle)
        if count <= target:
            low, least = middle, count
        else:
            high, most = middle, count
    return low if target - least <= most - target else high


@dataclass(frozen=True)
class Trained:
    """A scaled network that was trained: its ratios, its multiply-adds as a ratio to the original, its accuracy."""

    resolution: float
    depth: float
    macs: float
    accuracy: float


def fit_tinynet(
    trained: Sequence[Trained],
    ratio: float,
    macs: Callable[[float, float, float], float],
    *,
    share: float = 0.2,
    seed: int = 0,
) -> Factors:
    """TinyNet's rule for a ratio of multiply-adds, fitted to trained networks.

    The best ``share`` of them by non-dominated sorting of accuracy against multiply-adds give two Gaussian processes
    (RBF and noise) of the logarithm of the ratio: one for the resolution, one for the depth. The width is not taken
    from the formula but solved against counted multiply-adds.

    Args:
        trained: networks of random resolution, depth and width.
        ratio: of the multiply-adds that are wanted to the original's.
        macs: counted multiply-adds for resolution, depth and width ratios.
        share: of the networks to fit to.
        seed: of the optimiser's restarts.

    Raises:
        InputError: fewer than three networks to fit to, or a ratio that no width reaches.
    """
    import moocore
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, WhiteKernel

    keep = round(share * len(trained))
    if keep < 3:
        raise InputError("trained", len(trained), "are too few networks", f"Give at least {math.ceil(3 / share)}.")
    objectives = np.array([[-network.accuracy, network.macs] for network in trained])
    # Ties of rank by accuracy, so that a cut front keeps its more accurate half.
    ranks = moocore.pareto_rank(objectives)
    best = np.lexsort((objectives[:, 0], ranks))[:keep]
    inputs = np.log([[trained[i].macs] for i in best])
    predicted = []
    for values in ([trained[i].resolution for i in best], [trained[i].depth for i in best]):
        kernel = RBF(1.0, (0.5, 100.0)) + WhiteKernel(0.1, (1e-6, 10.0))
        process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=seed)
        process.fit(inputs, values)
        predicted.append(float(process.predict(np.log([[ratio]]))[0]))
    resolution, depth = predicted
    width = solve_width(ratio * macs(1.0, 1.0, 1.0), lambda width: macs(resolution, depth, width))
    return Factors(resolution, depth, width)
