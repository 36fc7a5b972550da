"""Files of torch's own whose chosen layers compute in int8: programs for Inductor, and TorchScript."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archfront.evaluators.deployment.int8_files import LayerNotFoundError, vnni
from archfront.evaluators.torch_files import export_program, exported, quiet, x86_quantiser

_SMALLEST_SCALE = 2**-12
"""As torchao has it."""

_TOLERANCE = 1e-4
"""Share by which a traced network's output may differ: the same operators compute it."""


def write_pt2e(
    model: nn.Module,
    target: Path,
    batches: Sequence[Tensor],
    ranges: Mapping[str, tuple[float, float] | None],
) -> None:
    """A program whose layers have weights and inputs in int8, for Inductor to fuse.

    Args:
        model: in evaluation mode, on the processor.
        batches: that other ranges are observed on, where none is given.
        ranges: path of each layer that shall compute in int8 -> lowest and highest of what it reads.

    Raises:
        LayerNotFoundError: a layer is no operator that torchao quantises.
        MissingExtraError: torchao is not installed.
    """
    quantiser = x86_quantiser().X86InductorQuantizer()
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        for path, extent in ranges.items():
            quantiser.set_module_name_qconfig(path, _configuration(extent))
        example = batches[0][:2]
        prepared = prepare_pt2e(exported(model, example, any_batch=True).module(), quantiser)
        _check_annotated(prepared, ranges)
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        converted = convert_pt2e(prepared)
        _drop_unread(converted)
        export_program(converted, example, target, any_batch=True)


def write_torchscript(model: nn.Module, target: Path, example: Tensor, paths: Sequence[str]) -> None:
    """Weights of linear layers in int8, and what they read in the range of each batch. As TorchScript, for
    ``torch.export`` cannot hold packed weights.

    Args:
        model: in evaluation mode, on the processor.
        example: its one input, ``(batch, ...)``.
        paths: of the linear layers.

    Raises:
        LayerNotFoundError: a layer is of a class that torch does not quantise.
        RuntimeError: the traced network computes something else, with another batch size.
    """
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with quiet(), torch.inference_mode(False), torch.no_grad():
        chosen = dict.fromkeys(paths, per_channel_dynamic_qconfig)
        quantised = quantize_dynamic(copy.deepcopy(model), chosen)  # type: ignore[no-untyped-call]
        for path in paths:
            if not isinstance(quantised.get_submodule(path), Linear):
                raise LayerNotFoundError(f"Layer {path!r} is no plain linear layer, which torch alone quantises.")
        given = example.clone()
        traced = torch.jit.trace(quantised, (given,), check_trace=False)  # type: ignore[no-untyped-call]
        # Sizes that the network computes with may be traced as the numbers they were.
        other = torch.cat([given, given[:1]])
        wanted, found = quantised(other), traced(other)
        if wanted.shape != found.shape or not (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
            raise RuntimeError(f"the traced network computes something else for a batch of {len(other)}")
        torch.jit.save(traced, str(target))


def _configuration(extent: tuple[float, float] | None) -> Any:
    """torchao's of one layer: inputs in a range, or in an observed one, and each channel's weights in its own."""
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import (
        FixedQParamsQuantizationSpec,
        QuantizationConfig,
        QuantizationSpec,
    )

    codes = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    if extent is not None and extent[1] > extent[0]:
        scale = (extent[1] - extent[0]) / 255
        inputs = FixedQParamsQuantizationSpec(scale=scale, zero_point=round(-extent[0] / scale), **codes)
    else:
        observer = MinMaxObserver.with_args(eps=_SMALLEST_SCALE)
        inputs = QuantizationSpec(observer_or_fake_quant_ctr=observer, **codes)
    low, high = (-128, 127) if vnni() else (-64, 63)
    weights = QuantizationSpec(
        dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=_weight_observer(),
    )  # fmt: skip
    return QuantizationConfig(inputs, inputs, weights, None, False)


def _weight_observer() -> Any:
    """Makes observers that give a channel the scale at which its squared error is least.

    Weights lie on a policy's grid already, which the usual scale, of the largest weight on code 127.5, would stretch or
    squeeze by 0.4 % in every layer.
    """
    from torchao.quantization.pt2e import PerChannelMinMaxObserver

    class Nearest(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao ships no types
        def forward(self, given: Tensor) -> Tensor:
            super().forward(given)
            self.rows = given.detach().flatten(1)
            return given

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            return nearest_scales(self.rows, self.quant_min, self.quant_max)

    return Nearest.with_args(eps=_SMALLEST_SCALE)


def nearest_scales(rows: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scales of symmetric codes and zero points, one of each row: of those that lay the largest weight on one of the
    outer codes, or between two, the one with the least squared error."""
    largest = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny * -low)
    # Down to 7/8 of the codes: there the grids of 2 to 8 bits fit in without a rest.
    scales = [largest / count for count in torch.arange(-low * 0.875, -low + 0.25, 0.5).tolist()]
    errors = [((rows / scale).round().clamp(low, high) * scale - rows).square().sum(1) for scale in scales]
    best = torch.stack(errors).argmin(0)
    found = torch.cat(scales, dim=1).gather(1, best.unsqueeze(1)).flatten()
    return found, torch.zeros_like(found, dtype=torch.int64)


def _check_annotated(prepared: Any, paths: Mapping[str, object]) -> None:
    """That torchao has taken every layer, and not passed one by without a word.

    Raises:
        LayerNotFoundError: names the first.
    """
    taken = set()
    for node in prepared.graph.nodes:
        note = node.meta.get("quantization_annotation")
        if note is not None and note.input_qspec_map:
            taken |= {name for name, _ in node.meta.get("nn_module_stack", {}).values()}
    for path in paths:
        if path not in taken:
            raise LayerNotFoundError(f"Layer {path!r} is no operator that torchao quantises for x86.")


def _drop_unread(converted: Any) -> None:
    """Remove the float weights that codes have replaced, which would travel with the program."""
    read = {str(node.target) for node in converted.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in [*converted.named_parameters(), *converted.named_buffers()] if n not in read]:
        owner, _, attribute = name.rpartition(".")
        delattr(converted.get_submodule(owner), attribute)
