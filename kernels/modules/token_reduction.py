"""Fewer tokens as modules, for between the attention and the MLP of a block. Nothing is kept from call to call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archfront.kernels.ops.token_matching import token_match
from archfront.kernels.ops.token_merging import token_gather, token_merge


class TokenMerge(nn.Module):
    """Merges r tokens into those most similar to them, as ToMe does.

    Args:
        r: tokens that go; 0 changes nothing.
        protected: tokens in front that are left alone: the class token, registers.
        split: 0 to match alternating tokens; else targets are the first ``split``, see ``reference.token_reduction``.
        temperature: of the similarity, with factors.
    """

    def __init__(self, r: int, protected: int = 1, *, split: int = 0, temperature: float = 1.0) -> None:
        super().__init__()
        self.r, self.protected, self.split, self.temperature = r, protected, split, temperature

    def forward(
        self,
        x: Tensor,
        metric: Tensor,
        size: Tensor | None = None,
        factors: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens that remain and their sizes.

        Args:
            x: ``(b, n, c)``.
            metric: ``(b, n, d)``, such as keys averaged over heads, ``k.mean(1)``.
            size: ``(b, n)`` float32; ones where not given.
            factors: ``(b, n)`` float32 of MCTF's score, see ``information_factors``.
            weight: ``(b, n)`` float32 of the means; sizes where not given.

        Returns:
            x: ``(b, n - r, c)``.
            size: ``(b, n - r)`` float32, for attention's ``size``.
        """
        if size is None:
            size = x.new_ones(x.shape[:2], dtype=torch.float32)
        if self.r == 0:
            return x, size
        halves = {"protected": self.protected, "split": self.split}
        score, index = token_match(metric, factors, **halves, temperature=self.temperature)
        return token_merge(x, size, score, index, self.r, **halves, weight=weight)

    def extra_repr(self) -> str:
        return f"r={self.r}, protected={self.protected}, split={self.split}"


class TokenPrune(nn.Module):
    """Keeps the tokens with the highest scores.

    Args:
        keep: tokens that stay beside the protected ones.
        protected: tokens in front that always stay.
        ordered: whether the kept come by falling score, and not in the order they had.
    """

    def __init__(self, keep: int, protected: int = 1, *, ordered: bool = False) -> None:
        super().__init__()
        self.keep, self.protected, self.ordered = keep, protected, ordered

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that remain, ``(b, protected + keep, c)``, and which they were, of the same ``(b, n')``, int64.

        Args:
            x: ``(b, n, c)``.
            score: ``(b, n)`` float32, such as the attention of the class token averaged over heads.
        """
        return token_gather(x, score, self.keep, protected=self.protected, ordered=self.ordered)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, protected={self.protected}, ordered={self.ordered}"
