"""A causal transformer on tokens, small enough to train on a CPU: the kind of model that language models are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from archfront.errors import InputError
from archfront.spaces.models.source import ModelSource, positive

_DEVIATION = 0.02
"""Of fresh weights, as GPT-2's."""


class Decoder(ModelSource):
    """A decoder with pre-norm blocks and learned positions, by default for the characters of the data set ``text``.

    Args:
        context: tokens that it reads at most; its resolution.
        dim: width of the residual stream.
        depth: blocks.
        heads: of each block.
        mlp_ratio: width of the MLP's middle over ``dim``.
        classes: tokens of the vocabulary, of the input as of the output.
        weights: a checkpoint; fresh ones by default.
        seed: of fresh weights.

    Raises:
        InputError: numbers that do not go together, or no such file.
    """

    name: ClassVar[str] = "decoder"
    in_channels = 1

    def __init__(
        self,
        *,
        context: int = 64,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        classes: int = 96,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        positive(context=context, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, classes=classes)
        if dim % heads:
            raise InputError("model.heads", heads, f"does not divide dim {dim}", "Give one that does.")
        super().__init__(weights, seed, "data")
        self.resolution = self.context = context
        self.dim, self.depth, self.heads, self.mlp_ratio, self.classes = dim, depth, heads, mlp_ratio, classes

    @property
    def config(self) -> Mapping[str, Any]:
        fields = ("context", "dim", "depth", "heads", "mlp_ratio", "classes")
        return {field: getattr(self, field) for field in fields}

    def example(self, count: int = 1) -> Tensor:
        """Tokens ``(count, context)`` int64, all 0, on torch's default device."""
        return torch.zeros(count, self.context, dtype=torch.int64)

    def architecture(self) -> nn.Module:
        return Transformer(self.context, self.dim, self.depth, self.heads, self.mlp_ratio, self.classes)


class Transformer(nn.Module):
    """Tokens ``(n, t)`` int64, ``t`` up to ``context``, to logits ``(n, t, classes)`` of the token after each."""

    def __init__(self, context: int, dim: int, depth: int, heads: int, mlp_ratio: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, dim)
        self.positions = nn.Parameter(torch.empty(context, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.normal_(self.positions, std=_DEVIATION)
        for path, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # 2 * depth layers add to the residual stream: so its variance does not grow with the depth (GPT-2).
                adds = path.endswith(("attention.proj", "mlp.fc2"))
                nn.init.normal_(module.weight, std=_DEVIATION / math.sqrt(2 * depth) if adds else _DEVIATION)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(features)))
        return logits


class Block(nn.Module):
    """``(n, t, dim)`` to the same: attention, then an MLP, each beside a shortcut and after a norm of its own."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attention(self.norm1(features))
        changed: Tensor = features + self.mlp(self.norm2(features))
        return changed


class Attention(nn.Module):
    """``(n, t, dim)`` to the same; a place sees itself and those before it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = (self._by_head(layer(features)) for layer in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return mixed

    def _by_head(self, features: Tensor) -> Tensor:
        return torch.unflatten(features, -1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """``(n, t, dim)`` to the same, through ``middle`` values with GELU."""

    def __init__(self, dim: int, middle: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, middle)
        self.fc2 = nn.Linear(middle, dim)

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.fc2(functional.gelu(self.fc1(features)))
        return changed
