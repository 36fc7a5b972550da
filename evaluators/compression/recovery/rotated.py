"""A recovery that rotates a transformer's residual stream and rounds its weights for the tokens that matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.float_weights import check_no_codes, float_weights
from archfront.evaluators.compression.recovery.gptq import gptq, hessian_of, layer_inputs
from archfront.evaluators.compression.recovery.recovery import Case, Recovery, inputs_of
from archfront.evaluators.compression.recovery.residual_stream import Attention, residual_stream
from archfront.evaluators.compression.recovery.rotation import attention_received, random_rotation
from archfront.spaces.policies.quantised import float_weight, input_bits, quantised_layers
from archfront.spaces.policies.quantiser import FLOAT


class Rsq(Recovery):
    """Rotates the residual stream, which spreads its outliers, and rounds layer after layer by GPTQ, in which the error
    at a token counts as much as its block's tokens attend to it.

    Layers that no block has count all tokens alike. Attention is that of the float weights on what the layers before,
    already rounded, give; in a decoder the first tokens receive more of it, whatever they are. The paper rotates inside
    blocks too, which needs products at inference, and is not done here. Where a step after this compares blocks
    with those of the network itself, as ``adaround`` does, their streams differ by the rotation.

    Sung et al., "RSQ: Learning from Important Tokens", 2025.

    Args:
        rotate: whether to.
        importance: whether tokens count by what they receive, or alike.
        damping: share of the Hessian's mean diagonal that is added to it.
    """

    name: ClassVar[str] = "rsq"
    stage = 1

    def __init__(
        self, *, rotate: bool = True, importance: bool = True, damping: Annotated[float, Field(ge=0)] = 0.01
    ) -> None:
        self.rotate, self.importance, self.damping = rotate, importance, damping

    def check(self, student: nn.Module) -> None:
        for path, module in student.named_modules():
            if input_bits(module) != FLOAT:
                problem = f"finds {path} with quantised inputs, whose ranges are not those of a rotated stream"
                raise InputError("recovery", self.name, problem, "Set activations to float.")
        if any(True for _ in quantised_layers(student)):
            residual_stream(student)

    def recover(self, case: Case) -> None:
        """See the base.

        Raises:
            InputError: a network whose residual stream is not known, quantised inputs, or weights that a step before
                has rounded.
        """
        layers = list(quantised_layers(case.student))
        self.check(case.student)
        if not layers:
            return
        check_no_codes(case.student, self.name)
        stream = residual_stream(case.student)
        if self.rotate:
            with float_weights(stream.layers):
                stream.rotate(random_rotation(stream.width, case.seed))
        known: dict[str, list[Tensor]] = {}
        for path, layer, holder in layers:
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            weight = float_weight(layer)
            assert weight is not None
            attention = stream.attention_of(path) if self.importance else None
            if attention is not None and attention.block not in known:
                known[attention.block] = token_weights(case.student, attention, case.batches)
            inputs = inputs_of(case.student, path, case.batches)
            hessian = weighted_hessian(layer, inputs, None if attention is None else known[attention.block])
            _, _, holder.fixed = gptq(weight.detach(), hessian, holder.quantiser, damping=self.damping)


def token_weights(model: nn.Module, attention: Attention, batches: Sequence[Tensor]) -> list[Tensor]:
    """Attention that each token receives in a block, see ``attention_received``: ``(n, t)`` for each batch."""
    with torch.no_grad():
        return [
            attention_received(attention.probabilities(features))
            for features in inputs_of(model, attention.reader, batches)
        ]


def weighted_hessian(
    layer: nn.Linear | nn.Conv2d, inputs: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """``hessian_of`` what a layer reads, over all batches: ``(groups, d, d)``.

    Args:
        inputs: of the layer, ``(n, ...)`` for each batch.
        weights: of its tokens, ``(n, t)`` for each batch; None for 1 each.
    """
    count = sum(len(one) for one in inputs)
    found = torch.zeros(())
    for i, one in enumerate(inputs):
        mine = None if weights is None else weights[i].flatten()
        found = found + hessian_of(layer_inputs(layer, one), mine) * (len(one) / count)
    return found
