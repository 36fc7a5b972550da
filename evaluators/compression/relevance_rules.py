"""Rules of layer-wise relevance propagation, as changed gradients: a tensor times its gradient is its relevance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from archfront.errors import InputError

Rule = Literal["epsilon", "gamma"]
Attention = Literal["detached", "shared"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How relevance is shared among what a layer reads.

    Attributes:
        rule: of linear layers and convolutions. ``epsilon`` (Bach et al. 2015): in proportion to the
            contributions ``x_i w_ij``; ``gamma`` (Montavon et al. 2019): contributions of the output's own sign count
            ``1 + gamma`` fold, whatever the sign of the input.
        epsilon: added to the size of each denominator, in units of the layer's output.
        gamma: of that rule.
        attention: ``detached``: attention weights are constants and only values carry relevance (CP-LRP, Ali et al.
            2022); ``shared``: half of it goes to the weights, and on to queries and keys (AttnLRP, Achtibat et al.
            2024).
    """

    rule: Rule = "epsilon"
    epsilon: float = 1e-6
    gamma: float = 0.25
    attention: Attention = "detached"


@dataclass(frozen=True)
class _Sum:
    """An affine layer's output before its bias, with the part that positive contributions make, and that bias."""

    total: Tensor
    positive: Tensor | None
    bias: Tensor | None

    def normalised(self, scale: Tensor, offset: Tensor) -> _Sum:
        """Of the layer with a batch norm folded into it."""
        positive = self.positive
        if positive is not None:
            positive = torch.where(scale > 0, positive, self.total - positive) * scale
        return _Sum(self.total * scale, positive, offset if self.bias is None else self.bias * scale + offset)


