"""A trained network that is run under many policies, with what can be prepared once for all of them."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from archfront.evaluators.compression.fine_tuning import FineTuning
from archfront.evaluators.compression.quantised_layers import QuantisedLayers
from archfront.evaluators.compression.recovery.recovery import Case, Recovery
from archfront.evaluators.compression.shared_prefixes import SharedPrefixes, Sharing
from archfront.evaluators.datasets.dataset import DataSet, SplitName
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.measured_costs import measured_costs
from archfront.spaces.policies.packed_model import pack_model
from archfront.spaces.policies.policy_space import Policies, Variant

_MODELS_KEPT = 256
"""Compressed networks that are kept while batch after batch passes through them."""

JUDGED_TOGETHER = 64
"""Samples that pass at once where policies are judged: what lies between two layers then stays in the caches."""


Tune = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Judged:
    """Of one policy over some samples.

    Attributes:
        accuracy: percent right.
        drop: points below the network itself.
        divergence: mean Kullback-Leibler divergence of the class probabilities from the network's own, in nat.
    """

    accuracy: float
    accuracy_std: float
    drop: float
    drop_std: float
    divergence: float
    divergence_std: float


class Compressible:
    """A trained network ready to be run under many policies.

    Policies of bits alone share what they compute alike; any other policy, and any recovery, makes a network of its
    own.

    Args:
        space: of its policies.
        data: to judge and to calibrate on.
        calibration: samples of the training part.
        batch: samples of calibration that pass at once; of what is judged at most ``JUDGED_TOGETHER``.
        recovery: steps that each compressed network goes through.
        fine_tuning: that each compressed network gets, and the network itself before it is compared with them.
        reference: fine-tunes the network itself for a seed, or finds it tuned; in place.
    """

    def __init__(
        self,
        space: Policies,
        data: DataSet,
        calibration: int,
        batch: int = 256,
        *,
        recovery: Sequence[Recovery] = (),
        fine_tuning: FineTuning | None = None,
        reference: Callable[[int, nn.Module, Tune], nn.Module] = lambda _, network, tune: tune(network),
    ) -> None:
        self.space, self.data, self.batch = space, data, batch
        self.recovery, self.fine_tuning = list(recovery), fine_tuning
        self._reference = reference
        self.model = space.source.build()
        self._calibration, self._calibration_labels = self.inputs("train", calibration)
        self._own_logits: dict[tuple[SplitName, int | None, int], Tensor] = {}
        self._plain: OrderedDict[str, nn.Module] = OrderedDict()
        self._prepared: tuple[str, nn.Module] | None = None

    def inputs(
        self, part: SplitName, count: int | None = None, batch: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Normalised batches of a part's first samples, which are spread over the classes, and all their labels."""
        images, labels = self.data.part(part)
        if count is not None:
            # Parts lie in the order of the data, which may be that of the classes.
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
            images, labels = images[order], labels[order]
        return [self.normalised(some) for some in torch.split(images, batch or self.batch)], labels

    def normalised(self, images: Tensor) -> Tensor:
        """What the network takes, of the data's samples."""
        fixed = self.space.source.mean_and_deviation
        if fixed is None:
            return self.data.normalised(images)
        mean, std = (torch.tensor(values[: images.shape[1]]).view(-1, 1, 1) for values in fixed)
        return (images.float() / 255 - mean) / std

    @property
    def calibration(self) -> list[Tensor]:
        """Normalised batches of the training part, which ranges are observed on."""
        return self._calibration

    @property
    def shares(self) -> bool:
        """Whether policies share what they compute alike."""
        return isinstance(self.space, Bits) and not self.recovery and self.fine_tuning is None

    @property
    def sharing(self) -> Sharing:
        """Of the last call of ``outputs``, where policies share."""
        return self._shared.sharing

    def outputs(self, batch: Tensor, policies: Sequence[Variant]) -> list[Tensor]:
        """Logits under each policy, before any recovery, without gradients."""
        if isinstance(self.space, Bits):
            return self._shared.outputs(batch, policies)
        with torch.no_grad():
            return [self._transformed(policy)(batch) for policy in policies]

    def prepared(self, policy: Variant, seed: int = 0, *, packed: bool = False) -> nn.Module:
        """The network under a policy, recovered and fine-tuned; the last one is kept.

        Args:
            packed: with true low-bit weights.
        """
        if packed:
            return pack_model(copy.deepcopy(self.prepared(policy, seed)))
        key = f"{seed} {_key(policy)}"
        if self._prepared is None or self._prepared[0] != key:
            student = self.space.transform(copy.deepcopy(self.model), policy, self._calibration).eval()
            case = Case(
                student=student,
                teacher=self.model,
                batches=self._calibration,
                labels=self._calibration_labels,
                seed=seed,
            )
            for step in self.recovery:
                step.recover(case)
            if self.fine_tuning is not None:
                self.fine_tuning.tune(student, self.model, self.data, self.normalised, seed)
            self._prepared = key, student
        return self._prepared[1]

    def costs(self, policy: Variant, seed: int = 0) -> dict[str, float]:
        """``COSTS`` of the prepared network."""
        return measured_costs(self.prepared(policy, seed), self.space.source.example())

    def judged(
        self, part: SplitName, policies: Sequence[Variant], count: int | None, seed: int = 0, *, packed: bool = False
    ) -> list[Judged]:
        """Each policy over a part, or over so many samples of it, against the network itself, fine-tuned alike.

        Args:
            packed: with true low-bit weights, each network on its own.
        """
        batches, labels = self.inputs(part, count, min(self.batch, JUDGED_TOGETHER))
        own = self.own_logits(part, count, seed, batches)
        if packed or not self.shares:
            models = (self.prepared(policy, seed, packed=packed) for policy in policies)
            return [judged_outputs(labels, own, found) for found in (_all_logits(model, batches) for model in models)]
        right = torch.zeros(len(policies), *labels.shape, dtype=torch.bool)
        divergence = torch.zeros(len(policies), *labels.shape)
        start = 0
        for batch in batches:
            these = slice(start, start + len(batch))
            start += len(batch)
            for row, logits in enumerate(self.outputs(batch, policies)):
                right[row, these] = _right(logits, labels[these])
                divergence[row, these] = _divergence(logits, own[these])
        return [_judged(labels, own, *found) for found in zip(right, divergence, strict=True)]

    def reference(self, seed: int = 0) -> nn.Module:
        """The network that drops are measured from: itself, fine-tuned as the compressed ones are."""
        tuning = self.fine_tuning
        if tuning is None:
            return self.model

        def tune(network: nn.Module) -> nn.Module:
            return tuning.tune(network, self.model, self.data, self.normalised, seed)

        return self._reference(seed, copy.deepcopy(self.model), tune)

    def own_logits(self, part: SplitName, count: int | None, seed: int, batches: list[Tensor]) -> Tensor:
        """Of the reference, on the batches of ``inputs(part, count)``; computed once."""
        if (part, count, seed) not in self._own_logits:
            self._own_logits[part, count, seed] = _all_logits(self.reference(seed), batches)
        return self._own_logits[part, count, seed]

    @cached_property
    def _shared(self) -> SharedPrefixes:
        assert isinstance(self.space, Bits)
        layers = QuantisedLayers(self.space, self.model, self._calibration)
        return SharedPrefixes(self.model, layers.paths, layers)

    def _transformed(self, policy: Variant) -> nn.Module:
        """The network under a policy alone."""
        key = _key(policy)
        if key not in self._plain:
            made = self.space.transform(copy.deepcopy(self.model), policy, self._calibration)
            self._plain[key] = made.eval()
            while len(self._plain) > _MODELS_KEPT:
                self._plain.popitem(last=False)
        return self._plain[key]


