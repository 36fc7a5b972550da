"""An inverted residual on its operator, for inference: all that is stored are buffers, detached from their origin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from archfront.kernels.ops.inverted_residual import inverted_residual

_SHIFTS = ("expand_shift", "depthwise_shift", "project_shift")


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection with folded norms, and x added if ``residual``.

    Args:
        channels_in, hidden, channels: of the input, the depthwise convolution and the result.
        kernel: of the depthwise convolution, 3 or 5.
        stride: 1 or 2.
        expand: whether there is a first convolution; without, ``hidden`` is ``channels_in``.
        residual: whether x is added.
        dtype: of the weights; shifts stay float32 whatever the module is cast to.
        device: of the buffers.
    """

    expand: Tensor | None
    expand_shift: Tensor | None
    depthwise: Tensor
    depthwise_shift: Tensor
    project: Tensor
    project_shift: Tensor

    def __init__(
        self,
        channels_in: int,
        hidden: int,
        channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        expand: bool = True,
        residual: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.residual = stride, residual
        if expand:
            self.register_buffer("expand", torch.zeros(hidden, channels_in, dtype=dtype, device=device))
            self.register_buffer("expand_shift", torch.zeros(hidden, device=device))
        else:
            self.expand = self.expand_shift = None
        self.register_buffer("depthwise", torch.zeros(hidden, 1, kernel, kernel, dtype=dtype, device=device))
        self.register_buffer("depthwise_shift", torch.zeros(hidden, device=device))
        self.register_buffer("project", torch.zeros(channels, hidden, dtype=dtype, device=device))
        self.register_buffer("project_shift", torch.zeros(channels, device=device))

    @classmethod
    def from_folded(
        cls,
        expand: tuple[Tensor, Tensor] | None,
        depthwise: tuple[Tensor, Tensor],
        project: tuple[Tensor, Tensor],
        *,
        stride: int,
        residual: bool,
    ) -> InvertedResidual:
        """Of three convolutions as ``fold_convolution`` gives each with its norm: a weight and a shift.

        Args:
            expand: ``(e, c, 1, 1)`` and ``(e,)``; None for none.
            depthwise: ``(e, 1, k, k)`` and ``(e,)``.
            project: ``(o, e, 1, 1)`` and ``(o,)``.
            stride: of the depthwise convolution.
            residual: whether x is added.
        """
        hidden, kernel = depthwise[0].shape[0], depthwise[0].shape[-1]
        channels_in = hidden if expand is None else expand[0].shape[1]
        made = cls(
            channels_in,
            hidden,
            project[0].shape[0],
            kernel=kernel,
            stride=stride,
            expand=expand is not None,
            residual=residual,
            dtype=project[0].dtype,
            device=project[0].device,
        )
        if expand is not None:
            made.expand, made.expand_shift = _kept(expand[0].flatten(1), expand[1])
        made.depthwise, made.depthwise_shift = _kept(*depthwise)
        made.project, made.project_shift = _kept(project[0].flatten(1), project[1])
        return made

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, h, w)`` to ``(n, o, ceil(h / stride), ceil(w / stride))``.

        Raises:
            ValueError: what ``inverted_residual`` does not serve.
        """
        first = (self.expand, self.expand_shift, self.depthwise, self.depthwise_shift)
        last = (self.project, self.project_shift)
        return inverted_residual(x.contiguous(), *first, *last, stride=self.stride, residual=self.residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InvertedResidual:
        # Rounded, shifts would move whole channels, and the operator takes float32.
        kept = {name: getattr(self, name) for name in _SHIFTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            now = getattr(self, name)
            if buffer is not None and now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def extra_repr(self) -> str:
        hidden, kernel = self.depthwise.shape[0], self.depthwise.shape[-1]
        channels_in = hidden if self.expand is None else self.expand.shape[1]
        sizes = f"{channels_in}, {hidden}, {self.project.shape[0]}, kernel={kernel}, stride={self.stride}"
        return f"{sizes}, expand={self.expand is not None}, residual={self.residual}"


def _kept(weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return weight.detach().clone().contiguous(), shift.detach().float().clone()
