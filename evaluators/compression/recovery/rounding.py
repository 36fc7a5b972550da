"""Recoveries that choose the codes of quantised weights anew, layer after layer or block after block."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.adaround import reconstruct
from archfront.evaluators.compression.recovery.gptq import gptq, hessian_of, layer_inputs
from archfront.evaluators.compression.recovery.recovery import Case, Recovery, inputs_of
from archfront.spaces.policies.quantised import float_weight, quantised_layers, with_float_weights
from archfront.spaces.policies.repeated_blocks import block_of


class Gptq(Recovery):
    """Rounds each layer's weights so that its outputs change least, on what the layers before, already rounded, give.

    Frantar et al., "GPTQ", 2023.

    Args:
        damping: share of the Hessian's mean diagonal that is added to it.
    """

    name: ClassVar[str] = "gptq"
    stage = 1

    def __init__(self, *, damping: Annotated[float, Field(ge=0)] = 0.01) -> None:
        self.damping = damping

    def recover(self, case: Case) -> None:
        for path, layer, holder in quantised_layers(case.student):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            weight = float_weight(layer)
            assert weight is not None
            inputs = inputs_of(case.student, path, case.batches)
            images = sum(len(one) for one in inputs)
            hessian = torch.zeros(())
            for one in inputs:
                hessian = hessian + hessian_of(layer_inputs(layer, one)) * (len(one) / images)
            _, _, holder.fixed = gptq(weight.detach(), hessian, holder.quantiser, damping=self.damping)


class AdaRound(Recovery):
    """Learns which way each weight is rounded so that the outputs of its block, or of its layer, change least.

    Nagel et al., "Up or Down?", 2020, of single layers; Li et al., "BRECQ", 2021, of blocks. Where too few steps leave
    a block worse than the nearest codes, it keeps these.

    Args:
        of: what is reconstructed at once; layers in no block are on their own.
        steps: of Adam for each.
        batch: inputs a step.
        learning_rate: of the rounding variables.
        regularisation: weight of the push towards 0 or 1.
    """

    name: ClassVar[str] = "adaround"
    stage = 1

    def __init__(
        self,
        *,
        of: Literal["blocks", "layers"] = "blocks",
        steps: Annotated[int, Field(ge=1)] = 1000,
        batch: Annotated[int, Field(ge=1)] = 32,
        learning_rate: Annotated[float, Field(gt=0)] = 1e-2,
        regularisation: Annotated[float, Field(ge=0)] = 0.01,
    ) -> None:
        self.of, self.steps, self.batch = of, steps, batch
        self.learning_rate, self.regularisation = learning_rate, regularisation

    def recover(self, case: Case) -> None:
        holders = {path: holder for path, _, holder in quantised_layers(case.student)}
        units: dict[str, list[str]] = {}
        for path in holders:
            block = block_of(case.student, path) if self.of == "blocks" else path
            units.setdefault(block, []).append(path)
        for unit, paths in units.items():
            _check_alike(case, unit, paths)
            inner = {path: path.removeprefix(unit).removeprefix(".") for path in paths}
            soft = with_float_weights(copy.deepcopy(case.student.get_submodule(unit)))
            found = reconstruct(
                case.teacher.get_submodule(unit),
                soft,
                torch.cat(inputs_of(case.teacher, unit, case.batches)),
                torch.cat(inputs_of(case.student, unit, case.batches)),
                {inner[path]: holders[path].quantiser for path in paths},
                steps=self.steps,
                batch=self.batch,
                learning_rate=self.learning_rate,
                regularisation=self.regularisation,
                seed=case.seed,
            )
            if found.mse > found.nearest_mse:
                continue
            for path in paths:
                weight = soft.get_submodule(inner[path]).weight
                assert isinstance(weight, Tensor)
                holders[path].fixed = weight.detach().clone()


def _check_alike(case: Case, unit: str, paths: list[str]) -> None:
    """Refuse a block whose outputs another policy has changed in shape.

    Raises:
        InputError: names the block.
    """
    weights = [float_weight(model.get_submodule(paths[-1])) for model in (case.teacher, case.student)]
    shapes = [None if weight is None else tuple(weight.shape) for weight in weights]
    if unit in paths and shapes[0] != shapes[1]:
        problem = f"has weights of {shapes[1]} where the network itself has {shapes[0]}"
        raise InputError("recovery.adaround", unit, problem, "Set of: blocks, or leave adaround out.")
