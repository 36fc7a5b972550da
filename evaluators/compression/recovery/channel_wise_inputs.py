"""A recovery that quantises what layers read behind a layer normalisation with a scale for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from archfront.evaluators.compression.recovery.float_weights import check_no_codes, float_weights
from archfront.evaluators.compression.recovery.layer_norm_folding import fold_channel_scales
from archfront.evaluators.compression.recovery.recovery import Case, Recovery, inputs_of
from archfront.spaces.policies.quantised import float_weight, input_bits
from archfront.spaces.policies.quantiser import FLOAT, ActivationQuantiser, QuantisationParameters


class LayerNormFolding(Recovery):
    """Gives each channel of a layer normalisation's output its own range, and folds the ranges into the network.

    Where linear layers with quantised inputs are all that reads a normalisation, it is as if these had a scale and a
    zero point for each channel, at the price of one: see ``fold_channel_scales``. Other layers keep their inputs'.
    Normalisation after normalisation, in the order in which they run, so that each is observed behind those that were
    folded. Readers of one normalisation with different numbers of bits share its range.

    Li et al., "RepQ-ViT", 2023; with clipped scales LRP-QViT, whose own rule of clipping is not published (policies.md,
    A4).

    Args:
        percentile: of each channel's values on the calibration batches: its range ends there and at the complement.
        clip: percentile of the scales of all channels that none goes beyond; 100 clips none. Weights that read a
            channel grow with its scale, and share a quantiser with others.
    """

    name: ClassVar[str] = "layer-norm-folding"
    stage = 0

    def __init__(
        self,
        *,
        percentile: Annotated[float, Field(gt=50, le=100)] = 99.9,
        clip: Annotated[float, Field(gt=0, le=100)] = 99.0,
    ) -> None:
        self.percentile, self.clip = percentile, clip

    def recover(self, case: Case) -> None:
        found = readers_of_norms(case.student, case.batches[0][:1])
        if found:
            check_no_codes(case.student, self.name)
        for path, readers in found.items():
            norm = case.student.get_submodule(path)
            layers = [case.student.get_submodule(reader) for reader in readers]
            assert isinstance(norm, nn.LayerNorm)
            widths = [input_bits(layer) for layer in layers]
            ranges = self.observed(norm, inputs_of(case.student, path, case.batches), max(widths))
            with float_weights(layers):
                common = fold_channel_scales(
                    norm, [layer for layer in layers if isinstance(layer, nn.Linear)], ranges.scale, ranges.zero_point
                )
            for layer, bits in zip(layers, widths, strict=True):
                layer.add_module("input_quantiser", _quantiser(common, max(widths), bits))

    def observed(self, norm: nn.LayerNorm, inputs: Sequence[Tensor], bits: int) -> ActivationQuantiser:
        """Scale and zero point ``(d,)`` of each channel of a normalisation's output.

        Args:
            inputs: of the normalisation, ``(..., d)``.
        """
        made = ActivationQuantiser(bits, ranges="percentile", percentile=self.percentile, channel_axis=-1)
        with torch.no_grad():
            for one in inputs:
                made.observe(norm(one))
        made.freeze()
        # A range that shrinks at both ends alike keeps its zero point.
        made.scale = made.scale.clamp(max=float(made.scale.quantile(self.clip / 100)))
        return made


def readers_of_norms(model: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """Path of a layer normalisation -> the linear layers with quantised inputs that read it, where nothing else does.

    A normalisation counts if it has one axis and runs once a pass; a reader, if it reads nothing else, and its weight
    is no other module's too.

    Args:
        model: in evaluation mode.
        example: inputs of it.
    """
    made: dict[int, str] = {}
    kept: list[Tensor] = []
    runs: dict[str, int] = {}
    read: dict[str, set[str | None]] = {}

    def after(path: str, norm: nn.LayerNorm, _inputs: tuple[Any, ...], output: Tensor) -> None:
        runs[path] = runs.get(path, 0) + 1
        if len(norm.normalized_shape) == 1 and output.shape[-1] == norm.normalized_shape[0]:
            made[id(output)] = path
            # The tensor itself is kept: only so no other can take its identity while the pass goes on.
            kept.append(output)

    def before(path: str, _layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        read.setdefault(path, set()).add(made.get(id(inputs[0])))

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(partial(after, path)))
        elif isinstance(module, nn.Linear):
            # In front of the hook that quantises.
            handles.append(module.register_forward_pre_hook(partial(before, path), prepend=True))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    found: dict[str, list[str]] = {}
    for path, sources in read.items():
        layer = model.get_submodule(path)
        [norm] = sources if len(sources) == 1 else [None]
        if norm is None or runs[norm] > 1 or input_bits(layer) == FLOAT or owners.count(id(float_weight(layer))) > 1:
            continue
        found.setdefault(norm, []).append(path)
    return {norm: found[norm] for norm in runs if norm in found and _only_these_read(model, norm, found[norm], example)}


def _only_these_read(model: nn.Module, norm: str, readers: Sequence[str], example: Tensor) -> bool:
    """Whether the output has numbers still when all but the readers find none in what a normalisation gives."""
    given: dict[str, Tensor] = {}

    def spoil(_norm: nn.Module, _inputs: tuple[Any, ...], made: Tensor) -> Tensor:
        given["made"], given["spoilt"] = made, torch.full_like(made, torch.nan)
        return given["spoilt"]

    def restore(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *rest = inputs
        return (given["made"] if first is given.get("spoilt") else first, *rest)

    handles = [model.get_submodule(norm).register_forward_hook(spoil)]
    handles += [model.get_submodule(path).register_forward_pre_hook(restore, prepend=True) for path in readers]
    try:
        with torch.no_grad():
            return not bool(model(example).isnan().any())
    finally:
        for handle in handles:
            handle.remove()


def _quantiser(common: QuantisationParameters, most: int, bits: int) -> ActivationQuantiser:
    """Of a folded normalisation's output, at its number of bits, or over the same range at fewer."""
    made = ActivationQuantiser(bits)
    steps = (2**most - 1) / (2**bits - 1)
    made.scale = common.scale.reshape(1) * steps
    made.zero_point = (common.zero_point.reshape(1) / steps).round().to(torch.int16)
    return made
