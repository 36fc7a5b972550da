"""The layers of a model that can be given bit widths: what they weigh, and which of them read one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from archfront.errors import InputError
from archfront.spaces.policies.quantised import QuantisedWeight, float_weight
from archfront.spaces.policies.quantiser import ActivationQuantiser

SUPPORTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A linear or convolutional layer as one forward pass met it.

    Attributes:
        path: of the module.
        shape: of its weight.
        macs: multiply-adds for one input.
        inputs: elements that it reads for one input.
        source: number of the tensor that it reads: layers with one number read the same tensor.
        calls: how often a pass runs it.
        float_bytes: that the weight takes as it is.
    """

    path: str
    shape: tuple[int, ...]
    macs: int
    inputs: int
    source: int
    float_bytes: int
    calls: int = 1

    @property
    def params(self) -> int:
        """Elements of the weight, without the bias."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layers:
    """What a pass over a model found.

    Attributes:
        found: the layers that can be given bits, in the order in which they run.
        left_alone: paths of modules with weights that cannot, and why.
        params: elements of all parameters of the model.
        other_bytes: of all parameters and buffers but the weights of these layers.
        other_macs: of linear and convolutional layers that are left alone.
    """

    found: tuple[LayerFacts, ...]
    left_alone: dict[str, str]
    params: int
    other_bytes: int
    other_macs: int = 0

    @property
    def macs(self) -> int:
        """Of all linear and convolutional layers."""
        return sum(layer.macs for layer in self.found) + self.other_macs


def find_layers(model: nn.Module, example: Tensor) -> Layers:
    """The layers of a model, from one pass over ``example`` ``(1, ...)`` without gradients.

    Raises:
        InputError: the model fails on the example, or has no layer that can be given bits.
    """
    names = {module: path for path, module in model.named_modules()}
    seen: dict[str, list[tuple[Tensor, int]]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The tensor itself is kept: only so no other can take its identity while the pass goes on.
        seen.setdefault(names[module], []).append((inputs[0], _macs(module, output)))

    handles = [module.register_forward_hook(note) for module in names if isinstance(module, SUPPORTED)]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    except Exception as error:
        problem = f"fails on an input of shape {tuple(example.shape)} ({type(error).__name__}: {error})"
        raise InputError("model", type(model).__name__, problem, "Give the shape that it takes.") from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not seen:
        problem = "runs no linear or convolutional layer"
        raise InputError("model", type(model).__name__, problem, "Give a model with nn.Linear or nn.Conv2d.")
    weights = {path: float_weight(model.get_submodule(path)) for path in seen}
    owners: dict[int, list[str]] = {}
    for path, weight in weights.items():
        owners.setdefault(id(weight), []).append(path)
    left_alone = dict(_others(model, set(seen)))
    sources: dict[int, int] = {}
    found = []
    inside = 0
    for path, calls in seen.items():
        weight = weights[path]
        if weight is None:
            left_alone[path] = "computes its weight from others"
            continue
        if others := [other for other in owners[id(weight)] if other != path]:
            left_alone[path] = f"shares its weight with {', '.join(others)}"
            continue
        inside += weight.numel() * weight.element_size()
        found.append(
            LayerFacts(
                path=path,
                shape=tuple(weight.shape),
                macs=sum(macs for _, macs in calls),
                inputs=calls[0][0].numel(),
                source=sources.setdefault(id(calls[0][0]), len(sources)),
                calls=len(calls),
                float_bytes=weight.numel() * weight.element_size(),
            )
        )
    if not found:
        raise InputError("model", type(model).__name__, f"has no layer for bits: {left_alone}", "Give another model.")
    # What quantisers keep is no part of the network, or has a price of its own.
    ours = {
        id(b) for m in model.modules() if isinstance(m, (QuantisedWeight, ActivationQuantiser)) for b in m.buffers()
    }
    kept = [b for b in model.buffers() if b.is_floating_point() and id(b) not in ours]
    tensors = [*model.parameters(), *kept]
    all_bytes = sum(t.numel() * t.element_size() for t in tensors)
    other_macs = sum(macs for path, calls in seen.items() if path in left_alone for _, macs in calls)
    params = sum(p.numel() for p in model.parameters())
    return Layers(tuple(found), left_alone, params, all_bytes - inside, other_macs)


def _macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    assert isinstance(module, nn.Linear)
    return output.numel() * module.in_features


def _others(model: nn.Module, taken: set[str]) -> Iterator[tuple[str, str]]:
    """Modules with weights of two axes and more that get no bits."""
    for path, module in model.named_modules():
        if path in taken or isinstance(module, parametrize.ParametrizationList):
            continue
        weights = [name for name, p in module.named_parameters(recurse=False) if p.ndim >= 2]
        if isinstance(module, SUPPORTED):
            yield path, "is never run"
        elif weights:
            yield path, f"{type(module).__name__} with {', '.join(weights)} is no linear or convolutional layer"
