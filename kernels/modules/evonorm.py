"""EvoNorm layers on their operators, for inference: all that is stored are buffers, detached from their origin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archfront.kernels.ops.evonorm import evonorm_b0, evonorm_s0


class EvoNormS0(nn.Module):
    """``x * sigmoid(v * x) / sqrt(var + eps) * weight + bias``, the variance over each image's groups of channels.

    Args:
        channels: of the input.
        groups: of neighbouring channels; divides ``channels``.
        eps: added to the variance.
        device: of the buffers, which are float32 until the module is cast.
    """

    v: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self, channels: int, groups: int = 32, *, eps: float = 1e-5, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.channels, self.groups, self.eps = channels, groups, eps
        self.register_buffer("v", torch.ones(channels, device=device))
        self.register_buffer("weight", torch.ones(channels, device=device))
        self.register_buffer("bias", torch.zeros(channels, device=device))

    @classmethod
    def from_timm(cls, layer: nn.Module) -> EvoNormS0:
        """Of timm's ``EvoNorm2dS0`` or ``EvoNorm2dS0a``.

        Raises:
            ValueError: another layer, or one without its activation, which has no variance either.
        """
        found: Any = _activated(layer, ("EvoNorm2dS0", "EvoNorm2dS0a"))
        made = cls(len(found.weight), int(found.groups), eps=float(found.eps))
        _copy(made, layer, ("v", "weight", "bias"))
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, h, w)`` to the same.

        Raises:
            ValueError: what ``evonorm_s0`` does not serve.
        """
        return evonorm_s0(x.contiguous(), self.v, self.weight, self.bias, groups=self.groups, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, eps={self.eps}"


class EvoNormB0(nn.Module):
    """``x / max(sqrt(running_var + eps), v * x + sqrt(var + eps)) * weight + bias``, the variance over each plane.

    The running variance stays as it is, in ``train()`` too.

    Args:
        channels: of the input.
        eps: added to both variances.
        device: of the buffers, which are float32 until the module is cast.
    """

    v: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-3, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.register_buffer("v", torch.ones(channels, device=device))
        self.register_buffer("running_var", torch.ones(channels, device=device))
        self.register_buffer("weight", torch.ones(channels, device=device))
        self.register_buffer("bias", torch.zeros(channels, device=device))

    @classmethod
    def from_timm(cls, layer: nn.Module) -> EvoNormB0:
        """Of timm's ``EvoNorm2dB0``, as it acts in eval mode.

        Raises:
            ValueError: another layer, or one without its activation, which has no variance either.
        """
        found: Any = _activated(layer, ("EvoNorm2dB0",))
        made = cls(len(found.weight), eps=float(found.eps))
        _copy(made, layer, ("v", "running_var", "weight", "bias"))
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, h, w)`` to the same.

        Raises:
            ValueError: what ``evonorm_b0`` does not serve.
        """
        return evonorm_b0(x.contiguous(), self.v, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


def _activated(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    # By name, since the kernels need no timm.
    if type(layer).__name__ not in names:
        raise ValueError(f"layer: {type(layer).__name__} is not served; {' or '.join(names)} is")
    if getattr(layer, "v", None) is None:
        raise ValueError("layer: apply_act=False is not served; a layer with its activation is")
    return layer


def _copy(made: nn.Module, layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(made, name, getattr(layer, name).detach().clone())
