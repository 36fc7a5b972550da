"""Attention by a pattern per head as a module, for sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archfront.kernels.ops.pattern_attention import attend
from archfront.kernels.ops.pattern_plan import Plan, plan
from archfront.kernels.reference.attention_patterns import BlockLists, Pattern


class PatternAttention(nn.Module):
    """Takes the place of ``scaled_dot_product_attention`` in a block; its lists are buffers, made at construction.

    So it compiles whole and exports. Blocks are of the size that is best for ``dtype`` on ``device``; the module works
    on others too.

    Args:
        patterns: one for each head.
        length: tokens.
        width: numbers of a head: 32, 64 or 128.
        dtype, device: of the queries.
        scale: of the logits; ``width ** -0.5`` where not given.

    Raises:
        ValueError: a pattern of tokens beyond the length.
    """

    heads: Tensor
    indices: Tensor
    starts: Tensor
    partial: Tensor
    order: Tensor

    def __init__(
        self,
        patterns: Sequence[Pattern],
        length: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.patterns = tuple(patterns)
        self.scale = scale
        made = plan(self.patterns, length, width, dtype, torch.device(device))
        self._rest, self._setting = made.lists[5:], (made.warps, made.stages)
        for name, tensor in zip(BlockLists._fields, made.lists[:5], strict=False):
            # Not saved: they follow of the arguments.
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
        """As ``ops.pattern_attention``: ``(b, h, l, d)``, of which ``transpose(1, 2).flatten(2)`` is a view."""
        lists = BlockLists(self.heads, self.indices, self.starts, self.partial, self.order, *self._rest)
        return attend(q, k, v, Plan(lists, *self._setting), size, self.scale)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.patterns))
