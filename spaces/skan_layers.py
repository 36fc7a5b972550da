"""KAN layers: a learned function of each input for each output, dense or inside a convolution's kernel.

A branch's learned functions are sums over one basis; a mixed layer sums branches of several bases, phi = sum_k w_k
phi_k, until one of them is chosen (``evaluators.skan_selection``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archfront.spaces.skan_bases import basis


class Branch(nn.Module):
    """One basis of a layer: the inputs' own scale and shift, the basis, and coefficients.

    All bases have the same parameters: ``2 * inputs + outputs * inputs * functions * kernel^2``.

    Args:
        name: of the basis.
        inputs, outputs: features or channels.
        functions: of the basis.
        kernel: height and width of the convolution, or None for a dense layer.
        stride: of the convolution.
    """

    def __init__(
        self, name: str, inputs: int, outputs: int, functions: int, *, kernel: int | None = None, stride: int = 1
    ) -> None:
        super().__init__()
        self.basis = basis(name, functions)
        shape = (inputs,) if kernel is None else (inputs, 1, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.coefficients: nn.Module
        if kernel is None:
            self.coefficients = nn.Linear(inputs * functions, outputs, bias=False)
        else:
            self.coefficients = nn.Conv2d(
                inputs * functions, outputs, kernel, stride=stride, padding=kernel // 2, bias=False
            )

    def forward(self, standardised: Tensor) -> Tensor:
        values = self.basis(standardised * self.scale + self.shift)
        # The functions of a feature become features of their own.
        spread = values.movedim(-1, 2).flatten(1, 2)
        outputs: Tensor = self.coefficients(spread)
        return outputs


class KanLayer(nn.Module):
    """``(n, inputs)`` to ``(n, outputs)``, or with a kernel ``(n, inputs, h, w)`` to ``(n, outputs, h', w')``.

    Inputs are standardised by their batch (moving averages in evaluation), which every basis is made for.

    Args:
        names: one basis, or several to be mixed with softmax weights.

    The others are those of ``Branch``.
    """

    def __init__(
        self,
        names: Sequence[str],
        inputs: int,
        outputs: int,
        functions: int,
        *,
        kernel: int | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.standardise = (
            nn.BatchNorm1d(inputs, affine=False) if kernel is None else nn.BatchNorm2d(inputs, affine=False)
        )
        self.branches = nn.ModuleList(
            Branch(name, inputs, outputs, functions, kernel=kernel, stride=stride) for name in names
        )
        self.bias = nn.Parameter(torch.zeros((outputs,) if kernel is None else (outputs, 1, 1)))
        self.active: int | None = None
        """The branch that works alone, with weight 1; None for the mixture."""
        if len(self.names) > 1:
            self.logits = nn.Parameter(torch.zeros(len(self.names)))
        else:
            self.active = 0

    def weights(self) -> Tensor:
        """Of the bases in the mixture, in the order of ``names``, summing to 1."""
        return self.logits.softmax(dim=0)

    def forward(self, features: Tensor) -> Tensor:
        standardised = self.standardise(features)
        total: Tensor = self.bias
        if self.active is not None:
            total = total + self.branches[self.active](standardised)
        else:
            for weight, branch in zip(self.weights(), self.branches, strict=True):
                total = total + weight * branch(standardised)
        return total

    def prune(self, kept: int) -> None:
        """Leave one branch, which works alone from now on: the layer is as one made of this basis."""
        self.names = (self.names[kept],)
        self.branches = nn.ModuleList([self.branches[kept]])
        self.active = 0
        del self.logits