class RelevanceTracer(TorchFunctionMode):
    """While entered, what a network computes has the gradients of its rules.

    Only what depends on the images requires a gradient, so that tells factors and addends from constants. Nothing is
    written in place: what an earlier layer gave is still to be looked at.

    Args:
        network: a copy, which is left with hooks; no parameter of it may require a gradient.
        rules: to go by.

    Attributes:
        outputs: path -> what the layer gave, at each call, and again behind a batch norm that is folded into it.
        constants: leaves that take the relevance of all that is added and does not depend on the images.
    """

    def __init__(self, network: nn.Module, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.outputs: dict[str, list[Tensor]] = {}
        self.constants: list[Tensor] = []
        self._running: list[tuple[str, nn.Module]] = []
        # By the output's id; the output is kept, lest another tensor get its id.
        self._sums: dict[int, tuple[Tensor, str, _Sum]] = {}
        for path, module in network.named_modules():
            module.register_forward_pre_hook(partial(self._enter, path), prepend=True)
            module.register_forward_hook(self._leave)

    def _enter(self, path: str, module: nn.Module, _inputs: object) -> None:
        self._running.append((path, module))

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if not any(_depends(tensor) for tensor in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        if name in _RULES:
            return _RULES[name](self, func, *args, **kwargs)
        found = func(*args, **kwargs)
        if name not in _AS_IT_IS and (found is None or any(_depends(tensor) for tensor in _tensors(found))):
            self.refuse(f"computes {name!r}, for which there is no rule of relevance")
        return found

    def refuse(self, problem: str) -> NoReturn:
        path, module = self._running[-1]
        where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
        remedy = "Choose a score that needs no rules: 'perturbation', 'taylor' or 'distortion'."
        raise InputError("score.relevance", where, problem, remedy)

    def constant(self, value: Any, like: Tensor) -> Tensor:
        """A leaf that takes the relevance of an addend that does not depend on the images."""
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        leaf: Tensor = value.detach().clone().requires_grad_()
        self.constants.append(leaf)
        return leaf

    def output(self, path: str, parts: _Sum) -> Tensor:
        """Of an affine layer, by the rule."""
        total, positive = parts.total, parts.positive
        if parts.bias is not None:
            bias = self.constant(parts.bias, total)
            total = total + bias
            positive = None if positive is None else positive + bias.clamp(min=0)
        found = _stabilised(total, positive, self.rules)
        self._sums[id(found)] = (found, path, parts)
        self.outputs.setdefault(path, []).append(found)
        return found

    # The rules: each with the signature of what it stands for, after that function itself.

    def affine(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any) -> Any:
        if _depends(weight):
            self.refuse("has weights that depend on the input")
        of_shape = (-1,) if func is functional.linear else (-1, *[1] * (weight.ndim - 2))
        positive = None
        if self.rules.rule == "gamma":
            above, below = (
                func(x.clamp(**{side: 0}), weight.clamp(**{side: 0}), None, *rest, **more) for side in ("min", "max")
            )
            positive = above + below
        total = func(x, weight, None, *rest, **more)
        return self.output(self._running[-1][0], _Sum(total, positive, None if bias is None else bias.view(of_shape)))

    def batch_norm(
        self, func: Any, x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """Folded into the layer that it follows; by itself, a scale and an offset."""
        if training or mean is None or variance is None:
            self.refuse("normalises by the statistics of the batch")
        scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
        offset = (0 if bias is None else bias) - mean * scale
        scale, offset = (value.view(-1, *[1] * (x.ndim - 2)) for value in (scale, offset))
        if id(x) in self._sums:
            _, path, parts = self._sums[id(x)]
            return self.output(path, parts.normalised(scale, offset))
        total = x * scale
        positive = total.clamp(min=0) if self.rules.rule == "gamma" else None
        return self.output(self._running[-1][0], _Sum(total, positive, offset))

    def layer_norm(
        self, func: Any, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """With its deviation a constant, it is linear but for its bias (AttnLRP)."""
        over = tuple(range(-len(shape), 0))
        centred = x - x.mean(over, keepdim=True)
        scaled = centred * torch.rsqrt(x.detach().var(over, correction=0, keepdim=True) + eps)
        scaled = scaled if weight is None else scaled * weight
        return scaled if bias is None else scaled + self.constant(bias, x)

    def pointwise(self, func: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        """The identity rule, for functions that are 0 at 0: all relevance passes (AttnLRP)."""
        value = x.detach()
        # A copy, as the function may be told to write in place.
        ratio = func(value.clone(), *rest, **more) / value
        return x * torch.where(value == 0, torch.zeros_like(ratio), ratio)

    def tangent(self, func: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Input times gradient; the rest of the value is absorbed, as a bias (AttnLRP)."""
        value = x.detach()

        def call(given: Tensor) -> Tensor:
            # A copy, as the function may be told to write in place.
            result: Tensor = func(given.clone(), *rest, **more)
            return result

        found = call(x)
        directions = torch.where(value.isfinite(), value, torch.zeros_like(value))
        linear = torch.func.jvp(call, (value,), (directions,))[1]
        remainder = found.detach() - linear
        output: Tensor = found - remainder + self.constant(remainder, found)
        return output

    def softmax(self, func: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        if self.rules.attention == "detached":
            weights: Tensor = func(x.detach(), *rest, **more)
            return weights
        return self.tangent(func, x, *rest, **more)

    def attend(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Fused attention, step by step."""
        if is_causal or enable_gqa:
            self.refuse("computes causal or grouped attention")
        fits = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        fits = self.product(torch.matmul, fits, key.transpose(-2, -1))
        if attn_mask is not None:
            kept = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
            if attn_mask.dtype != torch.bool:
                fits = fits + self.constant(attn_mask.masked_fill(~kept, 0), fits)
            fits = fits.masked_fill(~kept, -math.inf)
        return self.product(torch.matmul, self.softmax(torch.softmax, fits, -1), value)

    def product(self, func: Any, one: Any, other: Any, **more: Any) -> Tensor:
        """Each of two factors takes half (AttnLRP); beside a constant factor, the other takes all."""
        found: Tensor = _OUT_OF_PLACE.get(func.__name__, func)(one, other, **more)
        if _depends(one) and _depends(other):
            found = _with_slopes(found, found, 0.5)
        return found

    def quotient(self, func: Any, one: Any, other: Any, **more: Any) -> Tensor:
        """The denominator is a constant, as in the normalisations."""
        if not _depends(one):
            self.refuse("divides a constant by what depends on the input")
        return torch.div(one, other.detach() if isinstance(other, Tensor) else other, **more)

    def addition(self, func: Any, one: Any, other: Any, **more: Any) -> Tensor:
        like = one if _depends(one) else other
        one, other = (part if _depends(part) else self.constant(part, like) for part in (one, other))
        found: Tensor = _OUT_OF_PLACE.get(func.__name__, func)(one, other, **more)
        return found

    def joined(self, func: Any, tensors: Any, *rest: Any, **more: Any) -> Tensor:
        like = next(tensor for tensor in tensors if _depends(tensor))
        parts = [tensor if _depends(tensor) else self.constant(tensor, like) for tensor in tensors]
        found: Tensor = func(parts, *rest, **more)
        return found

    def padded(self, func: Any, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
        # Minus infinity comes before a maximum, which never chooses it.
        if value not in (None, 0, -math.inf):
            self.refuse(f"pads with {value}")
        found: Tensor = func(x, pad, mode, value)
        return found


def _depends(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _with_slopes(value: Tensor, of: Tensor, factor: Tensor | float) -> Tensor:
    """A value with the gradient of another tensor times a factor."""
    return value.detach() + (of - of.detach()) * factor


def _stabilised(total: Tensor, positive: Tensor | None, rules: Rules) -> Tensor:
    """An affine layer's output, whose gradient is its relevance over the rule's denominator."""
    value, weighed = total.detach(), total
    if positive is not None:
        weighed = total + rules.gamma * torch.where(value >= 0, positive, total - positive)
    denominator = weighed.detach()
    denominator = denominator + torch.copysign(torch.full_like(denominator, rules.epsilon), denominator)
    # Nothing to share: neither is there relevance.
    factor = torch.where(denominator == 0, torch.zeros_like(value), value / denominator)
    return _with_slopes(total, weighed, factor)


_OUT_OF_PLACE: dict[str, Callable[..., Tensor]] = {"add_": torch.add, "sub_": torch.sub, "mul_": torch.mul}

_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), RelevanceTracer.affine),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub", "__rsub__"), RelevanceTracer.addition),
    **dict.fromkeys(("mul", "mul_", "matmul", "bmm"), RelevanceTracer.product),
    **dict.fromkeys(("div", "div_"), RelevanceTracer.quotient),
    **dict.fromkeys(("cat", "concat", "stack"), RelevanceTracer.joined),
    **dict.fromkeys(("relu", "relu_", "relu6", "leaky_relu", "hardtanh", "tanh"), RelevanceTracer.pointwise),
    **dict.fromkeys(("elu", "selu", "celu", "gelu", "silu", "hardswish", "mish"), RelevanceTracer.pointwise),
    **dict.fromkeys(("sigmoid", "hardsigmoid"), RelevanceTracer.tangent),
    "softmax": RelevanceTracer.softmax,
    "scaled_dot_product_attention": RelevanceTracer.attend,
    "batch_norm": RelevanceTracer.batch_norm,
    "layer_norm": RelevanceTracer.layer_norm,
    "pad": RelevanceTracer.padded,
}  # fmt: skip

_AS_IT_IS = {
    "reshape", "view", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "unbind", "chunk", "split",
    "narrow", "select", "index_select", "__getitem__", "__get__", "expand", "expand_as", "repeat", "contiguous",
    "clone", "to", "float", "double", "squeeze", "unsqueeze", "roll", "flip", "mean", "sum", "neg", "avg_pool1d",
    "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_max_pool2d",
    "amax", "dropout", "dropout2d", "pixel_shuffle", "pixel_unshuffle", "interpolate",
}  # fmt: skip
"""Linear without an offset, or a choice among values: the gradient as it is shares relevance in full."""