def judged_outputs(labels: Tensor, own: Tensor, found: Tensor) -> Judged:
    """What some logits lose against the network's own."""
    return _judged(labels, own, _right(found, labels), _divergence(found, own))


def _key(policy: Variant) -> str:
    return repr(sorted(policy.items()))


def _all_logits(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which labels are met; where a logit is not finite, none is."""
    return (logits.argmax(-1) == labels) & torch.isfinite(logits).all(-1)


def _divergence(logits: Tensor, own: Tensor) -> Tensor:
    """Of each label's class probabilities from the network's own."""
    wanted = functional.log_softmax(own, -1)
    return functional.kl_div(functional.log_softmax(logits, -1), wanted, reduction="none", log_target=True).sum(-1)


def _judged(labels: Tensor, own: Tensor, right: Tensor, divergence: Tensor) -> Judged:
    """Of ``(n,)`` samples, or of ``(n, places)``: places of one sample are not independent, and count together."""
    before, after, moved = (x.double().reshape(len(x), -1).mean(1) for x in (_right(own, labels), right, divergence))
    root = math.sqrt(len(after))
    share = float(after.mean())
    # Of single labels the deviation is known; that of a sample's share is observed.
    deviation = math.sqrt(share * (1 - share)) if right.dim() == 1 else _spread(after)
    return Judged(
        accuracy=100 * share,
        accuracy_std=100 * deviation / root,
        drop=100 * float((before - after).mean()),
        drop_std=100 * _spread(before - after) / root,
        divergence=float(moved.mean()),
        divergence_std=_spread(moved) / root,
    )


def _spread(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
