"""A trained network that is run under many policies, with what can be prepared once for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archfront.evaluators.compression.shared_prefixes import SharedPrefixes, Sharing
from archfront.evaluators.datasets.dataset import DataSet, SplitName
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.quantised import Calibration, LayerBits
from archfront.spaces.policies.quantiser import FLOAT, ActivationQuantiser, ActivationRanges


@dataclass(frozen=True)
class Judged:
    """Of one policy over some images: percent right, and how many points below the network itself."""

    accuracy: float
    accuracy_std: float
    drop: float
    drop_std: float


class Compressible:
    """A trained network ready to be run under many policies of bits.

    Args:
        space: of its policies.
        data: to judge and to calibrate on.
        calibration: images of the training part.
        batch: images that pass at once.
        ranges: of activations.
    """

    def __init__(
        self, space: Bits, data: DataSet, calibration: int, batch: int = 256, ranges: ActivationRanges = "mse"
    ) -> None:
        self.space, self.data, self.batch = space, data, batch
        self.model = space.source.build()
        self._weights: dict[tuple[str, int], Tensor] = {}
        self._right: dict[tuple[SplitName, int | None], Tensor] = {}
        paths = [layer.path for layer in space.layers.found]
        self._ranges = self._calibrated(paths, calibration, ranges)
        self._shared = SharedPrefixes(self.model, paths, self._run)

    def inputs(self, part: SplitName, count: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Normalised batches of a part's first images, which are spread over the classes, and all their labels."""
        images, labels = self.data.part(part)
        if count is not None:
            # Parts lie in the order of the data, which may be that of the classes.
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
            images, labels = images[order], labels[order]
        return [self._normalised(some) for some in torch.split(images, self.batch)], labels

    @property
    def sharing(self) -> Sharing:
        """Of the last call of ``outputs``."""
        return self._shared.sharing

    def outputs(self, batch: Tensor, policies: Sequence[dict[str, LayerBits]]) -> list[Tensor]:
        """Logits of each policy, without gradients."""
        return self._shared.outputs(batch, policies)

    def judged(self, part: SplitName, policies: Sequence[dict[str, LayerBits]], count: int | None) -> list[Judged]:
        """Each policy over a part, or over so many images of it."""
        batches, labels = self.inputs(part, count)
        right = torch.zeros(len(policies), len(labels), dtype=torch.bool)
        start = 0
        for batch in batches:
            wanted = labels[start : start + len(batch)]
            for row, logits in enumerate(self.outputs(batch, policies)):
                right[row, start : start + len(batch)] = _right(logits, wanted)
            start += len(batch)
        own = self._own(part, count, batches, labels)
        return [_judged(own, row) for row in right]

    def _own(self, part: SplitName, count: int | None, batches: list[Tensor], labels: Tensor) -> Tensor:
        """Which images the network itself has right."""
        if (part, count) not in self._right:
            with torch.no_grad():
                self._right[part, count] = _right(torch.cat([self.model(batch) for batch in batches]), labels)
        return self._right[part, count]

    def _normalised(self, images: Tensor) -> Tensor:
        fixed = self.space.source.mean_and_deviation
        if fixed is None:
            return self.data.normalised(images)
        mean, std = (torch.tensor(values[: images.shape[1]]).view(-1, 1, 1) for values in fixed)
        return (images.float() / 255 - mean) / std

    def _calibrated(self, paths: list[str], count: int, ranges: ActivationRanges) -> Callable[[str, int], nn.Module]:
        widths = {bits for bits in self.space.keep.values() if bits != FLOAT}
        if self.space.activations == "float":
            widths = set()
        else:
            chosen = self.space.weight_bits if self.space.activations == "follow" else self.space.activations
            widths |= {int(bits) for bits in chosen if bits != FLOAT}
        batches, _ = self.inputs("train", count)
        return Calibration(
            self.model, paths, batches, tuple(sorted(widths)), lambda bits: ActivationQuantiser(bits, ranges=ranges)
        )

    def _run(self, path: str, layer: nn.Module, bits: LayerBits, features: Tensor) -> Tensor:
        if bits.activations != FLOAT:
            features = self._ranges(path, bits.activations)(features)
        # The class's own forward: layers may pad or standardise as they like. The weight is put in its place meanwhile.
        kept = layer._parameters["weight"]
        layer._parameters["weight"] = self._weight(path, layer, bits.weights)  # type: ignore[assignment]
        try:
            output: Tensor = type(layer).forward(layer, features)
        finally:
            layer._parameters["weight"] = kept
        return output

    def _weight(self, path: str, layer: nn.Module, bits: int) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if bits == FLOAT:
            return weight
        if (path, bits) not in self._weights:
            self._weights[path, bits] = self.space.quantiser(bits).fake(weight)
        return self._weights[path, bits]


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows are classified right; one that is not finite is not."""
    return (logits.argmax(1) == labels) & torch.isfinite(logits).all(1)


def _judged(own: Tensor, right: Tensor) -> Judged:
    count = len(right)
    share = float(right.double().mean())
    difference = own.double() - right.double()
    spread = float(difference.std()) if count > 1 else 0.0
    return Judged(
        accuracy=100 * share,
        accuracy_std=100 * math.sqrt(share * (1 - share) / count),
        drop=100 * float(difference.mean()),
        drop_std=100 * spread / math.sqrt(count),
    )
